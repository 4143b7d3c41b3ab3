// Who wants which records to stay in memory, whatever the policies say: named holders with a limit of bytes each, so that
// what is held can't fill the cache without anybody having said so.
#include <cstring>

#include "store.hpp"

namespace kvstrata {
namespace {
bool is_open(const Holder& who) {
    const u64 limit = who.limit.load();
    return limit && limit != kClosing;
}
}  // namespace

u8 Store::open_holder(const std::string& name, u64 limit) {
    if (name.empty() || name.size() > kMaxName)
        throw ConfigError("a holder's name has 1 to " + std::to_string(kMaxName) + " bytes, not " + std::to_string(name.size()));
    if (!limit) throw ConfigError("a holder's limit must be more than 0 bytes");
    const RobustLock held(header_.admin, [] {});
    u8 chosen = 0;
    u64 promised = limit;
    for (u8 number = 1; number < kHolders; ++number) {
        const Holder& other = holder(number);
        if (other.limit.load() == kClosing) finish_closing(number);  // who began it was cut short
        const u64 its_limit = other.limit.load();
        if (!its_limit) {
            if (!chosen) chosen = number;
        } else if (other.name_len == name.size() && std::memcmp(other.name, name.data(), name.size()) == 0) {
            if (its_limit != limit)
                throw ConfigMismatch("holder '" + name + "' has a limit of " + std::to_string(its_limit) + " bytes; use the same");
            return number;
        } else {
            promised += its_limit;
        }
    }
    if (!chosen) throw ConfigError("a cache has at most " + std::to_string(kHolders - 1) + " holders; close one");
    if (promised > header_.memory / 2)
        throw ConfigError("limits of holders of " + std::to_string(promised) + " bytes together are more than half of the memory");
    Holder& fresh = holder(chosen);
    std::memcpy(fresh.name, name.data(), name.size());
    fresh.name_len = static_cast<u32>(name.size());
    fresh.limit.store(limit);
    return chosen;
}

u64 Store::held_by(u8 number) const {
    u64 bytes = 0;
    for (u32 shard = 0; shard < kShards; ++shard) bytes += __atomic_load_n(&index_.shard(shard).held[number], __ATOMIC_RELAXED);
    return bytes;
}

bool Store::hold(Space wanted, Key key, u8 number) {
    const Namespace& ns = space(wanted.id);
    const RobustLock admin_held(header_.admin, [] {});  // nobody else adds to the sum meanwhile
    const Holder& who = holder(number);
    if (!is_open(who)) throw ConfigError("this holder is closed");
    const u32 hash = index_.hash(wanted.id, key);
    const u32 shard = Index::shard_of(hash);
    const u64 all = held_by(number);
    const RobustLock held = index_.lock(shard);
    const u32 at = index_.find(hash, wanted.id, key);
    if (!at || wanted.version != ns.version.load()) return false;
    const Entry& entry = index_.entry(at);
    if (!entry.memory || !current(entry, ns)) return false;
    if (entry.holder) return true;  // his, or another's: it stays
    const u64 bytes = u64{entry.units} * kUnit;
    if (all + bytes > who.limit.load())
        throw TierFull("memory (held by '" + std::string(who.name, who.name_len) + "')", bytes, who.limit.load() - std::min(all, who.limit.load()));
    index_.hold(at, number);
    return true;
}

bool Store::let_go(Space wanted, Key key, u8 number) {
    const u32 hash = index_.hash(wanted.id, key);
    const RobustLock held = index_.lock(Index::shard_of(hash));
    const u32 at = index_.find(hash, wanted.id, key);
    if (!at || index_.entry(at).holder != number) return false;
    index_.hold(at, 0);
    return true;
}

void Store::let_go_of_all(u8 number) {
    for (u32 shard = 0; shard < kShards; ++shard) {
        const RobustLock held = index_.lock(shard);
        if (!index_.shard(shard).held[number]) continue;
        index_.each_of(shard, [&](u32 at, const Entry& entry) {
            if (entry.state == EntryState::live && entry.holder == number) index_.hold(at, 0);
        });
    }
}

void Store::close_holder(u8 number) {
    const RobustLock held(header_.admin, [] {});
    holder(number).limit.store(kClosing);  // first, so that nobody holds more
    finish_closing(number);
}

// The number is free for another once nobody's records count for it. The admin lock is held.
void Store::finish_closing(u8 number) {
    let_go_of_all(number);
    holder(number).limit.store(0);
}

std::vector<HolderState> Store::holders() const {
    const RobustLock held(header_.admin, [] {});
    std::vector<HolderState> found;
    for (u8 number = 1; number < kHolders; ++number)
        if (const Holder& who = holder(number); is_open(who))
            found.push_back({std::string(who.name, who.name_len), who.limit.load(), held_by(number)});
    return found;
}

}  // namespace kvstrata
