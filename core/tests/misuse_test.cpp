// What becomes of those who misuse memory: writes where only reading is allowed, or beyond an end, or too late.
#include <csignal>
#include <cstring>
#include <sys/wait.h>
#include <unistd.h>

#include "memory/allocator.hpp"
#include "check.hpp"
#include "store/clients.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

// Whether a child process that does this dies of it. What it would have to say of that is left out.
template <class Act>
bool dies_of(Act&& act) {
    const pid_t child = fork();
    if (child == 0) {
        close(STDERR_FILENO);
        for (const int signal : {SIGSEGV, SIGBUS}) std::signal(signal, SIG_DFL);
        act();
        _exit(0);
    }
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

template <class T>
void touch(const T* at) {
    static_cast<void>(*static_cast<const volatile T*>(at));
}
void write_to(const u8* at) { *const_cast<volatile u8*>(at) = 1; }

struct Pool {
    std::unique_ptr<Region> region = Region::create_private({4 << 20, 0});
    Allocator allocator{*region};
    Pool() {
        region->assume_exclusive();  // its children only touch what they are not to touch
        Clients::init(*region);
        region->back(region->header().clients_at, align_up(sizeof(Client), kPage));
        allocator.init();
    }
    InFlight& flight() { return reinterpret_cast<Client*>(region->at(region->header().clients_at))->in_flight[0]; }
    u8* bytes() { return region->data() + u64{flight().block} * kUnit; }
};

constexpr u32 kSizes[] = {1, 20, 127, 128, 129, 1024};  // units: small blocks, and runs of pages

}  // namespace

TEST(a_reader_cannot_write_and_reads_what_is_written) {
    auto store = Store::open_private({1 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    put(*store, space, "key", "value");
    Pin pin;
    CHECK(store->acquire(space, bytes_of("key"), pin, nullptr, nullptr) == Lookup::hit);
    CHECK(!dies_of([&] { touch(pin.value()); }));
    CHECK(dies_of([&] { write_to(pin.value()); }));
    CHECK(std::memcmp(pin.value(), "value", 5) == 0);
}

TEST(both_ends_of_both_mappings_are_guarded) {
    const auto region = Region::create_private({1 << 20, 0});
    const u64 bytes = region->header().end - region->header().data_at;
    for (const u8* start : {static_cast<const u8*>(region->data()), region->view()}) {
        CHECK(!dies_of([&] { touch(start), touch(start + bytes - 1); }));
        CHECK(dies_of([&] { touch(start - 1); }));
        CHECK(dies_of([&] { touch(start + bytes); }));
    }
    CHECK(!dies_of([&] { write_to(region->data() + bytes - 1); }));
    CHECK(dies_of([&] { write_to(region->data() + bytes); }));
    CHECK(dies_of([&] { write_to(region->data() - 1); }));
}

TEST(a_block_that_is_freed_twice_stays_free_and_is_counted) {
    Pool pool;
    u64 expected = 0;
    for (const u32 units : kSizes) {
        CHECK(pool.allocator.allocate(units, 0, 0));
        const InFlight freed = pool.flight();
        pool.allocator.release(0, 0);
        const u64 free = pool.allocator.usage().free;
        pool.flight() = freed;
        pool.allocator.release(0, 0);
        CHECK(pool.allocator.usage().faults == ++expected);
        CHECK(pool.allocator.usage().free == free);
    }
    CHECK(pool.allocator.usage().free_runs == 1);
}

#ifdef KVSTRATA_DEBUG

TEST(a_write_beyond_the_end_of_a_block_is_told_when_it_is_freed) {
    Pool pool;
    u64 expected = 0;
    for (const u32 units : kSizes)
        for (const u32 beyond : {0u, static_cast<u32>(kUnit) - 1}) {
            CHECK(pool.allocator.allocate(units, 0, 0));
            std::memset(pool.bytes(), 7, u64{units} * kUnit);  // all of it is its owner's
            pool.allocator.release(0, 0);
            CHECK(pool.allocator.usage().overruns == expected);
            CHECK(pool.allocator.allocate(units, 0, 0));
            pool.bytes()[u64{units} * kUnit + beyond] = 7;
            pool.allocator.release(0, 0);
            CHECK(pool.allocator.usage().overruns == ++expected);
        }
    CHECK(pool.allocator.usage().late_writes == 0 && pool.allocator.usage().faults == 0);
}

TEST(an_overrun_through_a_reservation_is_told) {
    auto store = Store::open_private({4 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    for (const u64 size : {u64{1000}, u64{300000}}) {
        auto reservation = store->reserve(space, bytes_of("key"), size, {}, true);
        std::memset(reservation->payload(), 1, size);
        const u64 end = record_bytes(3, size) - payload_offset_for(3, size);
        reservation->payload()[end] = 1;
        store->publish(*reservation);
        store->remove(space, bytes_of("key"));
    }
    CHECK(store->stats().memory.overruns == 2);
}

TEST(a_write_to_a_freed_block_is_told_when_it_is_handed_out_again) {
    Pool pool;
    u64 expected = 0;
    for (const u32 units : kSizes) {
        CHECK(pool.allocator.allocate(units, 0, 0));
        u8* const bytes = pool.bytes();
        pool.allocator.release(0, 0);
        const u64 last = u64{units} * kUnit - 1;
        allow_access(bytes + last, 1);  // else AddressSanitizer would stop us right here
        bytes[last] = 7;
        CHECK(pool.allocator.allocate(units, 0, 0) && pool.bytes() == bytes);
        CHECK(pool.allocator.usage().late_writes == ++expected);
        pool.allocator.release(0, 0);
    }
}

#ifdef __SANITIZE_ADDRESS__
TEST(the_address_sanitizer_stops_who_reads_a_freed_block_or_beyond_one) {
    Pool pool;
    CHECK(pool.allocator.allocate(20, 0, 0));
    const u64 length = 20 * kUnit;
    const u8* const view = pool.region->view() + u64{pool.flight().block} * kUnit;
    u8* const bytes = pool.bytes();
    CHECK(!dies_of([&] { touch(bytes), touch(view), touch(bytes + length - 1); }));
    CHECK(dies_of([&] { touch(view + length); }));
    pool.allocator.release(0, 0);
    CHECK(dies_of([&] { touch(bytes); }));
    CHECK(dies_of([&] { touch(view); }));
    CHECK(dies_of([&] { write_to(bytes); }));
}
#endif

#else

TEST(a_release_build_gives_a_block_not_a_byte_more_than_asked_for) {
    static_assert(kCanaryUnits == 0);
    Pool pool;
    const u64 free = pool.allocator.usage().free;
    for (const u32 units : {kSmallUnits, 2 * u32{kPage / kUnit} * 100}) {
        CHECK(pool.allocator.allocate(units, 0, 0));
        CHECK(pool.allocator.usage().free == free - u64{units} * kUnit);
        pool.allocator.release(0, 0);
    }
}

#endif
