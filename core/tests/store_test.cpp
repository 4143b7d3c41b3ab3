// The store's verbs, one thread.
#include "store/store.hpp"

#include <chrono>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <unordered_map>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {
std::shared_ptr<Store> fresh(u64 memory = 4 << 20, u64 disk = 0) {
    auto store = Store::open_private({memory, disk});
    store->assume_exclusive();
    return store;
}
}  // namespace

TEST(what_is_put_can_be_got_until_it_is_removed) {
    auto store = fresh();
    const Space space = store->open_namespace(0, "default", 1, {});
    CHECK(get(*store, space, "a") == "(absent)");
    CHECK(put(*store, space, "a", "one") == Published::stored);
    CHECK(get(*store, space, "a") == "one");
    put(*store, space, "a", "two, and longer");
    CHECK(get(*store, space, "a") == "two, and longer");
    CHECK(store->remove(space, bytes_of("a")).present);
    CHECK(!store->remove(space, bytes_of("a")).present);
    CHECK(get(*store, space, "a") == "(absent)");
    CHECK(store->stats().pins == 0 && store->stats().reservations == 0);
}

TEST(a_long_key_is_compared_in_full) {
    auto store = fresh();
    const Space space = store->open_namespace(0, "default", 1, {});
    std::string one(1024, 'k'), other = one;
    other.back() = 'x';
    put(*store, space, one, "one");
    put(*store, space, other, "other");
    CHECK(get(*store, space, one) == "one");
    CHECK(get(*store, space, other) == "other");
    const u64 used = store->stats().memory.used;
    for (int i = 0; i < 100; ++i) put(*store, space, one, "again");
    CHECK(store->stats().memory.used == used);
}

TEST(it_agrees_with_a_map_under_eviction_of_nothing) {
    auto store = fresh(8 << 20);
    const Space space = store->open_namespace(0, "default", 1, {});
    std::unordered_map<std::string, std::string> model;
    std::mt19937 random(3);
    for (int step = 0; step < 20000; ++step) {
        const std::string key = "key " + std::to_string(random() % 500);
        switch (random() % 4) {
            case 0:
            case 1: {
                const std::string value(random() % 3000, static_cast<char>(random()));
                put(*store, space, key, value);
                model[key] = value;
                break;
            }
            case 2: {
                const auto found = model.find(key);
                CHECK(get(*store, space, key) == (found == model.end() ? "(absent)" : found->second));
                break;
            }
            default: CHECK(store->remove(space, bytes_of(key)).present == (model.erase(key) > 0));
        }
    }
    CHECK(store->usage(space.id).first == model.size());
    CHECK(store->stats().evictions == 0);
}

TEST(the_least_recently_used_leaves_first_across_shards) {
    auto store = fresh(1 << 20);
    const Space space = store->open_namespace(0, "default", 1, {});
    const std::string value(100 << 10, 'v');
    for (int i = 0; i < 9; ++i) put(*store, space, std::to_string(i), value);
    CHECK(get(*store, space, "0") == value);
    put(*store, space, "new", value);
    CHECK(get(*store, space, "0") == value);
    CHECK(get(*store, space, "1") == "(absent)");
    CHECK(get(*store, space, "2") == value);
}

TEST(a_pinned_record_stays_through_overwriting_removal_and_pressure) {
    auto store = fresh(1 << 20);
    const Space space = store->open_namespace(0, "default", 1, {});
    put(*store, space, "a", std::string(300 << 10, 'a'));
    {
        Pin pin;
        CHECK(store->acquire(space, bytes_of("a"), pin, nullptr, nullptr) == Lookup::hit);
        put(*store, space, "a", std::string(300 << 10, 'b'));
        store->remove(space, bytes_of("a"));
        for (int i = 0; i < 20; ++i) put(*store, space, std::to_string(i), std::string(200 << 10, 'c'));
        CHECK(std::string(reinterpret_cast<const char*>(pin.value()), pin.size()) == std::string(300 << 10, 'a'));
    }
    CHECK(store->stats().pins == 0);
    for (int i = 0; i < 20; ++i) store->remove(space, bytes_of(std::to_string(i)));
    CHECK(store->stats().memory.used == 0);
}

