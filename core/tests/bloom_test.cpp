// The counting Bloom filter: what it finds, what it takes for its own, and what the mapping counts with it.
#include "base/bloom.hpp"

#include <memory>
#include <thread>
#include <vector>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

struct Filter {
    BloomShape shape;
    std::unique_ptr<CountingBloom::Byte[]> bytes;
    CountingBloom bloom;
    Filter(u64 capacity, double fp_rate)
        : shape(BloomShape::of(capacity, fp_rate)),
          bytes(new CountingBloom::Byte[shape.bytes()]()),
          bloom(bytes.get(), shape) {}
};

// The part of `tries` numbers from `from` on that are found.
double found(const CountingBloom& bloom, u64 from, u64 tries) {
    u64 count = 0;
    for (u64 i = from; i < from + tries; ++i) count += bloom.contains(spread(i));
    return static_cast<double>(count) / static_cast<double>(tries);
}

constexpr u64 kElsewhere = u64{1} << 40;  // numbers that nobody added

}  // namespace

TEST(a_count_is_never_too_low_and_seldom_too_high) {
    Filter filter(10000, 0.01);
    for (u64 i = 1; i <= 10000; ++i)
        for (u64 times = 0; times < i % 4; ++times) filter.bloom.add(spread(i));
    u64 too_high = 0;
    for (u64 i = 1; i <= 10000; ++i) {
        CHECK(filter.bloom.count(spread(i)) >= i % 4);
        too_high += filter.bloom.count(spread(i)) > i % 4;
    }
    CHECK(too_high < 200);
    for (int i = 0; i < 20; ++i) filter.bloom.add(spread(kElsewhere));
    CHECK(filter.bloom.count(spread(kElsewhere)) == CountingBloom::kStuck);
}

TEST(what_was_added_is_found_and_the_false_positives_are_as_many_as_theory_says) {
    for (const u64 capacity : {u64{100}, u64{10000}, u64{50000}})
        for (const double wanted : {0.2, 0.03, 0.01, 0.001}) {
            Filter filter(capacity, wanted);
            CHECK(filter.shape.fp_rate(static_cast<double>(capacity)) <= wanted);
            // And no larger than need be, but for rounding.
            CHECK(filter.shape.fp_rate(static_cast<double>(capacity) * 1.1) > wanted || capacity == 100);
            for (u64 i = 1; i <= capacity; ++i) filter.bloom.add(spread(i));
            CHECK(found(filter.bloom, 1, capacity) == 1);
            const double expected = filter.shape.fp_rate(static_cast<double>(capacity));
            const u64 tries = 200000;
            // Four standard deviations of the drawing, and of how full a filter of this size happens to be.
            const double drawn = std::sqrt(expected / static_cast<double>(tries));
            const double counters = static_cast<double>(filter.shape.counters);
            const double filled = expected * filter.shape.hashes / std::sqrt(counters);
            const double measured = found(filter.bloom, kElsewhere, tries);
            CHECK(std::abs(measured - expected) < 4 * (drawn + filled));
            const auto figures = filter.bloom.figures();
            CHECK(std::abs(figures.fp_rate - measured) < 4 * drawn);
            const double keys = static_cast<double>(capacity);
            CHECK(std::abs(figures.keys / keys - 1) < 4 / std::sqrt(keys));
        }
}

TEST(what_was_removed_is_gone_and_takes_nothing_else_with_it) {
    Filter filter(10000, 0.01);
    for (u64 i = 1; i <= 10000; ++i) filter.bloom.add(spread(i));
    for (u64 i = 1; i <= 5000; ++i) filter.bloom.remove(spread(i));
    CHECK(found(filter.bloom, 5001, 5000) == 1);
    CHECK(found(filter.bloom, 1, 5000) < 0.01);  // half full: far fewer than when full
    for (u64 i = 5001; i <= 10000; ++i) filter.bloom.remove(spread(i));
    const auto figures = filter.bloom.figures();
    CHECK(figures.fill == 0 || figures.stuck > 0);
}

