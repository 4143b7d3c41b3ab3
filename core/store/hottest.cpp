// What was used last: to be brought back into memory after a restart.
#include <algorithm>

#include "store.hpp"

namespace kvstrata {

std::vector<Store::Used> Store::hottest(size_t most) {
    struct Found {
        u32 age, at;
        u64 seq;
    };
    std::vector<Found> found;
    const u32 now = header_.tick.load();
    for (u32 number = 0; number < kShards; ++number) {
        const RobustLock held = index_.lock(number);
        index_.each_of(number, [&](u32 at, const Entry& entry) {
            // Without the policy's lock: a stamp that is just being changed is one of the youngest either way.
            const u32 stamp = __atomic_load_n(&entry.node.stamp, __ATOMIC_RELAXED);
            if (entry.state == EntryState::live && entry.memory && current(entry, space(entry.ns))) found.push_back({now - stamp, at, entry.seq});
        });
    }
    const auto younger = [](const Found& a, const Found& b) { return a.age < b.age; };
    most = std::min(most, found.size());
    std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(most), found.end(), younger);
    std::vector<Used> used;
    used.reserve(most);
    for (size_t i = 0; i < most; ++i) {
        const RobustLock held = index_.lock(index_.shard_holding(found[i].at));
        const Entry& entry = index_.entry(found[i].at);
        if (entry.state != EntryState::live || entry.seq != found[i].seq) continue;
        const Key key = index_.key(entry);
        used.push_back({entry.ns, {key.begin(), key.end()}});
    }
    return used;
}

}  // namespace kvstrata