TEST(an_overwrite_takes_the_block_of_the_version_before) {
    auto store = fresh(1 << 20);
    const Space space = store->open_namespace(0, "default", 1, {});
    std::set<const u8*> places;
    for (int i = 0; i < 10; ++i) {
        put(*store, space, "key", std::string(1000, static_cast<char>('a' + i)));
        Pin pin;
        CHECK(store->acquire(space, bytes_of("key"), pin, nullptr, nullptr) == Lookup::hit);
        places.insert(pin.value());
    }
    CHECK(places.size() == 2);  // one holds the value while the next is filled
    CHECK(get(*store, space, "key") == std::string(1000, 'j'));
}

TEST(blocks_kept_for_the_next_puts_are_free_memory_to_everybody_else) {
    auto store = fresh(1 << 20);
    const Space space = store->open_namespace(0, "default", 1, {});
    for (int i = 0; i < 200; ++i) put(*store, space, std::to_string(i), std::string(4000, 'a'));
    for (int i = 0; i < 200; ++i) store->remove(space, bytes_of(std::to_string(i)));
    put(*store, space, "large", std::string(900 << 10, 'b'));  // no room beside any of them
    CHECK(store->stats().evictions == 0);
    store->remove(space, bytes_of("large"));
    CHECK(store->stats().memory.used == 0);
    CHECK(store->stats().memory.free_runs == 1);
}

TEST(once_memory_is_full_each_put_makes_room_for_the_next_large_block) {
    auto store = fresh(64 << 20);
    const Space space = store->open_namespace(0, "default", 1, {});
    std::mt19937 random(5);
    auto size = [&] { return random() % 4 ? 1000 + random() % 60000 : 900000; };
    for (int i = 0; i < 2000; ++i) put(*store, space, "full " + std::to_string(i), std::string(size(), 'x'));
    int waited = 0;
    for (int i = 0; i < 400; ++i) {
        const u64 before = store->stats().evictions;
        auto reservation = store->reserve(space, bytes_of("key " + std::to_string(i)), 900000, {}, true);
        waited += store->stats().evictions != before;  // for others to leave
        store->publish(*reservation);
    }
    CHECK(waited < 20);
    CHECK(store->stats().evictions > 400);
    CHECK(store->stats().utilisation() > 0.85);
}

TEST(when_all_is_pinned_a_put_is_refused_with_figures) {
    auto store = fresh(1 << 20);
    const Space space = store->open_namespace(0, "default", 1, {});
    Pin pins[3];
    for (int i = 0; i < 3; ++i) {
        put(*store, space, std::to_string(i), std::string(300 << 10, 'a'));
        CHECK(store->acquire(space, bytes_of(std::to_string(i)), pins[i], nullptr, nullptr) == Lookup::hit);
    }
    CHECK_THROWS(TierFull, put(*store, space, "more", std::string(300 << 10, 'a')));
    CHECK_THROWS(TierFull, put(*store, space, "huge", std::string(3 << 20, 'a')));
    pins[1] = Pin();
    pins[1] = Pin();
    put(*store, space, "more", std::string(300 << 10, 'a'));
    CHECK(get(*store, space, "1") == "(absent)");
}

