// Undoing what dead processes left behind, and counting what there is.
#include "store.hpp"

namespace kvstrata {

// Empties the slot of a dead client. The admin lock is held; nobody writes in the slot any more.
void Store::reap_client(u32 slot) {
    Client& dead = clients_[slot];
    header_.reaped_clients.fetch_add(1);
    for (auto& pin : dead.pins) {
        const u32 at = pin.load();
        if (!at) continue;
        // A repair of the shard, if it died in there, makes the sum of pins true before we take ours off.
        const RobustLock held = index_.lock(index_.shard_holding(at));
        Entry& entry = index_.entry(at);
        pin.store(kNone);
        if (entry.pins) --entry.pins;
        if (entry.pins == 0 && entry.state == EntryState::zombie) bury(at);
        header_.reaped_pins.fetch_add(1);
    }
    allocator_.usage();  // finishes what it died in, if it died in the allocator
    for (u32 number = 0; number < kInFlight; ++number) {
        InFlight& flight = dead.in_flight[number];
        if (!flight.block) continue;
        bool referenced = false;
        if (flight.entry) {
            const RobustLock held = index_.lock(index_.shard_holding(flight.entry));
            referenced = index_.refers_to(index_.entry(flight.entry), flight.block);
        }
        if (!flight.block) continue;  // a repair of the shard has found it to be the entry's
        if (referenced) {
            flight.block = kNone;
        } else {
            allocator_.release(slot, number);
            header_.reaped_blocks.fetch_add(1);
        }
    }
    sweep(slot);
    forget_promises(slot);
    dead.dirty_bytes.store(0);
    distrust_unsent(dead);
    clients_.settle_counts(dead);
    dead.used.store(0);
}

// Adopts what `dead_owner` should have written below, and buries what was left without pins.
void Store::sweep(u32 dead_owner) {
    const bool leaving = dead_owner == clients_.self();
    for (u32 number = 0; number < kShards; ++number) {
        std::vector<Waiting> adopted;
        {
            const RobustLock held = index_.lock(number);
            index_.each_of(number, [&](u32 at, Entry& entry) {
                if (entry.flags & kLoading && entry.owner == dead_owner) entry.flags &= static_cast<u8>(~kLoading);
                if (entry.state == EntryState::zombie && entry.pins == 0) bury(at);
                if (entry.state != EntryState::live || !(entry.flags & kDirty) || entry.owner != dead_owner) return;
                if (entry.flags & kWriting) index_.borrow(entry.hash);  // he may have got as far as the row of it
                if (leaving) {  // nobody will write it: it may leave memory all the same
                    entry.flags &= static_cast<u8>(~(kDirty | kWriting | kLazy));
                    return;
                }
                entry.flags &= static_cast<u8>(~kLazy);
                entry.owner = static_cast<u8>(clients_.self());
                clients_.mine().dirty_bytes.fetch_add(u64{entry.units} * kUnit);
                adopted.push_back({at, entry.units, entry.seq});
            });
        }
        for (const Waiting& waiting : adopted) enqueue_dirty(waiting);
    }
}

u32 Store::reap() {
    do_what_was_put_off();
    const RobustLock held(header_.admin, [] {});
    return reap_dead();
}

u32 Store::reap_dead() {
    u32 reaped = 0;
    for (u32 slot = 0; slot < kMaxClients; ++slot) {
        if (!clients_.is_dead(slot)) continue;
        reap_client(slot);
        ++reaped;
    }
    return reaped;
}

StoreStats Store::stats() {
    give_back_spares();
    StoreStats stats;
    for (u32 number = 0; number < kShards; ++number) {
        const RobustLock held = index_.lock(number);
        const Shard& shard = index_.shard(number);
        stats.puts += shard.puts;
        stats.deletes += shard.deletes;
        stats.evictions += shard.evictions;
        stats.expired += shard.expired;
        stats.demotions += shard.demotions;
        stats.entries += shard.count;
        stats.index_bytes += shard.backed * sizeof(u32);
    }
    stats.index_bytes += header_.entries_backed.load();
    stats.corrupt = header_.corrupt.load();
    stats.loads = header_.loads.load();
    stats.load_bytes = header_.load_bytes.load();
    stats.reaped_clients = header_.reaped_clients.load();
    stats.reaped_pins = header_.reaped_pins.load();
    stats.reaped_blocks = header_.reaped_blocks.load();
    stats.rebuilt_shards = header_.rebuilt_shards.load();
    stats.rebuilt_policies = header_.rebuilt_policies.load();
    stats.rebuilt_allocators = header_.rebuilt_allocators.load();
    stats.pins = clients_.pins.in_use();
    stats.reservations = clients_.blocks_arriving();
    stats.hits = header_.past_hits.load();
    stats.misses = header_.past_misses.load();
    for (u32 slot = 0; slot < kMaxClients; ++slot) {
        if (!clients_[slot].used.load()) continue;
        ++stats.clients;
        stats.hits += clients_[slot].hits.load();
        stats.misses += clients_[slot].misses.load();
        stats.dirty_bytes += clients_[slot].dirty_bytes.load();
    }
    for (u32 id = 1; id < header_.namespaces.load(); ++id) stats.record_bytes += namespaces_[id].bytes.load();
    stats.debts = index_.debts().figures();
    stats.memory = allocator_.usage();
    return stats;
}

}  // namespace kvstrata