TEST(a_counter_that_is_full_stays_so_and_never_loses_a_key) {
    Filter filter(100, 0.01);
    const u64 many = spread(1), once = spread(2);
    for (int i = 0; i < 20; ++i) filter.bloom.add(many);
    filter.bloom.add(once);
    for (int i = 0; i < 20; ++i) filter.bloom.remove(many);
    CHECK(filter.bloom.contains(many));  // it can't know any more that it is gone
    CHECK(filter.bloom.contains(once));
    CHECK(filter.bloom.figures().stuck > 0);
    filter.bloom.clear();
    CHECK(!filter.bloom.contains(many) && filter.bloom.figures().fill == 0);
}

TEST(removing_from_an_empty_filter_leaves_it_empty) {
    Filter filter(100, 0.01);
    filter.bloom.remove(spread(1));
    CHECK(filter.bloom.figures().fill == 0);
}

TEST(threads_that_add_and_remove_their_own_lose_nothing_of_each_others) {
    Filter filter(200, 0.01);  // small, so that they meet
    std::vector<std::thread> threads;
    std::atomic<u64> lost{0};
    for (u64 thread = 0; thread < 4; ++thread)
        threads.emplace_back([&, thread] {
            for (u64 round = 0; round < 3000; ++round) {
                const u64 mine = spread(thread << 32 | round % 40);
                filter.bloom.add(mine);
                if (!filter.bloom.contains(mine)) ++lost;
                filter.bloom.remove(mine);
            }
        });
    for (auto& thread : threads) thread.join();
    CHECK(lost == 0);
    CHECK(filter.bloom.figures().fill == 0);  // four hold at most one each: no counter can have got full
}

// ---- Debts ----------------------------------------------------------------------------------------

namespace {
std::string name_of(int number) { return "key " + std::to_string(number); }
}  // namespace

TEST(who_puts_or_removes_another_key_hardly_ever_pays_for_what_the_index_forgot) {
    auto store = Store::open_private({8 << 20, 64 << 20});
    store->restore_namespace(1, "default", 1, 1, false);
    const Space space = store->open_namespace(1, "default", 1, {});
    // Removed, and not yet paid for.
    const int owed = 1000;
    for (int i = 0; i < owed; ++i) {
        DiskRow row{};
        const std::string key = name_of(i);
        row.ns = 1, row.key = bytes_of(key), row.seq = 1, row.segment = 1, row.offset = 64, row.length = 128;
        row.version = 1, row.epoch = 1;
        CHECK(store->insert_disk(row));
        CHECK(store->remove(space, bytes_of(key)).on_disk);
    }
    const StoreStats stats = store->stats();
    CHECK(std::abs(stats.debts.keys - owed) < 100 && stats.debts.fp_rate < 0.001);
    for (int i = 0; i < owed; ++i) CHECK(store->remove(space, bytes_of(name_of(i))).on_disk);
    int for_nothing = 0;
    for (int i = owed; i < 20 * owed; ++i) for_nothing += store->remove(space, bytes_of(name_of(i))).on_disk;
    CHECK(for_nothing < 20);
}

TEST(a_debt_lasts_until_everyone_who_owes_has_paid) {
    auto store = Store::open_private({8 << 20, 64 << 20});
    const Space space = store->open_namespace(0, "default", 1, {});
    put(*store, space, "a", "one");
    for (auto& dirty : store->take_dirty(10, 1 << 20, 0)) store->settle(dirty, 1, 64);
    CHECK(put(*store, space, "a", "two") == Published::replaced_on_disk);  // owes once
    CHECK(store->remove(space, bytes_of("a")).on_disk);                     // twice
    store->pay(space.id, bytes_of("a"));
    CHECK(store->remove(space, bytes_of("a")).on_disk);  // there is a debt still, and this makes it two again
    store->pay(space.id, bytes_of("a"));
    store->pay(space.id, bytes_of("a"));
    CHECK(!store->remove(space, bytes_of("a")).on_disk);
    CHECK(store->stats().debts.fill == 0);
}
