// What callers of a store hold, ask for and are told: namespaces, pins, puts and loads under way, figures.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "index.hpp"
#include "record.hpp"

namespace kvstrata {

class Store;

// A namespace as somebody has it open: once the namespace has moved on to another version, it holds nothing for them.
struct Space {
    u32 id;
    u32 version;
};

struct NamespaceOptions {
    std::string policy = "lru";
    u64 quota = 0;          // bytes in memory, 0 = no limit
    u64 guarantee = 0;      // bytes in memory that others leave to it
    bool immutable = false;
    u32 admission = 1;      // how often a key has to be wanted before its record goes to the tier below (admission.cpp)
    bool write_back = false;  // and only when it is to leave memory
    bool remote = true;       // changes are told to the tiers elsewhere
};

// What a put says of its record.
struct PutOptions {
    u64 expires = 0;        // ms since the epoch, 0 = never
    float cost = 1;         // to compute the value again
    u32 depth = 0;          // place in its prefix, from 1 on; 0 = in none
    u16 tags[kTags] = {};   // slots, from the first on
};

// A reader's claim on a record in memory. The record can't move or go while it exists.
class Pin {
public:
    Pin() = default;
    Pin(Pin&& other) noexcept { swap(other); }
    Pin& operator=(Pin&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Pin();

    explicit operator bool() const { return store_ != nullptr; }
    const u8* record() const;                            // mapped read-only
    const RecordHeader& header() const { return *reinterpret_cast<const RecordHeader*>(record()); }
    const u8* value() const { return record() + header().payload_offset; }
    u64 size() const { return header().stored_len; }     // bytes of the value
    u64 record_size() const;
    u32 entry() const { return entry_; }

private:
    friend class Store;
    void swap(Pin& other) {
        std::swap(store_, other.store_);
        std::swap(slot_, other.slot_);
        std::swap(entry_, other.entry_);
    }
    Store* store_ = nullptr;  // outlives its pins: whoever keeps a pin keeps the store
    u32 slot_ = 0;
    u32 entry_ = kNone;
};

// Which record it was that somebody made a copy of, to ask later whether it is still what the key has.
struct Identity {
    u64 mapping = 0;  // entries and numbers mean nothing in another one
    u64 seq = 0, expires = 0;
    u32 entry = kNone, epoch = 0;
    u16 tags[kTags] = {};
    mutable u64 unchanged = Index::kNever;  // what Store::holds remembers of the last time
};

// What a few lookups have found. The policy is told of it at the end, all at once, if its lock can be had without waiting: it is
// not locked meanwhile, and without it, these uses don't count for recency. At most kMost lookups.
class Uses {
public:
    static constexpr u32 kMost = 64;
    Uses(Store& store, Space space) : store_(store), space_(space) {}
    ~Uses() { tell(); }
    Uses(const Uses&) = delete;
    Uses& operator=(const Uses&) = delete;
    u32 count() const { return hit_count_ + misses_; }
    bool of(Space space) const { return space.id == space_.id && space.version == space_.version; }
    void forget() { hit_count_ = misses_ = 0; }
    void count(const Identity& identity) { add({identity.entry, identity.seq}); }  // of a copy that is kept elsewhere

private:
    friend class Store;
    struct Hit {
        u32 entry;
        u64 seq;
    };
    void add(const Hit& hit) {
        if (hit_count_ < kMost) hits_[hit_count_++] = hit;
    }
    void tell();

