// The host's index: where each record lies, in memory, on disk, or both. A hash table in shards, each with a lock.
//
// Linear hashing (Litwin 1980): a shard grows by splitting one bucket at an insertion, so no insertion is slow and
// chains stay short. Entries never move; their numbers are references.
#pragma once

#include <vector>

#include "memory/allocator.hpp"
#include "clients.hpp"

namespace kvstrata {

class Index {
public:
    Index(Region& region, Allocator& allocator, Clients& clients);

    void init();  // once, by the creator

    u32 hash(u32 ns, Key key) const;
    static u32 shard_of(u32 hash) { return hash % kShards; }
    RobustLock lock(u32 shard);
    // The shard that an entry belongs to for good.
    u32 shard_holding(u32 entry) const { return owners_[entry / kChunk] - 1u; }
    Shard& shard(u32 number) const { return shards_[number]; }
    Entry& entry(u32 number) const { return entries_[number]; }
    Nodes nodes() const { return {entries_, sizeof(Entry)}; }
    Key key(const Entry& entry) const;
    // What decides whether an entry may leave memory, without a lock: it may be changing right now, or be another's already.
    Entry glimpse(u32 number) const;

    // All below: with the shard of the hash, or of the entry, locked.
    u32 find(u32 hash, u32 ns, Key key) const;         // kNone if it isn't there
    // Need no lock: they only ask for memory that a lookup will touch, first the bucket, then its first entry.
    void prefetch(u32 hash) const;
    void prefetch_entry(u32 hash) const;
    void prefetch_record(u32 hash) const;              // its header, of the bucket's first entry
    void prefetch_around(u32 hash) const;              // what it takes to put the key's entry out of its order, and a new one in
    u32 take_entry(u32 shard);                         // a free one, kNone if there's no more memory for entries
    void link(u32 number);                             // makes it live; `hash` is set
    void unlink(u32 number, EntryState becomes);       // live before
    void hold(u32 number, u8 holder);                  // from now on it is his; 0: nobody's
    // Up to `most` of the shard's live entries that have expired by then. What isn't removed is listed again.
    std::vector<u32> expired(u32 shard, u64 now_ms, size_t most);
    void free_entry(u32 number);                       // unlinked before, its blocks are gone
    void set_seq(u32 number, u64 seq);                 // before link(); holds() reads it
    bool refers_to(const Entry& entry, u32 block) const;  // whether the entry still, or already, has it

    // Needs no lock: whether the record that was published there under this number is still the entry's, and live.
    bool holds(u32 number, u64 seq) const;
    // The same for who keeps `unchanged`, at first kNever: while nothing leaves the shard, the entry isn't looked at again.
    static constexpr u64 kNever = ~u64{0};
    bool holds(u32 number, u64 seq, u64& unchanged) const;

    u32 longest_chain(u32 shard) const;                // looks at every bucket

    bool owes(u32 hash) const { return debts_.contains(spread(hash)); }
    void borrow(u32 hash) { debts_.add(spread(hash)); }
    void pay(u32 hash) { debts_.remove(spread(hash)); }  // needs no lock
    const CountingBloom& debts() const { return debts_; }

    // Calls visit(number, entry) for each entry that belongs to the shard, whatever its state.
    template <class Visit>
    void each_of(u32 shard, Visit&& visit) const;

private:
    u32 bucket_of(const Shard& shard, u32 hash) const;
    u32* buckets(u32 shard) const { return buckets_ + u64{shard} * header_.max_buckets; }
    // Need no lock, and may be wrong.
    u32 first_in_bucket(u32 hash) const;
    u32 probable(u32 hash) const;
    void grow(u32 shard);
    bool add_chunk(u32 shard);
    void repair(u32 shard);
    void start_timer(u32 number);
    u64 held_bytes(const Entry& entry) const { return u64{entry.units} * kUnit; }

    Region& region_;
    Header& header_;
    Allocator& allocator_;
    Clients& clients_;
    Shard* shards_;
    u32* buckets_;
    Entry* entries_;
    u8* owners_;
    CountingBloom debts_;
};

// The state first. Whoever asks knows the number of a record that was published before, and numbers never return: if the
// entry has it still, it had it, too, when its state was read.
inline bool Index::holds(u32 number, u64 seq) const {
    Entry& entry = entries_[number];
    return std::atomic_ref<EntryState>(entry.state).load(std::memory_order_acquire) == EntryState::live &&
           std::atomic_ref<u64>(entry.seq).load(std::memory_order_relaxed) == seq;
}

// An entry stops being live first and is counted then: whoever finds it live after having read the count will find another
// count once it isn't.
inline bool Index::holds(u32 number, u64 seq, u64& unchanged) const {
    const u64 removals = shards_[shard_holding(number)].removals.load(std::memory_order_acquire);
    if (removals == unchanged) return true;
    if (!holds(number, seq)) return false;
    unchanged = removals;
    return true;
}

template <class Visit>
void Index::each_of(u32 shard, Visit&& visit) const {
    const u32 chunks = header_.chunks.load();
    for (u32 chunk = 0; chunk < chunks; ++chunk) {
        if (owners_[chunk] != shard + 1) continue;
        for (u32 i = 0; i < kChunk; ++i) {
            const u32 number = chunk * kChunk + i;
            if (number != kNone) visit(number, entries_[number]);
        }
    }
}

}  // namespace kvstrata
