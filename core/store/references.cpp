// What entries refer to: their place in an order, and their blocks of memory, which are freed when they go. Where somebody holds a
// lock for too long, a block, a slot or a zombie is put off, and nothing fails for that.
#include "base/failpoints.hpp"
#include "store.hpp"

namespace kvstrata {

void Store::put_in_order(Namespace& ns, u32 at, u32 depth) {
    index_.nodes()[at].stamp = header_.tick.fetch_add(1, std::memory_order_relaxed);
    policy_of(ns).insert(order_of(ns), at, depth);
    if (ns.order.room && ns.order.count > ns.order.room) ns.hungry.store(1, std::memory_order_relaxed);
    ns.count(u64{index_.entry(at).units} * kUnit, 1);
}

void Store::take_from_order(Namespace& ns, u32 at, bool evicted) {
    policy_of(ns).remove(order_of(ns), at, evicted);
    ns.count(-(u64{index_.entry(at).units} * kUnit), ~u64{0});
}

// Takes an entry out of the table; it goes at once, or with its last pin.
void Store::drop(u32 at) {
    index_.unlink(at, EntryState::zombie);
    if (index_.entry(at).pins == 0) bury(at);
}

// When no slot is left for its blocks, it stays a zombie until there is one.
void Store::bury(u32 at) {
    Entry& entry = index_.entry(at);
    try {
        if (entry.memory) free_memory(at, take_departure());
        if (entry.key_len > kInlineKey && entry.key_block)
            release_through(&Entry::key_block, at, static_cast<u32>(align_up(entry.key_len, kUnit) / kUnit), take_departure());
    } catch (const TierUnavailable&) {
        unburied_.store(true);
        return;
    }
    index_.free_entry(at);
}

// Does what a lock that somebody held for too long kept this process from. Holds no lock before.
void Store::do_what_was_put_off() {
    free_put_off();
    clients_.pins_put_off.retry([this](u32 slot) { return unpin(slot, clients_.mine().pins[slot].load()); });
    if (!unburied_.exchange(false)) return;
    try {
        for (u32 number = 0; number < kShards; ++number) {
            const RobustLock held = index_.lock(number);
            index_.each_of(number, [&](u32 at, const Entry& entry) {
                if (entry.state == EntryState::zombie && entry.pins == 0) bury(at);
            });
        }
    } catch (const TierUnavailable&) {
        unburied_.store(true);
        throw;
    }
}

// Frees the block that a field of the entry refers to. Written down as in flight before the reference goes.
void Store::release_through(u32 Entry::* reference, u32 at, u32 units, u32 slot) {
    InFlight& flight = clients_.mine().in_flight[slot];
    flight.units = units;
    flight.entry = at;
    KVSTRATA_COMMIT("store.leaving");
    flight.block = index_.entry(at).*reference;
    KVSTRATA_COMMIT("store.left");
    index_.entry(at).*reference = kNone;
    KVSTRATA_COMMIT("store.gone");
    flight.entry = kNone;
    allocator_.set_owner(flight.block, units, kNone);
    if (!kDebug && clients_.spares.keep(slot, units)) {  // debug builds look at what is freed
        fetch_to_write(region_->data() + u64{flight.block} * kUnit, units);  // by the next put
        return;
    }
    free_block(slot);
}

void Store::free_memory(u32 at, u32 slot) { release_through(&Entry::memory, at, index_.entry(at).units, slot); }

// ---- Blocks -------------------------------------------------------------------------------------

void Store::abort_block(u32 slot) noexcept {
    if (clients_.self() == ~0u) return;
    clients_.no_spare_any_more(slot);
    free_block(slot);
}

// Frees the block in an in-flight slot, and gives the slot back; later, when the allocator's lock can't be had: then false.
bool Store::free_block(u32 slot) noexcept {
    try {
        allocator_.release(clients_.self(), slot);
    } catch (...) {
        clients_.blocks_put_off.add(slot);
        return false;
    }
    clients_.give_back(slot);
    return true;
}

// Frees what was put off. Throws when the allocator's lock still can't be had.
void Store::free_put_off() {
    if (!clients_.blocks_put_off.retry([this](u32 slot) { return free_block(slot); }))
        throw TierUnavailable("another process holds the allocator's lock for too long; is it stopped?");
}

// A slot for a block on its way out: taken before anything changes of the entry that it leaves.
u32 Store::take_departure() {
    if (const auto slot = clients_.departures.try_take()) return *slot;
    free_put_off();
    return clients_.departures.take();
}

}  // namespace kvstrata
