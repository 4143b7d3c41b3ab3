// What the cleaning of the tier below asks of the index: what is still wanted of a segment, and where it has been moved.
#include <cstring>
#include <unordered_map>

#include "base/failpoints.hpp"
#include "store.hpp"

namespace kvstrata {

std::vector<SegmentUse> Store::segments_in_use() {
    std::unordered_map<u32, SegmentUse> segments;
    for (u32 number = 0; number < kShards; ++number) {
        const RobustLock held = index_.lock(number);
        index_.each_of(number, [&](u32, const Entry& entry) {
            if (entry.state != EntryState::live || !entry.segment || !current(entry, space(entry.ns))) return;
            SegmentUse& use = segments[entry.segment];
            const u64 bytes = u64{entry.disk_units} * kUnit;
            ++use.records;
            use.bytes += bytes;
            if (entry.flags & kUsed) use.used_bytes += bytes;
            use.last_expiry = std::max(use.last_expiry, entry.expires ? entry.expires : ~u64{0});
        });
    }
    std::vector<SegmentUse> found;
    found.reserve(segments.size());
    for (auto& [segment, use] : segments) {
        use.segment = segment;
        found.push_back(use);
    }
    return found;
}

std::vector<KeptRow> Store::rows_of(u32 segment, bool used_only) {
    std::vector<KeptRow> found;
    for (u32 number = 0; number < kShards; ++number) {
        const RobustLock held = index_.lock(number);
        index_.each_of(number, [&](u32, const Entry& entry) {
            if (entry.state != EntryState::live || entry.segment != segment || (used_only && !(entry.flags & kUsed))) return;
            Namespace& ns = space(entry.ns);
            if (!current(entry, ns)) return;
            const Key key = index_.key(entry);
            KeptRow& row = found.emplace_back();
            row.key.assign(key.begin(), key.end());
            row.ns = entry.ns;
            row.seq = entry.seq;
            row.offset = u64{entry.position} * kUnit;
            row.length = u64{entry.disk_units} * kUnit;
            row.version = ns.version.load();
            row.epoch = entry.epoch;
            std::memcpy(row.tags, entry.tags, sizeof row.tags);
        });
    }
    return found;
}

bool Store::move_on_disk(const KeptRow& row, u32 from, u32 to, u64 offset) {
    const u32 hash = index_.hash(row.ns, row.key);
    const RobustLock held = index_.lock(Index::shard_of(hash));
    const u32 at = index_.find(hash, row.ns, row.key);
    if (!at) return false;
    Entry& entry = index_.entry(at);
    if (entry.seq != row.seq || entry.segment != from || entry.position != row.offset / kUnit) return false;
    // Killed in between, it points to nothing, or to another record: what is loaded from there is found out.
    entry.position = static_cast<u32>(offset / kUnit);
    KVSTRATA_COMMIT("store.moved");
    entry.segment = to;
    entry.flags &= static_cast<u8>(~kUsed);
    return true;
}

}  // namespace kvstrata
