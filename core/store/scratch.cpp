// Orders: which policy runs one, its scratch memory, and how it is rebuilt.
//
// Scratch memory of all namespaces lies in one part of the mapping that has more address space than memory. Who has which
// part of it is written in the namespaces alone, so nothing can be lost: a new part is whatever lies between those in
// use. It grows with the number of records.
#include <algorithm>

#include "base/failpoints.hpp"
#include "store.hpp"

namespace kvstrata {
namespace {
constexpr u32 kLeastRoom = 64;  // records
}

// The namespace is to have another policy. Admin and policy are locked.
void Store::change_policy(u32 id) {
    Namespace& ns = space(id);
    const u64 old_at = ns.scratch_at, old_bytes = ns.scratch_bytes;
    ns.acting = kPlainPolicy;
    ns.scratch_bytes = 0;
    reorder(id);
    if (old_bytes) region_->give_back(old_at, old_bytes);
    give_scratch(id);
}

// More scratch memory for an order that has outgrown its own. A failure costs nothing but the quality of decisions.
void Store::feed_policy(u32 id) {
    try {
        const RobustLock held(header_.admin, [] {});
        const RobustLock policy_held = lock_policy(id);
        if (space(id).hungry.exchange(0)) give_scratch(id);
    } catch (const TierUnavailable&) {
        // Who holds the lock for so long is stopped. A later put tries again.
    }
}

// Admin and policy are locked.
void Store::give_scratch(u32 id) {
    Namespace& ns = space(id);
    const Policy& policy = policy_by_number(ns.policy);
    const u32 room = std::max(kLeastRoom, std::bit_ceil(ns.order.count + 1));
    const u64 bytes = align_up(policy.scratch_for(ns.order, room), kPage);
    const bool takes_over = ns.acting != ns.policy;
    u64 at = 0;
    if (bytes > ns.scratch_bytes) {
        if (!find_scratch(bytes, at)) {
            ns.order.room = room;  // not before there are more again
            return;
        }
        if (!takes_over) {
            ns.order.room = room;
            policy.move(order_of(ns), region_->at(at), bytes);
        }
        const u64 old_at = ns.scratch_at, old_bytes = ns.scratch_bytes;
        ns.scratch_bytes = 0;
        KVSTRATA_COMMIT("scratch.left");
        ns.scratch_at = at;
        KVSTRATA_COMMIT("scratch.placed");
        ns.scratch_bytes = bytes;
        if (old_bytes) region_->give_back(old_at, old_bytes);
    }
    if (takes_over) {
        ns.acting = ns.policy;
        reorder(id);
    }
    ns.order.room = bytes ? room : 0;
}

// A part of the scratch memory that is in nobody's hands, with memory behind it. The admin lock is held.
bool Store::find_scratch(u64 bytes, u64& at) const {
    std::vector<std::pair<u64, u64>> taken;
    for (u32 id = 1; id < header_.namespaces.load(); ++id)
        if (const Namespace& ns = namespaces_[id]; ns.scratch_bytes) taken.emplace_back(ns.scratch_at, ns.scratch_bytes);
    taken.emplace_back(header_.pages_at, 0);
    std::sort(taken.begin(), taken.end());
    at = header_.scratch_at;
    for (const auto& [start, length] : taken) {
        if (start - at >= bytes) {
            try {
                region_->back(at, bytes);
                return true;
            } catch (const OsError&) {
                return false;
            }
        }
        at = start + length;
    }
    return false;
}

// Puts the namespace's records in memory in order again, by their last access. The policy is locked.
void Store::reorder(u32 id) {
    Namespace& ns = space(id);
    if (ns.acting != kPlainPolicy && !ns.scratch_bytes && policy_of(ns).scratch_for({}, kLeastRoom)) ns.acting = kPlainPolicy;
    std::vector<std::pair<u32, u32>> by_age;  // age and entry
    const u32 now = header_.tick.load();
    u64 bytes = 0;
    for (u32 shard = 0; shard < kShards; ++shard) {
        const RobustLock held = index_.lock(shard);
        index_.each_of(shard, [&](u32 at, const Entry& entry) {
            if (entry.state != EntryState::live || entry.ns != id || !entry.memory) return;
            by_age.emplace_back(now - entry.node.stamp, at);
            bytes += u64{entry.units} * kUnit;
        });
    }
    std::sort(by_age.rbegin(), by_age.rend());
    ns.order.room = std::max(kLeastRoom, ns.order.room);
    ns.order.unit_bytes = kUnit;
    policy_of(ns).reset(order_of(ns));
    for (const auto& [age, at] : by_age) policy_of(ns).insert(order_of(ns), at, Policy::kSameDepth);
    ns.bytes.store(bytes);
    ns.records.store(by_age.size());
    if (ns.acting != ns.policy) ns.hungry.store(1);
}

// After a death inside.
void Store::repair_policy(u32 id) {
    header_.rebuilt_policies.fetch_add(1);
    reorder(id);
}

}  // namespace kvstrata
