// The allocator alone: no overlap, no loss, alignment, and what it refuses.
#include "memory/allocator.hpp"

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <map>
#include <random>
#include <sys/wait.h>
#include <unistd.h>

#include "check.hpp"
#include "store/clients.hpp"

using namespace kvstrata;

namespace {

struct Fixture {
    std::unique_ptr<Region> region;
    Allocator allocator;
    explicit Fixture(u64 memory) : region(Region::create_private({memory, 0})), allocator(*region) {
        Clients::init(*region);
        region->back(region->header().clients_at, align_up(sizeof(Client), kPage));
        allocator.init();
    }
    InFlight& flight(u32 slot) {
        return reinterpret_cast<Client*>(region->at(region->header().clients_at))->in_flight[slot];
    }
    // Slot 0 does all the work; a block is remembered by the caller.
    u32 take(u32 units) {
        if (!allocator.allocate(units, 0, 0)) return kNone;
        const u32 block = flight(0).block;
        flight(0).block = kNone;
        return block;
    }
    void give(u32 block, u32 units) {
        flight(0).units = units;
        flight(0).block = block;
        allocator.release(0, 0);
    }
};

}  // namespace

TEST(blocks_never_overlap_and_all_memory_comes_back) {
    Fixture fixture(16 << 20);
    const u64 all = fixture.allocator.usage().free;
    std::mt19937 random(7);
    std::map<u32, u32> blocks;  // start to units
    for (int step = 0; step < 60000; ++step) {
        if (random() % 100 < 55) {
            const u32 units = 1 + static_cast<u32>(std::exp2(std::uniform_real_distribution<>(0, 14)(random)));
            const u32 block = fixture.take(units);
            if (!block) continue;
            CHECK(u64{block} * kUnit + u64{units} * kUnit <= fixture.region->header().end - fixture.region->header().data_at);
            const auto after = blocks.upper_bound(block);
            if (after != blocks.end()) CHECK(block + units <= after->first);
            if (after != blocks.begin()) CHECK(std::prev(after)->first + std::prev(after)->second <= block);
            if (units > 1024) CHECK(block % (kPage / kUnit) == 0);
            blocks[block] = units;
        } else if (!blocks.empty()) {
            auto chosen = blocks.lower_bound(static_cast<u32>(random() % (blocks.rbegin()->first + 1)));
            fixture.give(chosen->first, chosen->second);
            blocks.erase(chosen);
        }
    }
    for (const auto& [block, units] : blocks) fixture.give(block, units);
    const auto usage = fixture.allocator.usage();
    CHECK(usage.free == all);
    CHECK(usage.free_runs == 1);
    CHECK(usage.faults == 0);
}

TEST(a_second_free_is_refused_and_counted) {
    Fixture fixture(4 << 20);
    for (const u32 units : {3u, 5000u}) {
        const u32 block = fixture.take(units), other = fixture.take(units);
        fixture.give(block, units);
        fixture.give(block, units);
        fixture.give(other, units);
    }
    CHECK(fixture.allocator.usage().faults == 2);
    CHECK(fixture.allocator.usage().free_runs == 1);
}

TEST(a_run_of_exactly_the_wanted_length_is_found) {
    Fixture fixture(4 << 20);
    const u32 units = 181 * (kPage / kUnit);  // no size of a bin
    std::vector<u32> blocks;
    while (const u32 block = fixture.take(units)) blocks.push_back(block);
    fixture.give(blocks[1], units);
    CHECK(fixture.take(units) == blocks[1]);
}

TEST(what_does_not_fit_is_refused) {
    Fixture fixture(1 << 20);
    CHECK(fixture.take((2 << 20) / kUnit) == kNone);
    CHECK(fixture.take((1 << 20) / kUnit - kCanaryUnits) != kNone);
    CHECK(fixture.take(1) == kNone);
}

#if defined(KVSTRATA_FAILPOINTS) && !defined(__SANITIZE_THREAD__)  // TSan can't follow a fork
TEST(a_death_while_a_run_is_merged_with_a_single_page_leaves_a_table_that_can_be_walked) {
    constexpr u32 kPageUnits = kPage / kUnit;
    auto pages = [](u32 count) { return count * kPageUnits - kCanaryUnits; };
    for (const char* point : {"allocator.merge:0", "allocator.tail:0"}) {
        Fixture fixture(1 << 20);
        const u64 all = fixture.allocator.usage().free;
        const u32 before = fixture.take(pages(3)), larger = fixture.take(pages(4)), after = fixture.take(pages(3));
        fixture.give(larger, pages(4));
        const u32 run = fixture.take(pages(3));
        CHECK(run == larger);  // and behind it a page is free
        const pid_t child = fork();
        if (child == 0) {
            setenv("KVSTRATA_FAILPOINT", point, 1);
            fixture.give(run, pages(3));
            _exit(1);
        }
        int status = 0;
        waitpid(child, &status, 0);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        CHECK(fixture.allocator.usage().free == all - 6 * kPage);
        fixture.give(before, pages(3));
        fixture.give(after, pages(3));
        CHECK(fixture.allocator.usage().free == all);
        CHECK(fixture.allocator.usage().free_runs == 1);
        CHECK(fixture.allocator.usage().faults == 0);
    }
}
#endif
