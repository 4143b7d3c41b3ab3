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
