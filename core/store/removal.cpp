// Taking records away: by key, by tag, by namespace, and when they have expired.
#include <cstring>

#include "base/clock.hpp"
#include "base/failpoints.hpp"
#include "base/siphash.hpp"
#include "store.hpp"

namespace kvstrata {
namespace {
constexpr u64 kLookEvery = Timers::kTickMs;  // ms
constexpr size_t kAtOnce = 64;               // of each shard
}  // namespace

void Store::require_current(Space wanted) const {
    if (wanted.version != space(wanted.id).version.load())
        throw VersionConflict("this namespace has moved on to a newer version");
}

Store::Removed Store::remove(Space wanted, Key key) {
    Namespace& ns = space(wanted.id);
    const u32 hash = index_.hash(wanted.id, key);
    const RobustLock policy_held = lock_policy(wanted.id);
    require_current(wanted);
    const RobustLock held = index_.lock(Index::shard_of(hash));
    const u32 at = index_.find(hash, wanted.id, key);
    const bool on_disk = (at && may_be_on_disk(index_.entry(at))) || index_.owes(hash) || undurable_epoch(wanted.id);
    if (on_disk) index_.borrow(hash);
    note_change(hash);
    KVSTRATA_COMMIT("store.borrowed");
    if (!at) return {false, on_disk};
    Entry& entry = index_.entry(at);
    const Removed removed{current(entry, ns), on_disk};
    if (entry.memory) take_from_order(ns, at, false);
    drop(at);
    if (removed.present) ++index_.shard(Index::shard_of(hash)).deletes;
    return removed;
}

u32 Store::clear(Space wanted) {
    const RobustLock held = lock_policy(wanted.id);
    Namespace& ns = space(wanted.id);
    require_current(wanted);
    return ns.epoch.fetch_add(1) + 1;
}

// ---- Tags ---------------------------------------------------------------------------------------

u16 Store::tag_slot(u32 ns, Key tag) const {
    // By what outlasts a restart, as the table does.
    return static_cast<u16>(1 + siphash13(header_.seed, ns, tag.data(), tag.size()) % (kTagSlots - 1));
}

bool Store::any_removed(const u16* tags, u64 seq) const {
    for (u32 i = 0; i < kTags && tags[i]; ++i) {
        const u32 page = tags[i] / static_cast<u32>(kPage / sizeof(u64));
        if ((header_.tag_pages[page / 64].load() >> page % 64 & 1) && tag(tags[i]).load() > seq) return true;
    }
    return false;
}

void Store::raise_tag(const TagState& state) {
    const u32 page = state.slot / static_cast<u32>(kPage / sizeof(u64));
    std::atomic<u64>& pages = header_.tag_pages[page / 64];
    if (!(pages.load() >> page % 64 & 1)) {
        try {
            region_->back(header_.tags_at + u64{page} * kPage, kPage);
        } catch (const OsError&) {
            throw TierFull("memory (tags)", kPage, 0);
        }
        pages.fetch_or(u64{1} << page % 64);
    }
    raise_to(tag(state.slot), state.seq);
}

TagState Store::remove_tag(Space wanted, Key tag) {
    require_current(wanted);
    const u16 slot = tag_slot(wanted.id, tag);
    const TagState state{slot, next_seq()};
    raise_tag(state);
    return state;
}

void Store::restore_tag(const TagState& state) {
    raise_seq(state.seq);
    if (state.slot) raise_tag(state);
}

// ---- Keys ---------------------------------------------------------------------------------------

std::vector<std::vector<u8>> Store::keys_of(Space wanted, u32 shard, Key prefix) {
    const Namespace& ns = space(wanted.id);
    std::vector<std::vector<u8>> found;
    if (wanted.version != ns.version.load()) return found;
    const RobustLock held = index_.lock(shard);
    index_.each_of(shard, [&](u32, const Entry& entry) {
        if (entry.state != EntryState::live || entry.ns != wanted.id || entry.key_len < prefix.size() || !current(entry, ns)) return;
        const Key key = index_.key(entry);
        if (std::memcmp(key.data(), prefix.data(), prefix.size()) == 0) found.emplace_back(key.begin(), key.end());
    });
    return found;
}

// ---- Expiry -------------------------------------------------------------------------------------

void Store::remove_expired() {
    u64 next = header_.next_expiry.load(std::memory_order_relaxed);
    if (!next) return;
    const u64 now = now_ms();
    // Whoever moves the time on is the one who looks; what is put meanwhile can only set it back.
    if (now < next || !header_.next_expiry.compare_exchange_strong(next, now + kLookEvery)) return;
    bool more = false;
    for (u32 number = 0; number < kShards; ++number) {
        struct Expired {
            u32 at, ns;
            u64 seq;
        };
        std::vector<Expired> expired;
        {
            const RobustLock held = index_.lock(number);
            for (const u32 at : index_.expired(number, now, kAtOnce))
                expired.push_back({at, index_.entry(at).ns, index_.entry(at).seq});
        }
        more |= expired.size() == kAtOnce;
        for (const auto& [at, ns, seq] : expired) {
            const RobustLock policy_held = lock_policy(ns);
            const RobustLock held = index_.lock(number);
            Entry& entry = index_.entry(at);
            if (entry.state != EntryState::live || entry.seq != seq) continue;
            if (entry.memory) take_from_order(space(ns), at, false);
            drop(at);
            ++index_.shard(number).expired;
        }
    }
    if (more) header_.next_expiry.store(now);
}

}  // namespace kvstrata
