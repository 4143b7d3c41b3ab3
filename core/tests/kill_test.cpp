// A process dies at each named point; the next one goes on with a whole cache. Needs KVSTRATA_FAILPOINTS.
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sys/wait.h>
#include <unistd.h>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

#if defined(KVSTRATA_FAILPOINTS) && !defined(__SANITIZE_THREAD__)  // TSan can't follow a fork
namespace {

const char* const kPoints[] = {
    "allocator.tail", "allocator.split", "allocator.take", "allocator.merge", "allocator.freed", "allocator.begin",
    "allocator.announced", "allocator.done", "allocator.freeing", "allocator.released", "allocator.forgotten",
    "allocator.chunk", "index.link", "index.live", "index.unlink", "index.unlinked", "index.free", "store.pin",
    "store.unpin", "store.filled", "store.published", "store.leaving", "store.left", "store.gone", "store.loaded",
    "store.promoted",
};

constexpr u32 kGoing = 1 << 30;  // a segment that is dropped now and then

std::string key_of(u32 number) {
    // Some keys lie in the entry, some in a block of their own.
    return (number % 3 ? "" : std::string(50, 'x')) + "key " + std::to_string(number);
}

std::string value_of(u32 number) {
    return std::string(number % 5 == 0 ? 70000 : 100 * (number % 50), static_cast<char>('a' + number % 26));
}

// Everything that a process does, over a namespace that is always full; dies somewhere in here.
void work(Store& store, Space space, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::string> disk;
    const u32 segment = static_cast<u32>(getpid());
    auto write_below = [&] {
        for (auto& dirty : store.take_dirty(4, 1 << 20, 0)) {
            disk.emplace_back(reinterpret_cast<const char*>(dirty.pin.record()), dirty.pin.record_size());
            store.settle(dirty, segment, (disk.size() - 1) * kUnit);
        }
    };
    for (u32 row = 0;; ++row) {
        const u32 number = random() % 200;
        const std::string key = key_of(number);
        switch (random() % 5) {
            case 0:
            case 1: {
                auto reservation = store.reserve(space, bytes_of(key), value_of(number).size(), {}, false);
                if (!reservation) {
                    write_below();
                    break;
                }
                const std::string value = value_of(number);
                reservation->header.payload_crc = copy_crc32c(reservation->payload(), value.data(), value.size(), 0);
                store.publish(*reservation);
                break;
            }
            case 2: store.remove(space, bytes_of(key)); break;
            case 3: get(store, space, key); break;
            default:
                write_below();
                store.insert_disk({space.id, bytes_of("row " + std::to_string(row)), row + 1u, segment, 0, 128, 0, 1, 1, 0, {}});
                store.insert_disk({space.id, bytes_of("gone " + std::to_string(row)), row + 1u, kGoing, 0, 128, 0, 1, 1, 0, {}});
                store.forget_disk(space.id, bytes_of("gone " + std::to_string(row - random() % 2)), row + 1u);
                if (random() % 32 == 0) store.drop_segment(kGoing);
                if (const auto where = store.locate(space, bytes_of(key)); where && where->segment == segment) {
                    if (auto loading = store.begin_load(space, bytes_of(key), *where)) {
                        const std::string& record = disk[where->offset / kUnit];
                        std::memcpy(loading->block.bytes(), record.data(), record.size());
                        store.commit_load(*loading);
                    }
                }
        }
    }
}

void check_whole(Store& store, Space space, const char* point) {
    int present = 0;
    for (u32 number = 0; number < 200; ++number) {
        const std::string got = get(store, space, key_of(number));
        if (got == "(absent)") {
            CHECK(!store.contains(space, bytes_of(key_of(number))) || store.locate(space, bytes_of(key_of(number))));
            continue;
        }
        ++present;
        if (!CHECK(got == value_of(number))) std::fprintf(stderr, "  after %s\n", point);
    }
    if (!CHECK(present > 0)) std::fprintf(stderr, "  after %s\n", point);
}

// Lets another process act and die at that point of it; returns its number.
template <class Act>
pid_t die_at(Store& store, const std::string& point, Act&& act) {
    const pid_t child = fork();
    if (child == 0) {
        setenv("KVSTRATA_FAILPOINT", point.c_str(), 1);
        store.leave_to_parent();
        const auto mine = store.attach_again();
        alarm(20);
        try {
            act(*mine);
        } catch (const std::exception& error) {
            std::fprintf(stderr, "  in the child: %s\n", error.what());
        }
        _exit(1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (!CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)) std::fprintf(stderr, "  %s was never reached\n", point.c_str());
    return child;
}

}  // namespace

TEST(a_death_at_any_point_costs_nothing_but_what_was_being_put) {
    std::vector<int> countdowns{0, 3, 40};
    const char* const soak = std::getenv("KVSTRATA_SOAK");  // how many more, for a longer run
    for (int more = 1; soak && more <= std::atoi(soak); ++more) countdowns.push_back(40 + more * 7);
    for (const char* point : kPoints) {
        for (const int countdown : countdowns) {
            auto store = Store::open_private({1 << 20, 1 << 30});
            const Space space = store->open_namespace(0, "default", 1, {});
            for (u32 number = 0; number < 200; ++number) {
                put(*store, space, key_of(number), value_of(number));
                for (auto& dirty : store->take_dirty(8, 1 << 20, 0)) store->settle(dirty, 0, 0);
            }
            const pid_t child = die_at(*store, std::string(point) + ":" + std::to_string(countdown), [&](Store& mine) {
                work(mine, space, static_cast<unsigned>(countdown));
            });
            check_whole(*store, space, point);  // before anybody has reaped
            auto settle_all = [&] {
                for (auto& dirty : store->take_dirty(1000, 1 << 30, 0)) store->settle(dirty, 0, 0);
            };
            auto fill = [&] {
                for (u32 number = 0; number < 200; ++number) {
                    const std::string key = key_of(number), value = value_of(number);
                    std::optional<Reservation> reservation;
                    while (!reservation) {  // when there's no room for it, what the dead had yet to write is ours now
                        settle_all();
                        reservation = store->reserve(space, bytes_of(key), value.size(), {}, false);
                    }
                    reservation->header.payload_crc = copy_crc32c(reservation->payload(), value.data(), value.size(), 0);
                    store->publish(*reservation);
                }
                settle_all();
                check_whole(*store, space, point);
            };
            if (countdown % 2) fill();  // blocks that it was freeing are others' by the time it is reaped
            CHECK(store->reap() <= 1);
            CHECK(store->stats().clients == 1);
            settle_all();
            for (int round = 0; round < 3; ++round) fill();
            for (const u32 segment : {static_cast<u32>(child), kGoing}) store->drop_segment(segment);
            for (u32 number = 0; number < 200; ++number) store->remove(space, bytes_of(key_of(number)));
            const auto stats = store->stats();
            if (!CHECK(stats.memory.used == 0) || !CHECK(stats.memory.free_runs == 1) || !CHECK(stats.entries == 0) ||
                !CHECK(stats.memory.faults == 0) || !CHECK(stats.pins == 0) || !CHECK(stats.dirty_bytes == 0) ||
                !CHECK(store->usage(space.id) == std::pair<u64, u64>(0, 0)))
                std::fprintf(stderr, "  after %s:%d: used %lu in %u runs, faults %lu\n", point, countdown,
                             static_cast<unsigned long>(stats.memory.used), stats.memory.free_runs,
                             static_cast<unsigned long>(stats.memory.faults));
        }
    }
}

TEST(a_death_while_a_record_below_is_forgotten_leaves_no_key_that_can_be_neither_read_nor_stored) {
    for (const bool all_of_the_segment : {false, true}) {
        auto store = Store::open_private({1 << 20, 1 << 30});
        NamespaceOptions options;
        options.immutable = true;
        const Space space = store->open_namespace(0, "default", 1, options);
        store->insert_disk({space.id, bytes_of("key"), 5, 7, 0, 128, 0, 1, 1, kRecordImmutable, {}});
        die_at(*store, "index.unlink", [&](Store& mine) {
            all_of_the_segment ? void(mine.drop_segment(7)) : void(mine.forget_disk(space.id, bytes_of("key"), 5));
        });
        CHECK(!store->contains(space, bytes_of("key")));
        CHECK(put(*store, space, "key", "value") == Published::stored && get(*store, space, "key") == "value");
        CHECK(store->reap() == 1);
        store->remove(space, bytes_of("key"));
        CHECK(store->stats().entries == 0 && store->stats().memory.used == 0);
    }
}
#else
TEST(nothing_to_kill_in_this_build) { CHECK(true); }
#endif
