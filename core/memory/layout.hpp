// What lies in the mapping, byte for byte. Offsets and numbers only, never pointers: every process maps it elsewhere.
//
//   Header | clients | namespaces | shards | owners of entry chunks | debts | seen keys | holders | promises | tags
//   | changes | buckets | entries | scratch memory of policies | page table | guard | data | guard
//
// Order of locks: admin, then a namespace's policy, then a shard, then the allocator. A thread holds at most one of each.
// On a hit the policy is only tried, never waited for, while a shard is held.
#pragma once

#include <atomic>
#include <type_traits>

#include "base/bloom.hpp"
#include "canaries.hpp"
#include "policy/policy.hpp"
#include "base/robust.hpp"
#include "timers.hpp"
#include "base/types.hpp"

namespace kvstrata {

inline constexpr char kMagic[8] = {'K', 'V', 'S', 'A', 'R', 'E', 'N', 'A'};
inline constexpr u32 kFormat = 3 | (kDebug ? 1u << 31 : 0);  // a debug build can't share memory with another
inline constexpr u32 kShards = 64;
inline constexpr u32 kMaxClients = 128;
inline constexpr u32 kMaxNamespaces = 1024;
inline constexpr u32 kMaxName = 128;     // bytes of a namespace's name
inline constexpr u32 kPins = 8192;       // pins one client can hold
inline constexpr u32 kInFlight = 1024;   // blocks one client can hold between allocation and publication
inline constexpr u32 kChunk = 64;        // entries are handed to shards in chunks of this many
inline constexpr u32 kInlineKey = 32;    // longer keys lie in a block of their own
inline constexpr u32 kClasses = 48;      // small block sizes
inline constexpr u32 kSmallUnits = 128;  // blocks above this many units are runs of pages
inline constexpr u32 kSlabPages = 16;
inline constexpr u32 kTags = 4;          // tags one record can have
inline constexpr u32 kTagSlots = 65536;
inline constexpr u32 kChangeSlots = 65536;
inline constexpr u32 kHolders = 32;      // number 0 is nobody
inline constexpr u32 kNone = 0;          // no entry, no page, no block: number 0 is never handed out

// ---- Records ------------------------------------------------------------------------------------

enum class EntryState : u8 {
    free = 0,
    live = 1,    // in its shard's table
    zombie = 2,  // deleted or overwritten, kept while somebody still has it pinned
};
enum EntryFlags : u8 {
    kImmutable = 1,
    kDirty = 2,    // the tier below does not have it yet, so it must not leave memory
    kWriting = 4,  // and is being given it right now
    kUnproven = 8, // not wanted often enough yet for the tier below
    kLoading = 16, // `owner` is bringing it up from the tier below: others wait for that
    kLazy = 32,    // dirty, but the tier below gets it only when it is to leave memory; not dirty: it gets it when it is well again
    kUsed = 64,    // somebody has used it since the tier below got it, or last moved it
    kEncoded = 128, // below it is encoded: its length there is another one, and it can't be loaded as it is
};

// One version of one key. Written under the lock of its shard; `node` under the lock of its namespace's policy;
// `memory` changes from or to 0 only under both.
struct alignas(64) Entry {
    PolicyNode node;    // place in the policy's order, while it lies in memory
    u32 hash;           // low bits choose the shard, high bits the bucket
    u32 units;          // length of the record in memory / kUnit; before it ever was there, that below
    u32 chain;          // next in the bucket, or in the free list
    u32 memory;         // offset in data / kUnit, 0 = not in memory
    u32 epoch;          // of the namespace, when it was put
    u32 pins;           // how many pins; the clients' tables are what counts, this is their sum
    u64 seq;            // cache-wide number of this version
    u64 expires;        // ms since the epoch, 0 = never
    u16 ns;
    u16 key_len;
    EntryState state;
    u8 flags;
    u8 owner;           // client that has to write it below, while dirty; or that brings it up, while loading
    u8 holder;          // who wants it to stay in memory, 0 = nobody
    union {
        u8 key[kInlineKey];
        u32 key_block;  // offset / kUnit, when key_len > kInlineKey
    };
    u32 segment;        // segment file, 0 = not on disk
    u32 position;       // offset in the segment / kUnit
    TimerLinks timer;   // while live, if it expires
    u16 tags[kTags];    // slots of its tags, 0 = none
    u32 disk_units;     // length of the record below / kUnit
};
static_assert(sizeof(Entry) == 128 && std::is_trivially_copyable_v<Entry>);
static_assert(offsetof(Entry, hash) == offsetof(PolicyRecord, hash) && offsetof(Entry, units) == offsetof(PolicyRecord, units));

inline bool is_lazy(const Entry& entry) { return (entry.flags & (kLazy | kDirty)) == (kLazy | kDirty); }
inline bool is_postponed(const Entry& entry) { return (entry.flags & (kLazy | kDirty)) == kLazy; }

// What a record says of its tags: that one of these slots has been changed by damage shows.
inline u8 check_of_tags(const u16* tags) {
    u32 all = 0;
    for (u32 i = 0; i < kTags; ++i) all ^= tags[i];
    return static_cast<u8>(all ^ all >> 8);
}

// Whether the tier below has it, or may have it any moment.
inline bool may_be_on_disk(const Entry& entry) { return entry.segment != 0 || (entry.flags & kWriting); }

// A part of the hash table (linear hashing: it grows by one bucket at a time). Guarded by `mutex`.
struct alignas(64) Shard {
    RobustMutex mutex;
    u32 level;          // buckets = (1 << level) + split
    u32 split;
    u32 backed;         // buckets whose memory is allocated
    u32 count;          // live entries
    u32 free_entries;   // head of the free list
    u64 puts, deletes, evictions, expired, demotions;
    u64 held[kHolders]; // bytes of records that a holder wants to stay
    Timers timers;
    std::atomic<u64> removals;  // grows after an entry has stopped being live; also read without the lock
};

// Who takes out of the index what the tier below may have, owes the deletion of its row there, and pays once that is
// durable. Debts are counted by the hash of the key, in a Bloom filter. Where there are some, absence from the index
// says nothing of the tier below, and the next who puts or removes such a key deletes its row, too. The dead never pay.
inline constexpr double kDebtsForNothing = 0.001;  // of the keys that owe nothing, so many delete a row all the same

// ---- Tags ---------------------------------------------------------------------------------------

// A tag is a slot of a table (a hash of the namespace and the tag), in which stands the number below which records with
// that tag are not there any more. A page of the table has memory once a slot in it is used.
inline constexpr u32 kTagPages = kTagSlots * sizeof(u64) / kPage;
static_assert(kTagPages <= 128);

// ---- Changes, for tiers that the index knows nothing of (remote.cpp) ---------------------------------------------

// What was put or removed here may lie elsewhere in an older state. A slot for the hash of a key. It has memory once
// somebody watches.
struct Changes {
    std::atomic<u64> last;      // the number of the last put or removal; written under the lock of the key's shard
    std::atomic<u64> distrust;  // ns since the Unix epoch: what was written elsewhere before may be older than a change here
};
static_assert(sizeof(Changes) == 16);

// ---- Holders ------------------------------------------------------------------------------------

// Somebody who wants records to stay in memory: as many bytes as `limit`. Guarded by the admin lock; how much he holds
// is the sum of the shards' counts.
inline constexpr u64 kClosing = ~u64{0};
struct Holder {
    std::atomic<u64> limit;  // 0: there is no such holder; kClosing: he holds nothing more, and lets go of all
    u32 name_len;
    char name[kMaxName];
};

// ---- Promises -----------------------------------------------------------------------------------

// Who computes a value that isn't there, so that others wait for it and don't compute it, too: until the value is put, the
// promise is withdrawn or has run out, or the client is dead. In a table by the hash of namespace and key.
struct Promise {
    u64 key;      // 64 bits of its hash
    u64 expires;  // ms since the epoch
    u64 token;    // 0: nobody's
    u32 client;
    u32 spare;
};
inline constexpr u32 kPromises = 2048;
struct alignas(64) Promises {
    RobustMutex mutex;
    std::atomic<u64> next_token;
    Promise at[kPromises];
};

// ---- Namespaces ---------------------------------------------------------------------------------

// Guarded by `mutex`, the policy's lock. `epoch` is also read without it.
struct alignas(64) Namespace {
    RobustMutex mutex;
    std::atomic<u32> defined;   // 1 once the fields below are valid
    std::atomic<u32> epoch;     // records of another epoch are not there
    std::atomic<u32> version;   // the user's
    std::atomic<u32> durable_epoch;  // the highest that is known to outlast a restart
    u32 policy;
    u32 acting;                 // the policy that runs the order: `policy`, or a plain one until that has scratch memory
    std::atomic<u32> hungry;    // the order would do with more scratch memory; also read without the lock
    u64 scratch_at, scratch_bytes;  // offset in the mapping; changed under the admin lock, too
    u32 configured;             // policy, quota and immutable hold for everybody (someone has it open)
    u32 immutable;
    u32 admission;              // how often a key has to be wanted before its record goes to the tier below
    u32 write_back;             // and only when it is to leave memory
    u32 remote;                 // changes are told to the tiers elsewhere
    u64 quota;                  // bytes in memory, 0 = no limit
    std::atomic<u64> guarantee; // bytes in memory that no other namespace takes from it
    std::atomic<u64> bytes;     // of records in memory; read without the lock, too
    std::atomic<u64> records;
    void count(u64 more_bytes, u64 more_records) {  // modulo 2^64; only one at a time writes, so no locked instruction is needed
        bytes.store(bytes.load(std::memory_order_relaxed) + more_bytes, std::memory_order_relaxed);
        records.store(records.load(std::memory_order_relaxed) + more_records, std::memory_order_relaxed);
    }
    u32 name_len;
    char name[kMaxName];
    PolicyState order;
};

// ---- Clients ------------------------------------------------------------------------------------

// A block between its allocation and its publication, or between its removal from an entry and its release.
struct InFlight {
    u32 block;  // offset / kUnit, 0 = nothing
    u32 units;
    u32 entry;  // the entry that may already, or may still, refer to it
    u32 spare;
};

// One attached process. Alive as long as it holds a file lock on byte kClientLock + slot number.
// Only its own process writes here, each pin under the lock of the pinned entry's shard; the reaper when it is dead.
struct alignas(64) Client {
    std::atomic<u32> used;
    u32 pid;  // for people to read
    std::atomic<u64> dirty_bytes;
    std::atomic<u64> hits, misses;
    std::atomic<u64> unsent;  // changes from this number on may not have reached the tiers elsewhere; 0 = all have
    InFlight in_flight[kInFlight];
    std::atomic<u32> pins[kPins];  // entries
};
inline constexpr u64 kClientLock = u64{1} << 60;

// ---- Allocator ----------------------------------------------------------------------------------

enum class PageKind : u8 {
    interior = 0,
    free = 1,       // first page of a free run
    free_tail = 2,  // last page of a free run of two or more
    run = 3,        // first page of a block of whole pages
    slab = 4,       // first page of a slab of small blocks
};

// One 4 KiB page of data. Only first pages count: following `length` from page to page visits every run. The last page
// of a run has its length too, so that one can go back.
// In a slab the descriptors between them hold its bitmap, and where there is room, the owners of its blocks.
struct PageDescriptor {
    u32 length;  // pages in the run
    PageKind kind;
    u8 size_class;
    u16 used;    // blocks in use, in a slab
    u32 next;    // in a list of free runs or of slabs with room; of a run in use, the entry that it belongs to
    u32 prev;
};
static_assert(sizeof(PageDescriptor) == 16 && kSlabPages * kPage / kUnit / 8 <= 8 * sizeof(PageDescriptor));

// Guarded by `mutex`.
struct AllocatorState {
    RobustMutex mutex;
    u32 operation;              // 0 none, 1 allocating, 2 freeing: what the in-flight slot below is part of
    u32 client, slot;
    u32 pages;                  // page numbers are 1..pages-1
    u32 free_pages;
    u32 first_level;            // bit f: some bin of row f has runs
    u32 second_level[32];       // bit s of row f: bin (f, s) has runs
    u32 bins[32][8];            // free runs of 2^f * (1 + s/8) pages and more
    u32 slabs[kClasses];        // slabs with room
    u64 faults;                 // double frees and other misuse that was refused
    u64 overruns, late_writes;  // seen by debug builds only
};

// ---- Header -------------------------------------------------------------------------------------

struct alignas(64) Header {
    char magic[8];
    u32 format;
    std::atomic<u32> ready;     // 1 once everything is set up
    u64 memory, disk;           // the options, bytes
    u64 secret[2];              // of the hash
    u32 seed;                   // of header checksums
    u32 max_entries;
    u32 max_buckets;            // per shard
    u32 spare;
    BloomShape debts;
    BloomShape seen;            // of each of two generations
    std::atomic<u32> seen_now;  // which of them is the younger one
    std::atomic<u64> seen_keys; // in that
    u64 clients_at, namespaces_at, shards_at, owners_at, debts_at, seen_at, holders_at, promises_at, tags_at, changes_at, buckets_at, entries_at, scratch_at, pages_at, data_at, end;
    std::atomic<u64> seq;
    std::atomic<u32> tick;      // accesses, for recency
    std::atomic<u32> chunks;    // entry chunks handed out (under the allocator's lock)
    std::atomic<u64> entries_backed;  // bytes of the entries region that are allocated (same lock)
    std::atomic<u64> past_hits, past_misses;  // of clients that are gone
    std::atomic<u64> corrupt, loads, load_bytes, reaped_clients, reaped_pins, reaped_blocks, rebuilt_shards,
        rebuilt_policies, rebuilt_allocators;
    std::atomic<u32> namespaces;  // one more than the highest number in use
    std::atomic<u32> segments_changed;  // grows when a segment is dropped
    std::atomic<u64> tag_pages[kTagPages / 64];  // bit p: page p of the table of tags has memory
    std::atomic<u32> watched;   // changes are written down
    std::atomic<u64> distrusted;  // as Changes::distrust, for all keys
    std::atomic<u64> next_expiry;  // ms since the epoch: not before then somebody looks for what has expired; 0 = nothing ever expires
    RobustMutex admin;          // attaching, reaping, defining namespaces
    AllocatorState allocator;
};
static_assert(std::atomic<u64>::is_always_lock_free && std::atomic<u32>::is_always_lock_free);

}  // namespace kvstrata