TEST(clearing_and_versions_make_the_older_unreachable) {
    auto store = fresh();
    const Space space = store->open_namespace(0, "n", 1, {});
    put(*store, space, "a", "one");
    store->clear(space);
    CHECK(get(*store, space, "a") == "(absent)");
    put(*store, space, "a", "two");
    const Space newer = store->open_namespace(0, "n", 2, {});
    CHECK(get(*store, newer, "a") == "(absent)");
    CHECK(get(*store, space, "a") == "(absent)");
    CHECK_THROWS(VersionConflict, put(*store, space, "a", "late"));
    CHECK_THROWS(VersionConflict, store->open_namespace(0, "n", 1, {}));
    NamespaceOptions immutable;
    immutable.immutable = true;
    CHECK_THROWS(ConfigMismatch, store->open_namespace(0, "n", 2, immutable));
}

TEST(an_expired_record_is_not_returned) {
    auto store = fresh();
    const Space space = store->open_namespace(0, "default", 1, {});
    put(*store, space, "a", "old", 1);
    CHECK(get(*store, space, "a") == "(absent)");
    put(*store, space, "a", "new", ~u64{0});
    CHECK(get(*store, space, "a") == "new");
}

TEST(a_namespace_keeps_to_its_quota) {
    auto store = fresh();
    NamespaceOptions options;
    options.quota = 256 << 10;
    const Space small = store->open_namespace(0, "small", 1, options);
    const Space other = store->open_namespace(0, "other", 1, {});
    put(*store, other, "a", "kept");
    for (int i = 0; i < 100; ++i) put(*store, small, std::to_string(i), std::string(20 << 10, 's'));
    CHECK(store->usage(small.id).second <= options.quota);
    CHECK(get(*store, other, "a") == "kept");
    CHECK_THROWS(TierFull, put(*store, small, "big", std::string(300 << 10, 's')));
}

TEST(the_longest_prefix_ends_at_the_first_absent_key) {
    auto store = fresh();
    const Space space = store->open_namespace(0, "default", 1, {});
    std::vector<std::string> keys;
    for (int i = 0; i < 3000; ++i) {
        keys.push_back("block " + std::to_string(i));
        put(*store, space, keys.back(), "x");
    }
    auto match = [&] { return store->contains_prefix(space, keys.size(), [&](size_t i) { return bytes_of(keys[i]); }); };
    CHECK(match() == 3000);
    store->remove(space, bytes_of(keys[1234]));
    CHECK(match() == 1234);
}

TEST(an_immutable_record_is_stored_once) {
    auto store = fresh();
    NamespaceOptions options;
    options.immutable = true;
    const Space space = store->open_namespace(0, "blocks", 1, options);
    CHECK(put(*store, space, "a", "first") == Published::stored);
    CHECK(put(*store, space, "a", "second") == Published::present);
    CHECK(store->present_immutable(space, bytes_of("a")));
    CHECK(get(*store, space, "a") == "first");
}

TEST(a_dirty_record_stays_until_it_is_written_and_then_is_found_below) {
    auto store = fresh(1 << 20, 1 << 30);
    const Space space = store->open_namespace(0, "default", 1, {});
    const std::string value(200 << 10, 'd');
    put(*store, space, "a", value);
    std::string record;
    {
        auto dirty = store->take_dirty(10, 1 << 30, 0);
        CHECK(dirty.size() == 1 && store->still_live(dirty[0]));
        record.assign(reinterpret_cast<const char*>(dirty[0].pin.record()), dirty[0].pin.record_size());
        store->settle(dirty[0], 7, 8192);
    }
    for (int i = 0; i < 8; ++i) {
        put(*store, space, std::to_string(i), value);
        for (auto& dirty : store->take_dirty(10, 1 << 30, 0)) store->settle(dirty, 7, 0);
    }
    CHECK(get(*store, space, "a") == "(absent)");
    const auto where = store->locate(space, bytes_of("a"));
    if (!CHECK(where.has_value())) return;
    CHECK(where->segment == 7 && where->offset == 8192 && where->length == record.size());
    auto loading = store->begin_load(space, bytes_of("a"), *where);
    std::memcpy(loading->block.bytes(), record.data(), record.size());
    CHECK(store->commit_load(*loading));
    CHECK(get(*store, space, "a") == value);
    auto damaged = store->begin_load(space, bytes_of("a"), *where);
    std::memcpy(damaged->block.bytes(), record.data(), record.size());
    damaged->block.bytes()[5000] ^= 1;
    CHECK_THROWS(CorruptRecord, store->commit_load(*damaged));
    CHECK_THROWS(CorruptRecord, store->commit_load(*damaged, crc32c(0, value.data(), value.size()) ^ 1));
    CHECK(store->remove(space, bytes_of("a")).on_disk);
    CHECK(store->stats().dirty_bytes == 0);
    CHECK(store->stats().pins == 0);
}