    Store& store_;
    Space space_;
    u32 hit_count_ = 0, misses_ = 0;
    Hit hits_[kMost];
};

// A block that is being filled. Freed again unless it is published.
class Block {
public:
    Block() = default;
    Block(Block&& other) noexcept { swap(other); }
    Block& operator=(Block&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Block();
    explicit operator bool() const { return store_ != nullptr; }
    u8* bytes() const;
    u32 units() const;

private:
    friend class Store;
    Block(Store& store, u32 slot) : store_(&store), slot_(slot) {}
    void swap(Block& other) {
        std::swap(store_, other.store_);
        std::swap(slot_, other.slot_);
    }
    Store* store_ = nullptr;
    u32 slot_ = 0;
};

// A put between its two phases: fill payload(), then Store::publish.
struct Reservation {
    Space space;
    u32 hash;
    RecordHeader header;
    PutOptions options;
    Block block, key_block;
    Key key() const { return {block.bytes() + sizeof header, header.key_len}; }
    u8* payload() const { return block.bytes() + header.payload_offset; }
};

// That this process brings a record up, and others wait for it. Ends when it goes.
class LoadClaim {
public:
    LoadClaim() = default;
    LoadClaim(LoadClaim&& other) noexcept { swap(other); }
    LoadClaim& operator=(LoadClaim&& other) noexcept {
        swap(other);
        return *this;
    }
    ~LoadClaim();

private:
    friend class Store;
    void swap(LoadClaim& other) {
        std::swap(store_, other.store_);
        std::swap(entry_, other.entry_);
        std::swap(seq_, other.seq_);
    }
    Store* store_ = nullptr;
    u32 entry_ = kNone;
    u64 seq_ = 0;
};

// A record on its way from below into memory: fill block.bytes(), then Store::commit_load.
struct Loading {
    Space space;
    std::vector<u8> key;
    u32 entry;
    u64 seq;
    Block block;
    LoadClaim claim;
};

// A record that the tier below doesn't have yet.
struct Dirty {
    Pin pin;
    u64 seq;
};

struct Location {
    u32 entry;
    u64 seq;
    u32 segment;
    u64 offset, length;  // bytes
    bool encoded = false;
};

struct DiskRow {
    u32 ns;
    Key key;
    u64 seq;
    u32 segment;
    u64 offset, length, expires;
    u32 version, epoch;
    u8 flags;
    u16 tags[kTags] = {};
};

// What still counts of a segment of the tier below, as far as the index knows.
struct SegmentUse {
    u32 segment = 0, records = 0;
    u64 bytes = 0, used_bytes = 0;  // of all, and of what was used since it was written
    u64 last_expiry = 0;            // ms since the epoch; the highest number there is: never
};

// A record that is to be kept when its segment goes.
struct KeptRow {
    std::vector<u8> key;
    u32 ns = 0;
    u64 seq = 0, offset = 0, length = 0;
    u32 version = 0, epoch = 0;
    u16 tags[kTags] = {};
};

struct TagState {
    u16 slot;
    u64 seq;  // records with that tag and a lower number are not there
};

struct HolderState {
    std::string name;
    u64 limit, bytes;
};

// Room for a value that is small enough to be copied at once.
struct Small {
    u8* to;
    size_t room;
    size_t size = 0;  // of the value that was copied
    Identity* identity = nullptr;  // if given, becomes that of the record, if a copy of it may be kept
};

enum class Lookup : u8 { hit, miss, below };
// replaced_on_disk: the caller has to delete an older record's row, and then to pay().
// refused: a promotion of what may be older than a change made here.
enum class Published : u8 { stored, replaced_on_disk, present, refused };

// A record that was found in a tier that the index knows nothing of: it is stored if the key is absent, and if it can't be
// older than what was put or removed here.
struct Promotion {
    u64 written;  // when, in ns since the Unix epoch
    u64 low;      // Store::low() before that tier was asked
    u32 epoch;    // of the namespace, then
};

struct StoreStats {
    u64 hits = 0, misses = 0, puts = 0, deletes = 0, evictions = 0, expired = 0, demotions = 0, entries = 0;
    u64 corrupt = 0, loads = 0, load_bytes = 0, dirty_bytes = 0;
    u64 reaped_clients = 0, reaped_pins = 0, reaped_blocks = 0, rebuilt_shards = 0, rebuilt_policies = 0,
        rebuilt_allocators = 0;
    u64 pins = 0, reservations = 0, clients = 0;  // pins and reservations of this process
    u64 index_bytes = 0;
    u64 record_bytes = 0;  // of the records in memory
    CountingBloom::Figures debts{};
    Allocator::Usage memory{};

    double utilisation() const { return static_cast<double>(record_bytes) / static_cast<double>(memory.total); }
};

}  // namespace kvstrata
