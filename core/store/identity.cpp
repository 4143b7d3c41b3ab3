// Copies of values that are kept outside of the cache, and whether they are still true.
#include <algorithm>
#include <cstring>

#include "base/clock.hpp"
#include "store.hpp"

namespace kvstrata {

Identity Store::identify(u32 at) const {
    const Entry& entry = index_.entry(at);
    Identity identity;
    identity.mapping = header_.secret[0];
    identity.seq = entry.seq;
    identity.expires = entry.expires;
    identity.entry = at;
    identity.epoch = entry.epoch;
    std::memcpy(identity.tags, entry.tags, sizeof identity.tags);
    return identity;
}

bool Store::outlived(const Identity& identity) const {
    return (identity.expires && now_ms() >= identity.expires) ||
           (identity.tags[0] && any_removed(identity.tags, identity.seq));
}

// A quarter of what the namespace has in memory: long before the order comes round.
bool Store::fades(Space wanted, u32 stamp) const {
    const u64 records = space(wanted.id).records.load(std::memory_order_relaxed);
    return tick() - stamp > records / 4;
}

// The clock stands still meanwhile: copies that only refresh each other's records must not make each other fade.
u32 Store::refresh(Space wanted, const Identity& identity) {
    const u32 now = tick();
    Namespace& ns = space(wanted.id);
    const RobustMutex::Result result = ns.mutex.try_lock_for_a_moment();
    if (result == RobustMutex::Result::busy) return now;
    if (result == RobustMutex::Result::locked && in_order(wanted.id, {identity.entry, identity.seq})) {
        index_.nodes()[identity.entry].stamp = now;
        policy_of(ns).hit(order_of(ns), identity.entry);
    }
    ns.mutex.unlock();
    return now;
}

}  // namespace kvstrata
