#include "index.hpp"

#include <algorithm>
#include <cstring>

#include "base/clock.hpp"
#include "base/failpoints.hpp"
#include "base/siphash.hpp"

namespace kvstrata {
namespace {
constexpr u32 kFirstLevel = 4;  // 16 buckets a shard at first

// Read without a lock by Index::holds.
void set_state(Entry& entry, EntryState state) {
    std::atomic_ref<EntryState>(entry.state).store(state, std::memory_order_release);
}
}

Index::Index(Region& region, Allocator& allocator, Clients& clients)
    : region_(region),
      header_(region.header()),
      allocator_(allocator),
      clients_(clients),
      shards_(reinterpret_cast<Shard*>(region.at(header_.shards_at))),
      buckets_(reinterpret_cast<u32*>(region.at(header_.buckets_at))),
      entries_(reinterpret_cast<Entry*>(region.at(header_.entries_at))),
      owners_(region.at(header_.owners_at)),
      debts_(reinterpret_cast<CountingBloom::Byte*>(region.at(header_.debts_at)), header_.debts) {}

void Index::init() {
    for (u32 number = 0; number < kShards; ++number) {
        Shard& shard = shards_[number];
        shard.mutex.init();
        shard.level = kFirstLevel;
        shard.backed = kPage / sizeof(u32);
        shard.timers.now = now_ms() / Timers::kTickMs;
        region_.back(header_.buckets_at + u64{number} * header_.max_buckets * sizeof(u32), kPage);
        // So that every shard has entries to evict when there is no memory for more.
        if (!add_chunk(number)) throw OsError("no memory for the cache's index", ENOSPC);
    }
}

u32 Index::hash(u32 ns, Key key) const {
    return static_cast<u32>(siphash13(header_.secret[0] ^ ns, header_.secret[1], key.data(), key.size()));
}

Key Index::key(const Entry& entry) const {
    if (entry.key_len <= kInlineKey) return {entry.key, entry.key_len};
    return {region_.data() + u64{entry.key_block} * kUnit, entry.key_len};
}

[[gnu::no_sanitize("thread")]] Entry Index::glimpse(u32 number) const {
    const volatile Entry& now = entries_[number];
    Entry seen{};
    seen.node.stamp = now.node.stamp;
    seen.expires = now.expires;
    seen.memory = now.memory;
    seen.segment = now.segment;
    seen.epoch = now.epoch;
    seen.pins = now.pins;
    seen.seq = now.seq;
    seen.ns = now.ns;
    seen.state = now.state;
    seen.flags = now.flags;
    seen.holder = now.holder;
    for (u32 i = 0; i < kTags; ++i) seen.tags[i] = now.tags[i];
    return seen;
}

RobustLock Index::lock(u32 shard) {
    return RobustLock(shards_[shard].mutex, [this, shard] { repair(shard); });
}

u32 Index::bucket_of(const Shard& shard, u32 hash) const {
    const u32 bits = hash / kShards;
    const u32 bucket = bits & ((2u << shard.level) - 1);
    return bucket < (1u << shard.level) + shard.split ? bucket : bits & ((1u << shard.level) - 1);
}

void Index::prefetch(u32 hash) const {
    const u32 number = shard_of(hash);
    __builtin_prefetch(&shards_[number]);
    __builtin_prefetch(&buckets(number)[bucket_of(shards_[number], hash)]);
}

// What it reads may be changing at this moment: then it asks for the wrong memory, and nothing else comes of it.
[[gnu::no_sanitize("thread")]] u32 Index::first_in_bucket(u32 hash) const {
    const Shard& shard = shards_[shard_of(hash)];
    const u32 bits = hash / kShards, level = shard.level;
    u32 bucket = bits & ((2u << level) - 1);
    if (bucket >= (1u << level) + shard.split) bucket = bits & ((1u << level) - 1);
    return bucket < shard.backed ? buckets(shard_of(hash))[bucket] : kNone;  // or there is no memory behind it
}

[[gnu::no_sanitize("thread")]] u32 Index::probable(u32 hash) const {
    u32 at = first_in_bucket(hash);
    for (u32 steps = 0; at && steps < 4 && entries_[at].hash != hash; ++steps) at = entries_[at].chain;
    return at;
}

[[gnu::no_sanitize("thread")]] void Index::prefetch_around(u32 hash) const {
    const u32 fresh = shards_[shard_of(hash)].free_entries;
    __builtin_prefetch(&entries_[fresh], 1);
    __builtin_prefetch(&entries_[fresh].key, 1);
    const u32 at = probable(hash);
    if (!at) return;
    const Entry& entry = entries_[at];
    __builtin_prefetch(&entry.key, 1);
    __builtin_prefetch(&entries_[entry.node.prev], 1);
    __builtin_prefetch(&entries_[entry.node.next], 1);
    allocator_.prefetch(entry.memory);
}

void Index::prefetch_entry(u32 hash) const {
    const char* const entry = reinterpret_cast<const char*>(&entries_[first_in_bucket(hash)]);
    __builtin_prefetch(entry);
    __builtin_prefetch(entry + 64);
}

[[gnu::no_sanitize("thread")]] void Index::prefetch_record(u32 hash) const {
    const u32 at = first_in_bucket(hash);
    if (!at) return;
    const u8* const record = region_.data() + u64{entries_[at].memory} * kUnit;
    __builtin_prefetch(record);
    __builtin_prefetch(record + kUnit);
}

u32 Index::find(u32 hash, u32 ns, Key wanted) const {
    const u32 number = shard_of(hash);
    for (u32 at = buckets(number)[bucket_of(shards_[number], hash)]; at; at = entries_[at].chain) {
        const Entry& entry = entries_[at];
        __builtin_prefetch(&entry.key);  // in the other cache line
        if (entry.hash != hash || entry.ns != ns || entry.key_len != wanted.size()) continue;
        if (std::memcmp(key(entry).data(), wanted.data(), wanted.size()) == 0) return at;
    }
    return kNone;
}

bool Index::add_chunk(u32 number) {
    const u32 chunk = allocator_.take_chunk(number);
    if (!chunk) return false;
    const u32 first = (chunk - 1) * kChunk;
    for (u32 i = kChunk; i > 0; --i) {
        const u32 fresh = first + i - 1;
        if (fresh == kNone) continue;
        entries_[fresh].chain = shards_[number].free_entries;
        shards_[number].free_entries = fresh;
    }
    return true;
}

u32 Index::take_entry(u32 number) {
    Shard& shard = shards_[number];
    if (!shard.free_entries && !add_chunk(number)) return kNone;
    const u32 taken = shard.free_entries;
    shard.free_entries = entries_[taken].chain;
    return taken;
}

void Index::link(u32 at) {
    Entry& entry = entries_[at];
    const u32 number = shard_of(entry.hash);
    Shard& shard = shards_[number];
    u32& bucket = buckets(number)[bucket_of(shard, entry.hash)];
    entry.chain = bucket;
    KVSTRATA_COMMIT("index.link");
    set_state(entry, EntryState::live);
    KVSTRATA_COMMIT("index.live");
    bucket = at;
    start_timer(at);
    if (++shard.count > (1u << shard.level) + shard.split) grow(number);
}

void Index::unlink(u32 at, EntryState becomes) {
    Entry& entry = entries_[at];
    const u32 number = shard_of(entry.hash);
    Shard& shard = shards_[number];
    KVSTRATA_COMMIT("index.unlink");
    set_state(entry, becomes);
    KVSTRATA_COMMIT("index.unlinked");
    shard.removals.store(shard.removals.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    u32* link = &buckets(number)[bucket_of(shard, entry.hash)];
    while (*link != at) link = &entries_[*link].chain;
    *link = entry.chain;
    --shard.count;
    shard.timers.remove(at, [this](u32 number) -> TimerLinks& { return entries_[number].timer; });
    hold(at, 0);
}

void Index::start_timer(u32 at) {
    Entry& entry = entries_[at];
    entry.timer = {0, 0};
    if (!entry.expires) return;
    shards_[shard_of(entry.hash)].timers.add(at, entry.expires, [this](u32 number) -> TimerLinks& { return entries_[number].timer; });
    u64 next = header_.next_expiry.load(std::memory_order_relaxed);
    while ((!next || entry.expires < next) && !header_.next_expiry.compare_exchange_weak(next, entry.expires)) {
    }
}

std::vector<u32> Index::expired(u32 number, u64 now_ms, size_t most) {
    Timers& timers = shards_[number].timers;
    const auto links = [this](u32 at) -> TimerLinks& { return entries_[at].timer; };
    timers.advance(now_ms, links, [this](u32 at) { return entries_[at].expires; });
    std::vector<u32> found;
    for (u32 at = timers.first_due(); at && found.size() < most; at = entries_[at].timer.next)
        if (entries_[at].expires <= now_ms) found.push_back(at);  // a clock can be set back
    return found;
}

void Index::hold(u32 at, u8 holder) {
    Entry& entry = entries_[at];
    if (entry.holder == holder) return;
    Shard& shard = shards_[shard_of(entry.hash)];
    if (entry.holder) shard.held[entry.holder] -= held_bytes(entry);
    if (holder) shard.held[holder] += held_bytes(entry);
    entry.holder = holder;
}

void Index::free_entry(u32 at) {
    Entry& entry = entries_[at];
    Shard& shard = shards_[shard_of(entry.hash)];
    set_state(entry, EntryState::free);
    entry.memory = entry.segment = entry.pins = 0;
    entry.flags = 0;
    KVSTRATA_COMMIT("index.free");
    entry.chain = shard.free_entries;
    shard.free_entries = at;
}

void Index::set_seq(u32 at, u64 seq) {
    std::atomic_ref<u64>(entries_[at].seq).store(seq, std::memory_order_relaxed);
}

// Splits the next bucket in two.
void Index::grow(u32 number) {
    Shard& shard = shards_[number];
    const u32 from = shard.split, to = (1u << shard.level) + shard.split;
    if (to >= header_.max_buckets) return;
    if (to >= shard.backed) {
        const u32 more = std::min(shard.backed, header_.max_buckets - shard.backed);
        try {
            region_.back(header_.buckets_at + (u64{number} * header_.max_buckets + shard.backed) * sizeof(u32),
                         u64{more} * sizeof(u32));
        } catch (const OsError&) {
            return;  // chains get longer
        }
        shard.backed += more;
    }
    u32* const table = buckets(number);
    u32 chain = table[from];
    table[from] = table[to] = kNone;
    if (++shard.split == 1u << shard.level) {
        KVSTRATA_COMMIT("index.split");
        ++shard.level;
        shard.split = 0;
    }
    while (chain) {
        Entry& entry = entries_[chain];
        const u32 next = entry.chain;
        u32& bucket = table[bucket_of(shard, entry.hash)];
        entry.chain = bucket;
        bucket = chain;
        chain = next;
    }
}

u32 Index::longest_chain(u32 number) const {
    const Shard& shard = shards_[number];
    u32 longest = 0;
    for (u32 bucket = 0; bucket < (1u << shard.level) + shard.split; ++bucket) {
        u32 length = 0;
        for (u32 at = buckets(number)[bucket]; at; at = entries_[at].chain) ++length;
        longest = std::max(longest, length);
    }
    return longest;
}

bool Index::refers_to(const Entry& entry, u32 block) const {
    return entry.state != EntryState::free &&
           (entry.memory == block || (entry.key_len > kInlineKey && entry.key_block == block));
}

// After a death inside: rebuilds chains, the free list and the sums of pins from the entries and the clients' tables,
// and settles whose the blocks are that were on their way in or out.
void Index::repair(u32 number) {
    header_.rebuilt_shards.fetch_add(1);
    Shard& shard = shards_[number];
    std::memset(buckets(number), 0, u64{shard.backed} * sizeof(u32));
    if (shard.split >> shard.level) ++shard.level, shard.split = 0;  // it died between the last split of a level and the next level
    if ((1u << shard.level) + shard.split > shard.backed) shard.split = 0;
    shard.count = 0;
    shard.removals.fetch_add(1);
    shard.free_entries = kNone;
    std::memset(shard.held, 0, sizeof shard.held);
    shard.timers = {};
    shard.timers.now = now_ms() / Timers::kTickMs;
    each_of(number, [&](u32, Entry& entry) { entry.pins = 0; });
    for (u32 slot = 0; slot < kMaxClients; ++slot) {
        Client& client = clients_[slot];
        if (!client.used.load()) continue;
        // A block that an entry refers to is the entry's. If it stayed in flight, it would be freed with the dead
        // client, whatever had become of the entry, and of the block, by then. What a living client writes here
        // meanwhile can't be meant: it lets an entry refer to a block in flight only while it holds this lock.
        for (InFlight& flight : client.in_flight) {
            const u32 block = __atomic_load_n(&flight.block, __ATOMIC_RELAXED);
            const u32 at = __atomic_load_n(&flight.entry, __ATOMIC_RELAXED);
            if (block && at && owners_[at / kChunk] == number + 1 && refers_to(entries_[at], block)) flight.block = kNone;
        }
        for (const auto& pin : client.pins) {
            const u32 pinned = pin.load(std::memory_order_relaxed);
            if (pinned && owners_[pinned / kChunk] == number + 1) ++entries_[pinned].pins;
        }
    }
    each_of(number, [&](u32 at, Entry& entry) {
        if (entry.state == EntryState::live && !entry.memory && !entry.segment) {
            set_state(entry, EntryState::zombie);  // forgotten below, and about to be dropped: the reaper buries it
        } else if (entry.state == EntryState::live) {
            u32& bucket = buckets(number)[bucket_of(shard, entry.hash)];
            entry.chain = bucket;
            bucket = at;
            ++shard.count;
            start_timer(at);
            if (entry.holder) shard.held[entry.holder] += held_bytes(entry);
        } else if (entry.state == EntryState::free) {
            entry.chain = shard.free_entries;
            shard.free_entries = at;
        }
    });
}

}  // namespace kvstrata
