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

#if defined(KVSTRATA_FAILPOINTS) && !defined(__SANITIZE_THREAD__)  // TSan can't follow a fork
namespace {

[[maybe_unused]] const int impatient = setenv("KVSTRATA_LOCK_TIMEOUT", "0.02", 1);

// Another process, which stops at a point of what it does.
class Stopped {
public:
    template <class Act>
    Stopped(Store& store, const char* point, Act&& act) : child_(fork()) {
        if (child_ == 0) {
            alarm(60);
            store.leave_to_parent();
            {
                const auto mine = store.attach_again();
                setenv("KVSTRATA_FAILPOINT", (std::string(point) + ":0:stop").c_str(), 1);
                act(*mine);
            }
            _exit(0);
        }
        int status = 0;
        CHECK(waitpid(child_, &status, WUNTRACED) == child_ && WIFSTOPPED(status));
    }
    ~Stopped() { go_on(); }
    Stopped(const Stopped&) = delete;
    Stopped& operator=(const Stopped&) = delete;

    // Lets it go on, to its end.
    void go_on() {
        if (!child_) return;
        int status = 0;
        CHECK(kill(child_, SIGCONT) == 0 && waitpid(child_, &status, 0) == child_ && WIFEXITED(status));
        child_ = 0;
    }

private:
    pid_t child_;
};

std::string key_of(int number) { return "key " + std::to_string(number); }

}  // namespace

TEST(a_holder_whose_closing_was_cut_short_is_closed_by_whoever_opens_the_next_one) {
    auto store = Store::open_private({4 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    const u8 holder = store->open_holder("holder", 1 << 20);
    for (int i = 0; i < 200; ++i) {
        put(*store, space, key_of(i), "value");
        CHECK(store->hold(space, bytes_of(key_of(i)), holder));
    }
    {
        const Stopped peer(*store, "store.pin", [&](Store& mine) { get(mine, space, key_of(100)); });
        CHECK_THROWS(TierUnavailable, store->close_holder(holder));
    }
    CHECK(store->holders().empty());
    CHECK_THROWS(ConfigError, store->hold(space, bytes_of(key_of(0)), holder));
    CHECK(store->open_holder("another", 1 << 20) == holder);
    CHECK(store->holders().at(0).bytes == 0);
    for (int i = 0; i < 200; ++i) CHECK(!store->let_go(space, bytes_of(key_of(i)), holder));
}

TEST(blocks_that_a_stopped_process_keeps_from_being_freed_are_freed_once_it_goes_on) {
    auto store = Store::open_private({16 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    const std::string value(20000, 'v'), longer(100, 'k');  // keys of which each has a block of its own
    for (int i = 0; i < 200; ++i) put(*store, space, longer + key_of(i), value);
    {
        const Stopped peer(*store, "allocator.announced", [&](Store& mine) { put(mine, space, "its", value); });
        for (int i = 0; i < 50; ++i) CHECK(store->remove(space, bytes_of(longer + key_of(i))).present);  // of more blocks than slots
        CHECK_THROWS(TierUnavailable, put(*store, space, "mine", value));
    }
    put(*store, space, "mine", value);
    CHECK(store->usage(space.id).first == 152);
    for (int i = 50; i < 200; ++i) store->remove(space, bytes_of(longer + key_of(i)));
    for (const char* const key : {"its", "mine"}) store->remove(space, bytes_of(key));
    const auto stats = store->stats();
    CHECK(stats.memory.used == 0 && stats.memory.free_runs == 1 && stats.memory.faults == 0);
    CHECK(stats.entries == 0 && stats.reservations == 0 && store->usage(space.id).second == 0);
}

TEST(a_record_whose_block_cannot_be_freed_now_stays_in_memory_and_in_its_order) {
    auto store = Store::open_private({16 << 20, 1 << 30});
    const Space space = store->open_namespace(0, "default", 1, {});
    for (int i = 0; i < 200; ++i) put(*store, space, key_of(i), std::string(20000, 'v'));
    u64 offset = 0;
    for (auto& dirty : store->take_dirty(200, 1 << 30, 0)) store->settle(dirty, 1, offset += 1 << 20);
    {
        const Stopped peer(*store, "allocator.announced", [&](Store& mine) { put(mine, space, "its", "value"); });
        CHECK_THROWS(TierUnavailable, store->demote_all());  // once no slot is left
    }
    u64 in_memory = 0;
    for (int i = 0; i < 200; ++i) in_memory += get(*store, space, key_of(i)) != "(absent)";
    CHECK(in_memory && store->usage(space.id).first == in_memory + 1);
}

TEST(a_put_has_succeeded_also_when_a_stopped_process_keeps_it_from_making_room_for_the_next_one) {
    auto store = Store::open_private({16 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    const std::string value(200000, 'v');
    for (int i = 0; i < 200; ++i) put(*store, space, key_of(i), value);  // more than there is room for
    auto reservation = store->reserve(space, bytes_of("last"), value.size(), {}, true);
    reservation->header.payload_crc = copy_crc32c(reservation->payload(), value.data(), value.size(), 0);
    {
        const Stopped peer(*store, "allocator.announced", [&](Store& mine) { put(mine, space, "its", value); });
        CHECK(store->publish(*reservation) == Published::stored);
        CHECK(get(*store, space, "last") == value);
    }
}

TEST(a_pin_that_a_stopped_process_keeps_from_being_given_back_is_given_back_once_it_goes_on) {
    auto store = Store::open_private({1 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    put(*store, space, "key", "value");
    {
        Pin pin;
        CHECK(store->acquire(space, bytes_of("key"), pin, nullptr, nullptr) == Lookup::hit);
        const Stopped peer(*store, "store.pin", [&](Store& mine) { get(mine, space, "key"); });
        pin = Pin();
    }
    store->reap();
    store->remove(space, bytes_of("key"));
    CHECK(store->stats().pins == 0 && store->stats().memory.used == 0);
}
#endif

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
