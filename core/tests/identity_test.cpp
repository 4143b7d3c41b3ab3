// Copies that are kept elsewhere, and checked without a lock while others write: also made for TSan.
#include <atomic>
#include <random>
#include <thread>

#include "check.hpp"
#include "base/clock.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

Identity identity_of(Store& store, Space space, const std::string& key) {
    Pin pin;
    if (store.acquire(space, bytes_of(key), pin, nullptr, nullptr) != Lookup::hit) return {};
    return store.identify(pin);
}

}  // namespace

TEST(an_identity_holds_until_its_record_is_no_longer_what_the_key_has) {
    auto store = Store::open_private({4 << 20, 0});
    const Space space = store->open_namespace(0, "a", 1, {});
    CHECK(!store->holds(space, {}));
    put(*store, space, "key", "1");
    const Identity first = identity_of(*store, space, "key");
    CHECK(store->holds(space, first));
    put(*store, space, "key", "2");
    const Identity second = identity_of(*store, space, "key");
    CHECK(!store->holds(space, first) && store->holds(space, second));
    store->remove(space, bytes_of("key"));
    CHECK(!store->holds(space, second));
    put(*store, space, "key", "1");
    CHECK(!store->holds(space, first) && !store->holds(space, second));
}

TEST(an_identity_ends_with_its_epoch_version_and_time) {
    auto store = Store::open_private({4 << 20, 0});
    Space space = store->open_namespace(0, "a", 1, {});
    put(*store, space, "key", "1");
    const Identity cleared = identity_of(*store, space, "key");
    store->clear(space);
    CHECK(!store->holds(space, cleared));
    put(*store, space, "key", "1");
    const Identity old = identity_of(*store, space, "key");
    const Space newer = store->open_namespace(0, "a", 2, {});
    CHECK(!store->holds(space, old) && !store->holds(newer, old));
    put(*store, newer, "key", "1", 1000);
    put(*store, newer, "later", "1", now_ms() + 3600 * 1000);
    Identity later = identity_of(*store, newer, "later");
    CHECK(store->holds(newer, later));
    later.expires = now_ms();
    CHECK(!store->holds(newer, later));
}

TEST(an_identity_means_nothing_in_another_mapping) {
    auto one = Store::open_private({4 << 20, 0});
    auto other = Store::open_private({4 << 20, 0});
    const Space space = one->open_namespace(0, "a", 1, {});
    const Space same = other->open_namespace(0, "a", 1, {});
    put(*one, space, "key", "1");
    put(*other, same, "key", "1");
    const Identity identity = identity_of(*one, space, "key");
    CHECK(one->holds(space, identity) && one->attach_again()->holds(space, identity));
    CHECK(!other->holds(same, identity));
}

TEST(a_record_that_is_refreshed_outlives_those_put_after_it) {
    auto store = Store::open_private({4 << 20, 0});
    const Space space = store->open_namespace(0, "a", 1, {});
    const std::string value(100'000, 'x');  // large ones don't leave together because they lie together
    put(*store, space, "kept", value);
    put(*store, space, "left", value);
    const Identity kept = identity_of(*store, space, "kept"), left = identity_of(*store, space, "left");
    u32 stamp = store->tick();
    CHECK(!store->fades(space, stamp));
    for (int i = 0; i < 200; ++i) {
        put(*store, space, "other " + std::to_string(i), value);
        if (store->fades(space, stamp)) stamp = store->refresh(space, kept);
    }
    CHECK(store->holds(space, kept) && !store->holds(space, left));
}

// Each key counts up. Whoever has seen number n put, must never find a copy of an earlier one to hold.
TEST(checks_beside_writers_never_hold_what_was_overwritten_before) {
    constexpr u32 kKeys = 16;
    auto store = Store::open_private({4 << 20, 0});
    const Space space = store->open_namespace(0, "a", 1, {});
    std::atomic<u32> put_so_far[kKeys] = {};
    std::atomic<int> wrong{0}, held{0}, gone{0};
    std::atomic<bool> stop{false};
    std::vector<std::thread> checkers;
    for (unsigned i = 0; i < 2; ++i)
        checkers.emplace_back([&, i] {
            const auto mine = store->attach_again();
            std::mt19937 random(i);
            struct Copy {
                Identity identity;
                u32 number = 0;
            } copies[kKeys];
            while (!stop) {
                const u32 key = random() % kKeys;
                const u32 least = put_so_far[key].load();
                Copy& copy = copies[key];
                if (mine->holds(space, copy.identity)) {
                    held.fetch_add(1);
                    if (copy.number < least) wrong.fetch_add(1);
                    if (mine->fades(space, 0)) mine->refresh(space, copy.identity);
                    continue;
                }
                if (copy.number) gone.fetch_add(1);
                Pin pin;
                if (mine->acquire(space, bytes_of(std::to_string(key)), pin, nullptr, nullptr) != Lookup::hit) continue;
                copy.identity = mine->identify(pin);
                copy.number = static_cast<u32>(std::stoul(std::string(reinterpret_cast<const char*>(pin.value()), pin.size())));
            }
        });
    std::mt19937 random(7);
    for (u32 number = 1; number < 4000 || !held || !gone; ++number) {
        const u32 key = random() % kKeys;
        if (number % 3 == 0) store->remove(space, bytes_of(std::to_string(key)));
        put(*store, space, std::to_string(key), std::to_string(number));
        put_so_far[key] = number;
        if (number % 256 == 0) store->clear(space);
    }
    stop = true;
    for (auto& checker : checkers) checker.join();
    CHECK(wrong == 0);
}
