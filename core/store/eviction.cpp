// Making room: what leaves the memory tier, and how long a writer waits for it.
#include <algorithm>
#include <chrono>
#include <thread>

#include "base/failpoints.hpp"
#include "store.hpp"

namespace kvstrata {
namespace {
constexpr u32 kTriesALock = 64;          // records looked at before the policy's lock is let go
constexpr u32 kWrittenAhead = 16384;     // units of lazy records that are written when one is to leave
constexpr double kPatience = 5;          // seconds a put waits for the tier below
constexpr double kHot = 5;               // how much worse it is to lose what was used just now than what is due to go
constexpr int kMostEvictions = 1 << 20;  // a bound on the loop that makes room for one block
constexpr u32 kAheadPart = 64;           // one in so many parts of the memory is kept free ahead, at most
constexpr u32 kFewestAhead = 2, kMostAhead = 64;  // records that leave for that after a put
constexpr u32 kAheadPause = 256;         // puts
}  // namespace

bool Store::may_leave(const Entry& entry) const {
    if (entry.pins) return false;
    return !(entry.flags & kDirty || entry.holder) || !current(entry, space(entry.ns));
}

// Takes out of memory what may leave. Policy and shard are locked.
void Store::leave_memory(u32 at) {
    Entry& entry = index_.entry(at);
    Namespace& ns = space(entry.ns);
    Shard& shard = index_.shard(index_.shard_holding(at));
    const bool there = current(entry, ns);
    if (there && entry.segment) {
        const u32 departure = take_departure();
        take_from_order(ns, at, true);
        ++shard.demotions;
        free_memory(at, departure);  // from now on only below
    } else {
        take_from_order(ns, at, true);
        ++(there ? shard.evictions : shard.expired);
        drop(at);
    }
}

// Asks whoever lives in that block to leave; false when it doesn't.
bool Store::vacate(Allocator::Resident resident) {
    const u32 shard = index_.shard_holding(resident.entry);
    const u32 id = index_.glimpse(resident.entry).ns;  // as a guess: which lock to take
    const RobustLock policy_held = lock_policy(id);
    const RobustLock held = index_.lock(shard);
    Entry& entry = index_.entry(resident.entry);
    if (entry.state != EntryState::live || entry.ns != id || !may_leave(entry)) return false;
    if (entry.memory == resident.block) {
        leave_memory(resident.entry);
    } else if (entry.key_len > kInlineKey && entry.key_block == resident.block) {
        if (may_be_on_disk(entry)) return false;  // would be lost below, too
        leave_index(resident.entry);
    }
    return true;
}

// Takes an entry out of the index, because its own place is needed. Policy and shard are locked.
void Store::leave_index(u32 at) {
    Entry& entry = index_.entry(at);
    if (may_be_on_disk(entry)) index_.borrow(entry.hash);
    KVSTRATA_COMMIT("store.forgotten");
    if (entry.memory) take_from_order(space(entry.ns), at, true);
    ++index_.shard(index_.shard_holding(at)).evictions;
    drop(at);
}

// Forgets some of what lies below only and whose keys take memory: of a part of the index, those used longest ago.
bool Store::evict_keys() {
    for (u32 tries = 0; tries < kShards; ++tries) {
        const u32 number = next_shard_.fetch_add(1) % kShards;
        const RobustLock held = index_.lock(number);
        std::vector<std::pair<u32, u32>> by_age;  // age and entry
        const u32 now = header_.tick.load();
        index_.each_of(number, [&](u32 at, const Entry& entry) {
            if (entry.state == EntryState::live && !entry.memory && !entry.pins && entry.key_len > kInlineKey)
                by_age.emplace_back(now - entry.node.stamp, at);
        });
        if (by_age.empty()) continue;
        const auto enough = by_age.begin() + static_cast<std::ptrdiff_t>(by_age.size() / 8);
        std::nth_element(by_age.begin(), enough, by_age.end(), std::greater<>());
        for (auto next = by_age.begin(); next <= enough; ++next) leave_index(next->second);
        return true;
    }
    return false;
}

// Empties the place of `victim` for a block of `units`, together with as much of its neighbourhood as that takes, so
// that a large block doesn't wait until by chance neighbours have left. Of the windows that are long enough and hold
// the victim, the one with the least in it that was used lately. False when there is none.
bool Store::clear_window(u32 victim, u32 units, bool guaranteed_too, Plan* plan) {
    u32 block, block_units, now = header_.tick.load(), oldest;
    {
        const RobustLock held = index_.lock(index_.shard_holding(victim));
        const Entry& entry = index_.entry(victim);
        if (entry.state != EntryState::live || !entry.memory) return true;  // somebody was quicker
        block = entry.memory;
        block_units = entry.units;
        oldest = std::max(1u, now - entry.node.stamp);
    }
    thread_local Allocator::Neighbourhood around;  // kept, so that making room takes no memory itself
    thread_local std::vector<double> costs;        // of the runs up to each: pages, up to kHot times when used lately
    thread_local std::vector<u32> stayers;         // residents of these runs that won't go
    allocator_.find_neighbours(block, block_units, units, around);
    const auto& runs = around.runs;
    if (runs.empty()) return vacate({victim, block});
    const u32 wanted = Allocator::pages_wanted(units);
    costs.assign(1, 0);
    stayers.assign(1, 0);
    size_t own = 0;
    for (size_t i = 0; i < runs.size(); ++i) {
        const auto& run = runs[i];
        if (u64{run.first} * kPage <= u64{block} * kUnit) own = i;
        double cost = 0;
        u32 staying = 0;
        const double share = static_cast<double>(run.length) / std::max(1u, run.to - run.from);
        for (u32 n = run.from; n < run.to; ++n) {
            const auto& resident = around.residents[n];
            if (!resident.entry) {
                ++staying;
                continue;
            }
            // Without its lock: a guess that is wrong is found out when it is asked to leave.
            const Entry entry = index_.glimpse(resident.entry);
            if (entry.state == EntryState::free) {
                cost += share;
            } else if (entry.state == EntryState::zombie || !may_leave(entry) || (plan && !plan->suits(resident.entry, entry.units, units)) ||
                       (entry.memory != resident.block && may_be_on_disk(entry))) {
                ++staying;
            } else if (current(entry, space(entry.ns))) {
                const double age = std::min(now - entry.node.stamp, oldest);
                cost += share * (kHot - (kHot - 1) * age / oldest);
                const Namespace& its = space(entry.ns);
                staying += !guaranteed_too && its.bytes.load() <= its.guarantee.load();
            } else {
                cost += share;
            }
        }
        costs.push_back(costs.back() + cost);
        stayers.push_back(stayers.back() + staying);
    }
    size_t best_from = 0, best_to = 0, to = own + 1;  // a window is [from, to)
    u64 pages = 0;
    for (size_t i = 0; i < to; ++i) pages += runs[i].length;
    for (size_t from = 0; from <= own; pages -= runs[from++].length) {
        for (; pages < wanted && to < runs.size(); ++to) pages += runs[to].length;
        if (pages < wanted) break;
        if (stayers[to] != stayers[from]) continue;
        if (!best_to || costs[to] - costs[from] < costs[best_to] - costs[best_from]) best_from = from, best_to = to;
    }
    if (!best_to) return false;
    for (size_t i = best_from; i < best_to; ++i)
        for (u32 n = runs[i].from; n < runs[i].to; ++n) {
            if (plan)
                plan->leaving.push_back(around.residents[n]);
            else
                vacate(around.residents[n]);
        }
    return true;
}

// Lets the policy's next victims leave until one has made room for a block of `units`, or at least gone; false when
// nothing of the namespace may leave.
bool Store::evict_from(u32 id, u32 units, bool guaranteed_too, Plan* plan) {
    Namespace& ns = space(id);
    u32 looked_at = 0, count = 1, written = 0;
    u32 victim = kNone;
    while (looked_at < count && !victim && written < kWrittenAhead) {
        const RobustLock policy_held = lock_policy(id);
        const Policy& policy = policy_of(ns);
        count = ns.order.count;
        for (u32 tries = 0; tries < kTriesALock && looked_at < count && !victim && written < kWrittenAhead; ++tries, ++looked_at) {
            const u32 at = policy.victim(order_of(ns));
            if (!at) return false;
            const RobustLock held = index_.lock(index_.shard_holding(at));
            if (!may_leave(index_.entry(at))) {
                if (is_lazy(index_.entry(at))) {
                    write_now(at);
                    written += index_.entry(at).units;
                }
                policy.spare(order_of(ns), at);
            } else if (!units) {
                leave_memory(at);
                return true;
            } else {
                victim = at;
            }
        }
    }
    if (!victim) return false;
    if (plan && !plan->suits(victim, index_.glimpse(victim).units, units)) return false;
    return clear_window(victim, units, guaranteed_too, plan) || evict_from(id, 0, guaranteed_too);
}

// Makes room for namespace `wanted`: first in namespaces that have more than they have been guaranteed. What others have been
// guaranteed is taken from them only where there is memory enough, but in pieces too small, and nobody else has any more.
bool Store::evict_one(u32 units, u32 wanted) {
    return evict_oldest(units, false) || evict_from(wanted, units, false) ||
           (allocator_.usage().free >= 2 * u64{units} * kUnit && evict_oldest(units, true));
}

// Makes room in the namespace whose victim was used longest ago.
bool Store::evict_oldest(u32 units, bool guaranteed_too, Plan* plan) {
    const u32 namespaces = header_.namespaces.load();
    std::vector<bool> refused(namespaces);
    for (;;) {
        u32 oldest = 0, oldest_age = 0;
        const u32 now = header_.tick.load();
        for (u32 id = 1; id < namespaces; ++id) {
            if (!namespaces_[id].defined.load() || !namespaces_[id].records.load() || refused[id]) continue;
            if (!guaranteed_too && namespaces_[id].guarantee.load() && namespaces_[id].bytes.load() <= namespaces_[id].guarantee.load()) continue;
            const RobustLock held = lock_policy(id);
            const u32 at = policy_of(namespaces_[id]).victim(order_of(namespaces_[id]));
            if (!at) continue;
            const u32 age = now - index_.nodes()[at].stamp;
            if (!oldest || age > oldest_age) {
                oldest = id;
                oldest_age = age;
            }
        }
        if (!oldest) return false;
        if (evict_from(oldest, units, guaranteed_too, plan)) return true;
        refused[oldest] = true;
    }
}

// After a put of `units`, whose entry is `stored`: lets as much leave as it took, so that the next large block finds its place
// empty instead of waiting for many records to leave. What is kept free is one piece as long as the largest block taken lately,
// and no more than a small part of the memory. It is made once for each such block that is taken: where small ones take it,
// the next large one waits, or else more and more would be kept free.
void Store::make_room_ahead(u32 stored, u32 units) {
    if (!ahead_.due.load(std::memory_order_relaxed)) return;
    const u32 wanted = std::min(ahead_.units.load(std::memory_order_relaxed), capacity_units_ / kAheadPart);
    if (Allocator::is_small(wanted)) return;
    const std::unique_lock held(ahead_.mutex, std::try_to_lock);
    if (!held) return;  // somebody else is at it
    if (ahead_.pause) {
        --ahead_.pause;
        return;
    }
    auto& leaving = ahead_.plan.leaving;
    if (leaving.empty()) {
        if (allocator_.has_room(wanted)) {
            ahead_.due.store(false, std::memory_order_relaxed);
            return;
        }
        give_back_spares();
        ahead_.plan.spared = stored;
        if (!evict_oldest(wanted, false, &ahead_.plan)) {
            ahead_.pause = kAheadPause;
            return;
        }
    }
    u64 freed = 0;
    for (u32 count = 0; !leaving.empty() && count < kMostAhead && (count < kFewestAhead || freed < units); ++count) {
        const Allocator::Resident next = leaving.back();
        leaving.pop_back();
        if (!next.entry || next.entry == stored) continue;
        const u32 size = index_.glimpse(next.entry).units;
        if (vacate(next)) freed += size;
    }
    if (leaving.empty()) ahead_.due.store(false, std::memory_order_relaxed);
}

u64 Store::demote_all() {
    u64 bytes = 0;
    for (u32 id = 1; id < header_.namespaces.load(); ++id) {
        const RobustLock policy_held = lock_policy(id);
        for (u32 number = 0; number < kShards; ++number) {
            const RobustLock held = index_.lock(number);
            index_.each_of(number, [&](u32 at, Entry& entry) {
                if (entry.state != EntryState::live || entry.ns != id || !entry.memory || !entry.segment || entry.pins || entry.holder) return;
                const u32 departure = take_departure();
                take_from_order(space(id), at, true);
                free_memory(at, departure);
                ++index_.shard(number).demotions;
                bytes += u64{entry.units} * kUnit;
            });
        }
    }
    return bytes;
}

// Frees some entry of the shard, when there's no memory for more: the one in it that was used longest ago.
bool Store::evict_entry_of(u32 shard_number) {
    u32 chosen = kNone, id = 0;
    u64 seq = 0;
    {
        const RobustLock held = index_.lock(shard_number);
        index_.each_of(shard_number, [&](u32 at, Entry& entry) {
            if (entry.state != EntryState::live || entry.pins || entry.holder || (entry.flags & kDirty)) return;
            if (chosen && static_cast<std::int32_t>(entry.node.stamp - index_.entry(chosen).node.stamp) >= 0) return;
            chosen = at;
            id = entry.ns;
            seq = entry.seq;
        });
    }
    if (!chosen) return false;
    const RobustLock policy_held = lock_policy(id);
    const RobustLock held = index_.lock(shard_number);
    Entry& entry = index_.entry(chosen);
    if (entry.state != EntryState::live || entry.seq != seq || entry.pins || entry.holder || (entry.flags & kDirty)) return true;
    leave_index(chosen);
    return true;
}

bool Store::anything_dirty() const {
    for (u32 slot = 0; slot < kMaxClients; ++slot)
        if (clients_[slot].used.load() && clients_[slot].dirty_bytes.load()) return true;
    return false;
}

// A block of `units`, for which others leave. With may_wait it waits for the tier below, lets go of what lies there if
// need be, and throws TierFull at last; without, it returns nothing instead.
Block Store::take_block(u32 units, Space wanted, bool may_wait) {
    const Namespace& ns = space(wanted.id);
    const u64 bytes = u64{units} * kUnit;
    std::optional<std::chrono::steady_clock::time_point> since;
    auto wait = [&] {
        const auto now = std::chrono::steady_clock::now();
        if (!since) since = now;
        if (now - *since >= std::chrono::duration<double>(kPatience)) return false;
        if (clients_.mine().dirty_bytes.load())
            wait_for_progress(0.5);
        else
            std::this_thread::sleep_for(std::chrono::milliseconds(5));  // for another process
        return true;
    };
    // The tier below has fallen behind: let it catch up before memory is full of what can't leave.
    while (clients_.mine().dirty_bytes.load() > header_.memory / 2) {
        if (!may_wait) return {};
        if (!wait()) break;
    }
    const auto over_quota = [&] { return ns.quota && ns.bytes.load() + bytes > ns.quota; };
    remove_expired();
    if (!Allocator::is_small(units)) {
        const u32 largest = ahead_.units.load(std::memory_order_relaxed);
        ahead_.units.store(std::max(units, largest - largest / 1024), std::memory_order_relaxed);  // forgotten with time
        if (units >= largest / 4) ahead_.due.store(true, std::memory_order_relaxed);
    }
    if (!over_quota())
        if (const auto spare = clients_.spares.take(units)) return Block(*this, *spare);
    const std::optional<u32> free_slot = may_wait ? clients_.arrivals.take() : clients_.arrivals.try_take();
    if (!free_slot) return {};
    const u32 slot = *free_slot;
    try {
        if (clients_.blocks_put_off.any() || unburied_.load()) do_what_was_put_off();
        bool reaped = false;
        for (int evictions = 0;; ++evictions) {
            const bool full = over_quota();
            if (!full) {
                if (allocator_.allocate(units, clients_.self(), slot)) break;
                if (const auto spare = clients_.spares.take(units)) {  // that of whoever has just left
                    clients_.arrivals.give_back(slot);
                    return Block(*this, *spare);
                }
                if (give_back_spares()) continue;
            }
            if (evictions < kMostEvictions && (full ? evict_from(wanted.id, 0, false) : evict_one(units, wanted.id))) continue;
            if (!reaped) {  // dead processes may hold what we need
                reaped = true;
                if (reap()) continue;
            }
            if (!may_wait) {
                clients_.arrivals.give_back(slot);
                return {};
            }
            if (anything_dirty() && wait()) continue;
            if (!full && evict_keys()) continue;
            if (full) throw TierFull("memory (quota of the namespace)", bytes, ns.quota - std::min(ns.quota, ns.bytes.load()));
            throw TierFull("memory", bytes, allocator_.usage().free);
        }
    } catch (...) {
        clients_.arrivals.give_back(slot);
        throw;
    }
    return Block(*this, slot);
}

// So that all that is free is the allocator's. False when nothing was spare.
bool Store::give_back_spares() {
    for (u32 i = 0; i < Spares::kMost; ++i) {  // other threads may keep more meanwhile
        const auto slot = clients_.spares.take_any();
        if (!slot) return i > 0;
        clients_.no_spare_any_more(*slot);
        free_block(*slot);
    }
    return true;
}

}  // namespace kvstrata