TEST(rows_of_a_catalog_are_found_until_their_segment_goes) {
    auto store = fresh(1 << 20, 1 << 30);
    store->restore_namespace(5, "kept", 3, 4, false);
    const Space space = store->open_namespace(5, "kept", 3, {});
    for (int i = 0; i < 20000; ++i) {
        const std::string key = "some key of more than thirty-two bytes " + std::to_string(i);
        CHECK(store->insert_disk({5, bytes_of(key), 1u + static_cast<u32>(i), 1u + static_cast<u32>(i) % 2, 64, 128, 0, 3, 4, 0}) || i > 6000);
    }
    const std::string stale = "stale";
    store->insert_disk({5, bytes_of(stale), 9, 1, 64, 128, 0, 3, 3, 0});
    CHECK(!store->contains(space, bytes_of(stale)));
    CHECK(store->contains(space, bytes_of("some key of more than thirty-two bytes 100")));
    CHECK(store->drop_segment(1) > 0);
    CHECK(!store->contains(space, bytes_of("some key of more than thirty-two bytes 100")));
    CHECK(store->contains(space, bytes_of("some key of more than thirty-two bytes 101")));
    store->drop_segment(2);
    CHECK(store->stats().entries == 0 && store->stats().memory.used == 0);
}

// ---- One at a time ------------------------------------------------------------------------------

TEST(a_record_is_brought_up_by_one_at_a_time) {
    auto store = fresh(4 << 20, 1 << 30);
    const Space space = store->open_namespace(1, "default", 1, {});
    const std::string key = "key";
    DiskRow row{space.id, bytes_of(key), 7, 1, 0, 128, 0, 1, 1, 0, {}};
    CHECK(store->insert_disk(row));
    const auto where = store->locate(space, bytes_of("key"));
    if (!CHECK(where.has_value())) return;
    {
        LoadClaim first, second;
        CHECK(store->claim_load(*where, false, first));
        CHECK(!store->claim_load(*where, false, second));
    }
    LoadClaim third;
    CHECK(store->claim_load(*where, false, third));
    LoadClaim impatient;
    CHECK(store->claim_load(*where, true, impatient));
    store->remove(space, bytes_of("key"));
    LoadClaim late;
    CHECK(!store->claim_load(*where, true, late));
}

