// Finding records, reading them, and telling the policy of it.
#include <cstring>

#include "base/clock.hpp"
#include "base/failpoints.hpp"
#include "store.hpp"

namespace kvstrata {

bool Store::current(const Entry& entry, const Namespace& ns) const {
    return entry.epoch == ns.epoch.load(std::memory_order_relaxed) && (!entry.expires || now_ms() < entry.expires) &&
           (!entry.tags[0] || !any_removed(entry.tags, entry.seq));
}

// ---- Uses ---------------------------------------------------------------------------------------

void Uses::tell() {
    if (hit_count_) store_.tell(*this);
    Client& client = store_.clients_.mine();
    if (hit_count_) client.hits.fetch_add(hit_count_, std::memory_order_relaxed);
    if (misses_) client.misses.fetch_add(misses_, std::memory_order_relaxed);
    hit_count_ = misses_ = 0;
}

// Whether the record is still in the order of the namespace, whose policy is locked: then nothing of it changes. Of one that
// isn't, anything may be changing right now; then it has another number, or isn't the namespace's.
[[gnu::no_sanitize("thread"), gnu::noinline]] bool Store::in_order(u32 id, const Uses::Hit& hit) const {
    const Entry& entry = index_.entry(hit.entry);
    return entry.seq == hit.seq && entry.ns == id && entry.memory && entry.state == EntryState::live;
}

void Store::tell(Uses& uses) {
    const u32 id = uses.space_.id, count = uses.hit_count_;
    Namespace& ns = space(id);
    const RobustMutex::Result result = ns.mutex.try_lock_for_a_moment();
    if (result == RobustMutex::Result::busy) return;
    if (result == RobustMutex::Result::locked) {  // else who waits for it next repairs it
        for (u32 i = 0; count > 1 && i < count; ++i) {
            __builtin_prefetch(&index_.nodes()[uses.hits_[i].entry]);
            __builtin_prefetch(&index_.entry(uses.hits_[i].entry));
        }
        for (u32 i = 0; count > 1 && i < count; ++i) {  // what it takes to move them in a list
            const PolicyNode& node = index_.nodes()[uses.hits_[i].entry];
            __builtin_prefetch(&index_.nodes()[node.prev]);
            __builtin_prefetch(&index_.nodes()[node.next]);
        }
        const u32 tick = header_.tick.fetch_add(count, std::memory_order_relaxed);
        for (u32 i = 0; i < count; ++i) {
            const Uses::Hit& hit = uses.hits_[i];
            if (!in_order(id, hit)) continue;
            index_.nodes()[hit.entry].stamp = tick + i;
            policy_of(ns).hit(order_of(ns), hit.entry);
        }
    }
    ns.mutex.unlock();
}

// ---- Pins ---------------------------------------------------------------------------------------

// Pins the entry, whose shard is locked. `pin` was empty.
void Store::claim(u32 at, Lease& lease, Pin& pin) {
    clients_.mine().pins[lease.slot()].store(at, std::memory_order_relaxed);
    KVSTRATA_COMMIT("store.pin");
    ++index_.entry(at).pins;
    lease.keep();
    pin.store_ = this;
    pin.slot_ = lease.slot();
    pin.entry_ = at;
}

Lookup Store::acquire(Space wanted, Key key, u32 hash, Pin& pin, Small* small, Uses* uses) {
    Namespace& ns = space(wanted.id);
    std::optional<Lease> waited;  // for a slot, when all were taken
    for (;;) {
        {
            const RobustLock held = index_.lock(Index::shard_of(hash));
            const u32 at = index_.find(hash, wanted.id, key);
            if (!at || wanted.version != ns.version.load(std::memory_order_relaxed) || !current(index_.entry(at), ns)) {
                if (uses) ++uses->misses_;
                return Lookup::miss;
            }
            if (!index_.entry(at).memory) return Lookup::below;
            const u8* const record = region_->data() + u64{index_.entry(at).memory} * kUnit;
            if (small)  // where it is large, one line too many
                for (u32 line = 0; line < std::min(index_.entry(at).units, kFetched); ++line) __builtin_prefetch(record + line * kUnit);
            const auto& header = *reinterpret_cast<const RecordHeader*>(record);
            bool done = small && header.stored_len <= small->room;
            if (done) {
                small->size = header.stored_len;
                std::memcpy(small->to, record + header.payload_offset, small->size);
                // Uses of what isn't on its way down yet are all counted.
                if (small->identity && !(index_.entry(at).flags & kUnproven)) *small->identity = identify(at);
            } else if (waited) {
                claim(at, *waited, pin);
                done = true;
            } else if (const auto slot = clients_.pins.try_take()) {
                Lease lease(clients_.pins, *slot);
                claim(at, lease, pin);
                done = true;
            }
            if (done) {
                if (uses) {
                    uses->add({at, index_.entry(at).seq});
                    if (index_.entry(at).flags & kUnproven) use_unproven(at);
                    if (!(index_.entry(at).flags & kUsed)) index_.entry(at).flags |= kUsed;
                }
                return Lookup::hit;
            }
        }
        waited.emplace(clients_.pins);
    }
}

// False when the lock can't be had: then it is done later.
bool Store::unpin(u32 slot, u32 at) noexcept {
    if (clients_.self() == ~0u) return true;  // a forked child: the pin is the parent's
    try {
        const RobustLock held = index_.lock(index_.shard_holding(at));
        Entry& entry = index_.entry(at);
        clients_.mine().pins[slot].store(kNone, std::memory_order_relaxed);
        KVSTRATA_COMMIT("store.unpin");
        if (--entry.pins == 0 && entry.state == EntryState::zombie) bury(at);
    } catch (...) {
        clients_.pins_put_off.add(slot);
        return false;
    }
    clients_.pins.give_back(slot);
    return true;
}

Pin::~Pin() {
    if (store_) store_->unpin(slot_, entry_);
}

const u8* Pin::record() const { return store_->region_->view() + u64{store_->index_.entry(entry_).memory} * kUnit; }
u64 Pin::record_size() const { return u64{store_->index_.entry(entry_).units} * kUnit; }

bool Store::contains(Space wanted, Key key) {
    return contains_prefix(wanted, 1, [&](size_t) { return key; }) == 1;
}

bool Store::present_immutable(Space wanted, Key key) {
    Namespace& ns = space(wanted.id);
    if (!ns.immutable || wanted.version != ns.version.load()) return false;
    const u32 hash = index_.hash(wanted.id, key);
    Uses uses(*this, wanted);
    const RobustLock held = index_.lock(Index::shard_of(hash));
    const u32 at = index_.find(hash, wanted.id, key);
    if (!at || !current(index_.entry(at), ns)) return false;
    if (index_.entry(at).memory) uses.add({at, index_.entry(at).seq});
    return true;
}

}  // namespace kvstrata
