// What tiers may hold that the index knows nothing of: which of it can't be older than what was changed here.
//
// A change has a number. Before a process makes one, it writes the number that it will at least have into its slot, and
// takes it out once the tiers elsewhere have the change. Who asks such a tier notes low() first: what changed here below
// that number is there, so an answer can only be older than a change with that number or a higher one. Such an answer
// is refused. When a process dies before its changes have got there, the slots of the keys that it may have changed
// distrust all that was written there until then, plus the time by which clocks may differ.
#include <ctime>

#include "store.hpp"

namespace kvstrata {
namespace {

constexpr u64 kSkew = 10'000'000'000;  // ns by which the clocks of two hosts may differ

u64 now_ns() {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return static_cast<u64>(now.tv_sec) * 1'000'000'000 + static_cast<u64>(now.tv_nsec);
}

}  // namespace

void Store::watch() {
    const RobustLock held(header_.admin, [] {});
    if (header_.watched.load()) return;
    region_->back(header_.changes_at, kChangeSlots * sizeof(Changes));
    header_.watched.store(1);
}

u64 Store::last_change(Space wanted, Key key) const {
    return header_.watched.load() ? changes(index_.hash(wanted.id, key)).last.load() : 0;
}

u64 Store::last_change_of_all(Space wanted) const {
    return header_.watched.load() ? changes(index_.hash(wanted.id, {})).last.load() : 0;
}

u64 Store::low() const {
    // In this order: a change whose process isn't seen below gets a number from here on.
    u64 low = header_.seq.load();
    for (u32 slot = 0; slot < kMaxClients; ++slot) {
        if (!clients_[slot].used.load()) continue;
        if (const u64 from = clients_[slot].unsent.load()) low = std::min(low, from);
    }
    return low;
}

bool Store::trusts(Space wanted, u32 hash, const Promotion& promotion) const {
    const Namespace& ns = space(wanted.id);
    if (ns.epoch.load() != promotion.epoch || wanted.version != ns.version.load()) return false;
    if (!header_.watched.load()) return true;
    const Changes& changed = changes(hash);
    if (changed.last.load() >= promotion.low || last_change_of_all(wanted) >= promotion.low) return false;
    // Where the key implies the value, nothing can be older.
    return ns.immutable || promotion.written >= std::max(changed.distrust.load(), header_.distrusted.load());
}

void Store::distrust_unsent(Client& client) {
    const u64 from = client.unsent.load();
    if (!from) return;
    const u64 until = now_ns() + kSkew;
    Changes* const all = reinterpret_cast<Changes*>(region_->at(header_.changes_at));
    for (u32 slot = 0; slot < kChangeSlots; ++slot)
        if (all[slot].last.load() >= from) raise_to(all[slot].distrust, until);
    client.unsent.store(0);
}

u64 Store::distrusted() const {
    u64 latest = header_.distrusted.load();
    if (!header_.watched.load()) return latest;
    const Changes* const all = reinterpret_cast<const Changes*>(region_->at(header_.changes_at));
    for (u32 slot = 0; slot < kChangeSlots; ++slot) latest = std::max(latest, all[slot].distrust.load());
    return latest;
}

}  // namespace kvstrata