TEST(a_value_is_promised_by_one_at_a_time) {
    auto store = fresh();
    const Space space = store->open_namespace(0, "default", 1, {}), other = store->open_namespace(0, "other", 1, {});
    const auto token = store->promise(space, bytes_of("key"), 60'000);
    CHECK(token.has_value());
    CHECK(!store->promise(space, bytes_of("key"), 60'000));
    const auto fetching = store->promise(space, bytes_of("key"), 60'000, Store::Promised::fetch);
    CHECK(fetching.has_value());
    CHECK(!store->promise(space, bytes_of("key"), 60'000, Store::Promised::fetch));
    store->withdraw(space, bytes_of("key"), *fetching, Store::Promised::fetch);
    CHECK(!store->promise(space, bytes_of("key"), 60'000));
    CHECK(store->promise(other, bytes_of("key"), 60'000).has_value());
    store->withdraw(space, bytes_of("key"), *token + 1000);  // another's
    CHECK(!store->promise(space, bytes_of("key"), 60'000));
    store->withdraw(space, bytes_of("key"), *token);
    CHECK(store->promise(space, bytes_of("key"), 0).has_value());  // has run out at once
    CHECK(store->promise(space, bytes_of("key"), 60'000).has_value());
}

TEST(lazy_records_are_written_when_they_are_to_leave_and_not_before) {
    auto store = fresh(1 << 20, 1 << 30);
    const Space space = store->open_namespace(0, "default", 1, {.write_back = true});
    for (int i = 0; i < 8; ++i) put(*store, space, std::to_string(i), std::string(100 << 10, 'a'));
    CHECK(store->take_dirty(100, 1 << 30, 0).empty());
    CHECK(!store->reserve(space, bytes_of("more"), 500 << 10, {}, false).has_value());  // it would have to wait
    auto dirty = store->take_dirty(100, 1 << 30, 0);
    CHECK(!dirty.empty());
    for (auto& record : dirty) store->settle(record, 1, 4096);
    CHECK(store->reserve(space, bytes_of("more"), 100 << 10, {}, false).has_value());
    store->write_lazy();
    CHECK(store->stats().dirty_bytes == (8 - dirty.size()) * (104u << 10));
}

TEST(postponed_records_may_leave_memory_and_are_written_again_until_then) {
    auto store = fresh(1 << 20, 1 << 30);
    const Space space = store->open_namespace(0, "default", 1, {});
    const auto postpone = [&] {
        auto dirty = store->take_dirty(100, 1 << 30, 0);
        for (auto& record : dirty) store->settle(record, 0, 0, 0, true);
        return dirty.size();
    };
    for (int i = 0; i < 8; ++i) put(*store, space, std::to_string(i), std::string(100 << 10, 'a'));
    CHECK(postpone() == 8);
    CHECK(store->stats().dirty_bytes == 0);
    store->write_lazy();
    CHECK(store->take_dirty(100, 1 << 30, 0).empty());  // they aren't lazy
    const std::string name = "0";
    const Key first = bytes_of(name);
    CHECK(store->wait_until_durable(space, 1, &first, 0.01) == 1);  // at once, and without trying again
    CHECK(store->take_dirty(100, 1 << 30, 0).empty());

    CHECK(store->reserve(space, bytes_of("more"), 500 << 10, {}, false).has_value());  // nothing has to wait
    CHECK(get(*store, space, "0") == "(absent)");
    put(*store, space, "7", "newer");
    CHECK(store->write_postponed(1) == 1);
    auto oldest = store->take_dirty(100, 1 << 30, 0);
    CHECK(oldest.size() == 2);  // "newer" has been waiting
    for (auto& record : oldest) store->settle(record, 1, 4096);
    size_t left = 0, at_once;
    while ((at_once = store->write_postponed(1 << 30))) {
        CHECK(store->stats().dirty_bytes <= (1 << 20) / 8);
        auto dirty = store->take_dirty(100, 1 << 30, 0);
        CHECK(dirty.size() == at_once);
        for (auto& record : dirty) store->settle(record, 1, 4096);
        left += at_once;
    }
    CHECK(left > 0 && left < 6);
    CHECK(store->stats().dirty_bytes == 0);
}

TEST(the_hottest_are_those_that_were_used_last) {
    auto store = fresh();
    const Space space = store->open_namespace(0, "default", 1, {});
    for (int i = 0; i < 50; ++i) put(*store, space, std::to_string(i), "value");
    CHECK(get(*store, space, "7") == "value");
    const auto hottest = store->hottest(3);
    CHECK(hottest.size() == 3);
    CHECK(std::string(hottest[0].key.begin(), hottest[0].key.end()) == "7");
    CHECK(std::string(hottest[1].key.begin(), hottest[1].key.end()) == "49");
    CHECK(store->hottest(1000).size() == 50);
}
