// Threads over one mapping, through one attachment and through several: made for TSan.
#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "check.hpp"
#include "store_help.hpp"

using namespace kvstrata;
using namespace kvstrata::testing;

namespace {

// A value that tells which key it belongs to, from the first byte to the last.
std::string value_for(const std::string& key, u32 version, size_t size) {
    std::string value = key + "/" + std::to_string(version) + "/";
    while (value.size() < size) value += value;
    value.resize(std::max(size, key.size() + 1));
    return value;
}

bool belongs(const std::string& value, const std::string& key) {
    return value.size() > key.size() && value.compare(0, key.size(), key) == 0 && value[key.size()] == '/';
}

struct Worker {
    Store& store;
    Space space;
    std::atomic<int>& wrong;

    void run(unsigned seed, int steps) {
        std::mt19937 random(seed);
        for (int step = 0; step < steps; ++step) {
            const std::string key = "key " + std::to_string(random() % 300);
            switch (random() % 8) {
                case 0:
                case 1:
                case 2: put_one(key, value_for(key, random(), random() % 20000)); break;
                case 3: store.remove(space, bytes_of(key)); break;
                case 4: {
                    std::string keys[4];
                    for (auto& k : keys) k = "key " + std::to_string(random() % 300);
                    store.contains_prefix(space, 4, [&](size_t i) { return bytes_of(keys[i]); });
                    break;
                }
                default: {
                    const std::string got = get(store, space, key, key + "/");
                    if (!belongs(got, key)) wrong.fetch_add(1);
                }
            }
        }
    }

    void put_one(const std::string& key, const std::string& value) {
        try {
            put(store, space, key, value);
        } catch (const TierFull&) {
            // everything that could leave is pinned by the others at this moment
        }
    }
};

}  // namespace

TEST(threads_of_one_attachment_never_see_a_wrong_value) {
    auto store = Store::open_private({4 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 4; ++i)
        threads.emplace_back([&, i] { Worker{*store, space, wrong}.run(i, 4000); });
    for (auto& thread : threads) thread.join();
    CHECK(wrong == 0);
    const auto stats = store->stats();
    CHECK(stats.pins == 0 && stats.reservations == 0 && stats.memory.faults == 0);
    for (int i = 0; i < 300; ++i) store->remove(space, bytes_of("key " + std::to_string(i)));
    CHECK(store->stats().memory.used == 0 && store->stats().entries == 0);
}

TEST(several_attachments_share_what_each_of_them_puts) {
    auto store = Store::open_private({4 << 20, 0});
    const Space space = store->open_namespace(0, "default", 1, {});
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 3; ++i)
        threads.emplace_back([&, i] {
            const auto mine = store->attach_again();
            Worker{*mine, space, wrong}.run(i, 2500);
        });
    for (auto& thread : threads) thread.join();
    CHECK(wrong == 0);
    CHECK(store->stats().clients == 1);
    for (int i = 0; i < 300; ++i) store->remove(space, bytes_of("key " + std::to_string(i)));
    CHECK(store->stats().memory.used == 0);
}

// The limits are minutes: what doesn't end for the reason that is tested doesn't end in time.
TEST(a_batch_is_gathered_until_it_is_worth_it_or_somebody_waits) {
    auto store = Store::open_private({16 << 20, 1 << 30});
    const Space space = store->open_namespace(0, "default", 1, {});
    const auto gather = [&] { return store->take_dirty(8, 1 << 20, 600, 600); };
    const auto beside = [&](const auto& others) {
        std::vector<Dirty> taken;
        std::thread writer([&] { taken = gather(); });
        others();
        writer.join();
        return taken;
    };
    const auto settle = [&](std::vector<Dirty> taken) {
        for (auto& dirty : taken) store->settle(dirty, 1, 0);
        return taken.size();
    };
    const auto put_some = [&](int count, size_t bytes) {
        for (int i = 0; i < count; ++i) put(*store, space, std::to_string(i), std::string(bytes, 'a'));
    };
    CHECK(settle(beside([&] { put_some(8, 10); })) == 8);                  // as many as are taken at once
    CHECK(settle(beside([&] { put_some(3, 400 << 10); })) == 3);           // as many bytes
    CHECK(settle(beside([&] { put_some(1, 10), store->wake_writer(); })) <= 1);
    settle(store->take_dirty(8, 1 << 20, 0));
    put_some(1, 10);
    std::thread waits([&] { CHECK(store->wait_until_settled(600)); });
    CHECK(settle(gather()) == 1);
    waits.join();
    const Key first{reinterpret_cast<const u8*>("0"), 1};
    put_some(1, 10);
    std::thread waits_for_one([&] { CHECK(store->wait_until_durable(space, 1, &first, 600) == 0); });
    CHECK(settle(gather()) == 1);
    waits_for_one.join();
}

// The tier below is a map from offset to the record's bytes, as a disk would hold them.
TEST(a_writer_below_and_loads_from_below_run_beside_readers_and_deleters) {
    auto store = Store::open_private({2 << 20, 1 << 30});
    const Space space = store->open_namespace(0, "default", 1, {});
    std::atomic<int> wrong{0};
    std::atomic<bool> stop{false};
    std::mutex disk_mutex;
    std::vector<std::string> disk;
    std::thread writer([&] {
        while (!stop) {
            for (auto& dirty : store->take_dirty(64, 1 << 20, 0.01, 0.002)) {
                u64 offset;
                {
                    const std::lock_guard lock(disk_mutex);
                    offset = disk.size() * kUnit;
                    disk.emplace_back(reinterpret_cast<const char*>(dirty.pin.record()), dirty.pin.record_size());
                }
                store->still_live(dirty);
                store->settle(dirty, 1, offset);
            }
        }
    });
    std::atomic<int> loaded{0};
    auto load = [&](const std::string& key) {
        const auto where = store->locate(space, bytes_of(key));
        if (!where) return;
        auto loading = store->begin_load(space, bytes_of(key), *where);
        if (!loading) return;
        {
            const std::lock_guard lock(disk_mutex);
            const std::string& record = disk[where->offset / kUnit];
            std::memcpy(loading->block.bytes(), record.data(), record.size());
        }
        const Pin pin = store->commit_load(*loading);
        if (!pin) return;
        loaded.fetch_add(1);
        const std::string got(reinterpret_cast<const char*>(pin.value()), pin.size());
        if (!belongs(got, key)) wrong.fetch_add(1);
    };
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 3; ++i)
        threads.emplace_back([&, i] {
            Worker worker{*store, space, wrong};
            std::mt19937 random(i);
            for (int round = 0; round < 60; ++round) {
                worker.run(i * 1000 + static_cast<unsigned>(round), 40);
                for (int n = 0; n < 20; ++n) load("key " + std::to_string(random() % 300));
            }
        });
    for (auto& thread : threads) thread.join();
    CHECK(store->wait_until_settled(10));
    stop = true;
    writer.join();
    store->demote_all();
    for (int i = 0; i < 300; ++i) load("key " + std::to_string(i));
    CHECK(wrong == 0);
    CHECK(loaded > 0);
    const auto stats = store->stats();
    CHECK(stats.pins == 0 && stats.reservations == 0 && stats.dirty_bytes == 0 && stats.memory.faults == 0);
    store->drop_segment(1);
    for (int i = 0; i < 300; ++i) store->remove(space, bytes_of("key " + std::to_string(i)));
    CHECK(store->stats().memory.used == 0 && store->stats().entries == 0);
}
