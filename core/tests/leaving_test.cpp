// What becomes of what somebody leaves behind who is stopped, cut short or closes too early. kill_test has deaths.
#include <csignal>
#include <cstdlib>
#include <new>
#include <sys/wait.h>
#include <unistd.h>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

TEST(what_a_store_still_holds_when_it_goes_is_left_to_the_next_reaper) {
    auto store = Store::open_private({1 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    put(*store, space, "key", "value");
    auto other = store->attach_again();
    alignas(Pin) std::byte place[sizeof(Pin)];
    CHECK(other->acquire(space, bytes_of("key"), *new (place) Pin, nullptr, nullptr) == Lookup::hit);  // for good
    other.reset();
    CHECK(store->reap() == 1);
    store->remove(space, bytes_of("key"));
    const auto stats = store->stats();
    CHECK(stats.memory.used == 0 && stats.entries == 0 && stats.clients == 1 && stats.reaped_pins == 1);
}

TEST(a_record_that_was_being_written_when_its_process_left_owes_its_row) {
    for (const bool in_order : {true, false}) {
        auto store = Store::open_private({1 << 20, 1 << 30});
        const Space space = store->open_namespace(0, "default", 1, {});
        auto write = [&](Store& mine) {
            put(mine, space, "key", "value");
            CHECK(mine.take_dirty(1, 1 << 20, 0).size() == 1);
        };
        if (in_order) {
            write(*store->attach_again());
        } else if (const pid_t child = fork()) {
            waitpid(child, nullptr, 0);
        } else {
            store->leave_to_parent();
            const auto mine = store->attach_again();
            write(*mine);
            _exit(0);
        }
        store->reap();
        for (auto& adopted : store->take_dirty(1, 1 << 20, 0)) store->settle(adopted, 0, 0);  // the tier below takes it no more
        CHECK(store->remove(space, bytes_of("key")).on_disk);
    }
}
