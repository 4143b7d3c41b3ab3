// The memory tier and the host's index, as one object per process and mapping.
//
// Every verb locks for as long as it looks something up or changes a reference, never while it copies: a reader pins
// the record, a writer fills a block that nobody sees before it is published.
#pragma once

#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "handles.hpp"
#include "index.hpp"

namespace kvstrata {

inline constexpr u32 kFetched = 24;  // cache lines of a record that are asked for at once, before the first has come
inline void fetch_to_write(const u8* block, u32 units) {
    for (u32 unit = 0; unit < std::min(units, kFetched); ++unit) __builtin_prefetch(block + unit * kUnit, 1);
}

class Store {
public:
    static std::shared_ptr<Store> open_private(const StoreOptions& options);
    // Others can attach once it is marked ready: when what lies below is known to it.
    void mark_ready() { header_.ready.store(1); }
    static std::shared_ptr<Store> create_shared(const std::string& file, const StoreOptions& options);
    static std::shared_ptr<Store> attach_shared(const std::string& file);
    ~Store();

    // ---- Namespaces
    // Opens or makes one; id 0 chooses a free number. A newer version makes the older records unreachable.
    Space open_namespace(u32 id, const std::string& name, u32 version, const NamespaceOptions& options);
    // Makes one known that the catalog knows, before anybody opens it.
    void restore_namespace(u32 id, const std::string& name, u32 version, u32 epoch, bool immutable);
    u32 epoch(Space space) const;
    // The epoch, if nobody has said yet that it outlasts a restart: whoever writes or removes here has to see to it
    // first, and then to say so. Else 0.
    u32 undurable_epoch(u32 id) const;
    void epoch_is_durable(u32 id, u32 epoch);
    Space current_space(u32 id) const;    // as whoever opens it now gets it
    std::pair<u64, u64> usage(u32 id) const;  // records and bytes in memory

    // ---- Reading. `pin` is empty before, and after unless it was a hit.
    // With `small`, a value for which it has room is copied there instead, under the lock: for so little, that is cheaper
    // than a pin. Without `uses`, it counts for nothing.
    Lookup acquire(Space space, Key key, Pin& pin, Small* small, Uses* uses) {
        return acquire(space, key, index_.hash(space.id, key), pin, small, uses);
    }
    Lookup acquire(Space space, Key key, u32 hash, Pin& pin, Small* small, Uses* uses);
    // The hashes of keys that are looked up next. What the lookups will touch is fetched meanwhile, for all at once: with
    // `records`, also the start of each record.
    template <class NextKey>  // NextKey: (size_t) -> Key
    void look_ahead(Space space, size_t count, NextKey&& key, u32* hashes, bool records) const;
    bool contains(Space space, Key key);
    template <class NextKey>  // NextKey: (size_t) -> Key
    size_t contains_prefix(Space space, size_t count, NextKey&& key);

    // ---- Copies that are kept elsewhere (identity.cpp)
    Identity identify(const Pin& pin) const { return identify(pin.entry_); }
    // Needs no lock: whether this record, of this namespace and version, would be found now. Not for one identity from
    // several threads at once.
    bool holds(Space space, const Identity& identity) const {
        const Namespace& ns = this->space(space.id);
        return identity.mapping == header_.secret[0] && index_.holds(identity.entry, identity.seq, identity.unchanged) &&
               identity.epoch == ns.epoch.load(std::memory_order_acquire) &&
               space.version == ns.version.load(std::memory_order_acquire) &&
               !((identity.expires || identity.tags[0]) && outlived(identity));
    }
    // Whether so much else was used since `stamp` that a record last used then may be due to leave.
    bool fades(Space space, u32 stamp) const;
    u32 tick() const { return header_.tick.load(std::memory_order_relaxed); }
    // Counts an access to the record, if it is still there; returns the stamp of now.
    u32 refresh(Space space, const Identity& identity);

    // ---- Writing
    // With may_wait false it returns nothing where it would have to wait for the tier below, or to fail.
    std::optional<Reservation> reserve(Space space, Key key, u64 bytes, const PutOptions& options, bool may_wait) {
        return reserve(space, key, index_.hash(space.id, key), bytes, options, may_wait);
    }
    std::optional<Reservation> reserve(Space space, Key key, u32 hash, u64 bytes, const PutOptions& options, bool may_wait);
    // With `keep`, the record is pinned as it is published: for writers whose view of the block outlives the put.
    // Afterwards reservation.header.seq is the number of the record.
    // With `promotion`, only on the conditions that it states.
    Published publish(Reservation& reservation, Pin* keep = nullptr, const Promotion* promotion = nullptr);
    // Whether an immutable namespace has the key already; counts as an access.
    bool present_immutable(Space space, Key key);

    // ---- Removing (removal.cpp)
    struct Removed {
        bool present, on_disk;  // on_disk: the caller has to delete its row, and then to pay()
    };
    void require_current(Space space) const;  // else throws VersionConflict
    Removed remove(Space space, Key key);
    u32 clear(Space space);               // returns the new epoch
    u16 tag_slot(u32 ns, Key tag) const;  // never 0
    // From now on what was put with the tag isn't there. The caller has to make it durable.
    TagState remove_tag(Space space, Key tag);
    void restore_tag(const TagState& tag);
    u32 shards() const { return kShards; }
    std::vector<std::vector<u8>> keys_of(Space space, u32 shard, Key prefix);  // of what is there now
    // Removes what has expired, if it's time to look.
    void remove_expired();

    // ---- Holding (holders.cpp)
    u8 open_holder(const std::string& name, u64 limit);
    bool hold(Space space, Key key, u8 holder);  // false when it isn't in memory; throws TierFull beyond the limit
    bool let_go(Space space, Key key, u8 holder);
    void let_go_of_all(u8 holder);
    void close_holder(u8 holder);
    std::vector<HolderState> holders() const;

    // ---- Promises (promises.cpp)
    enum class Promised : u32 { compute, fetch };  // who computes a value may fetch it meanwhile, and others, too
    // A token when the caller is the one to compute the value now, and has to withdraw() the promise then; nothing when
    // somebody else is at it. When the table is full, everybody may compute.
    std::optional<u64> promise(Space space, Key key, u64 ms, Promised what = Promised::compute);
    void withdraw(Space space, Key key, u64 token, Promised what = Promised::compute);

    // The keys that were used last, youngest first, of all namespaces.
    struct Used {
        u32 ns;
        std::vector<u8> key;
    };
    std::vector<Used> hottest(size_t most);

    // ---- The tier below
    // Waits for up to `timeout` s for the first record, and then for up to `gather` s until it's worth a batch, or somebody waits.
    std::vector<Dirty> take_dirty(size_t most, u64 most_bytes, double timeout, double gather = 0);
    void wake_writer();  // lets take_dirty return at once, though there's nothing
    void write_lazy();   // what this process had better not write before it leaves memory
    size_t write_postponed(u64 most_bytes);  // of what was postponed the oldest, of any process; returns how many records
    // How many of the keys are neither below nor gone, `timeout` s at most being waited for those on their way.
    size_t wait_until_durable(Space space, size_t count, const Key* keys, double timeout);
    bool still_live(const Dirty& dirty) { return still_live(dirty.pin.entry(), dirty.seq); }
    bool still_live(u32 entry, u64 seq);
    // Nobody knows whether the tier below has it: whoever removes it deletes its row all the same. Before it is settled.
    void doubt(const Dirty& dirty) { index_.borrow(index_.entry(dirty.pin.entry()).hash); }
    void tags_of(const Pin& pin, u16* tags) const { std::memcpy(tags, index_.entry(pin.entry()).tags, sizeof(Entry::tags)); }
    // segment 0: it could not be written. `encoded`: bytes that it has there, if its payload isn't the value itself; else 0.
    // `postponed`: nor is it to be forgotten: it may leave memory, and until then `write_postponed` tries it again.
    void settle(Dirty& dirty, u32 segment, u64 offset, u64 encoded = 0, bool postponed = false);
    bool wait_until_settled(double timeout);             // whether all that this process has put is below
    u64 demote_all();                                    // what lies below leaves memory, where nobody has it pinned
    std::optional<Location> locate(Space space, Key key);
    // Claims the loading of a record; false when somebody else is at it, unless `take_over`.
    bool claim_load(const Location& location, bool take_over, LoadClaim& claim);
    std::optional<Loading> begin_load(Space space, Key key, const Location& location, LoadClaim&& claim = {});
    // Throws CorruptRecord. `payload_crc` is what the caller found the payload's sum to be; without, it is taken here.
    Pin commit_load(Loading& loading, std::optional<u32> payload_crc = {});
    bool insert_disk(const DiskRow& row);                 // false when there's no room for its entry
    bool forget_disk(u32 ns, Key key, u64 seq);
    u64 drop_segment(u32 segment);
    // ---- Cleaning the tier below (cleaning.cpp)
    std::vector<SegmentUse> segments_in_use();
    std::vector<KeptRow> rows_of(u32 segment, bool used_only);  // of what still counts
    bool move_on_disk(const KeptRow& row, u32 from, u32 to, u64 offset);  // false when it's no more there
    void pay(u32 ns, Key key);  // the row that a put or removal said is, or may be, on disk is gone for good
    void raise_seq(u64 above);  // so that the next is higher
    u64 next_seq() { return header_.seq.fetch_add(1); }
    void count_corrupt() { header_.corrupt.fetch_add(1); }
    u32 seed() const { return header_.seed; }
    void set_seed(u32 seed) { header_.seed = seed; }

    // ---- Tiers elsewhere, which the index knows nothing of (remote.cpp)
    void watch();                          // from now on changes are written down
    u64 last_change(Space space, Key key) const;  // the number of the last put or removal of the key, or of another in its slot
    void change_all(Space space) { note_change(index_.hash(space.id, {})); }  // as if every key were removed, for promotions
    u64 last_change_of_all(Space space) const;
    u64 next_number() const { return header_.seq.load(); }
    // Changes of this process from this number on may not have got there. Set before the change; 0: all have.
    void set_unsent(u64 from) { clients_.mine().unsent.store(from); }
    u64 low() const;                       // all changes below this number have got there
    bool trusts(Space space, Key key, const Promotion& promotion) const {
        return trusts(space, index_.hash(space.id, key), promotion);
    }
    void distrust(u64 written_before) { raise_to(header_.distrusted, written_before); }  // ns since the Unix epoch
    u64 distrusted() const;                // the latest such time of any key

    // ---- Life
    u32 reap();          // undoes what dead processes left; returns how many there were
    // In a forked child: gives up this attachment, which is the parent's, without touching what it holds.
    void leave_to_parent();
    bool left_to_parent() const { return clients_.self() == ~0u; }
    std::shared_ptr<Store> attach_again() const;  // another attachment to the same mapping
    void assume_exclusive() const { region_->assume_exclusive(); }  // for tests: see Region
    void use_huge_pages() const { region_->use_huge_pages(); }
    bool alone() const;  // no other process is attached
    StoreStats stats();
    StoreOptions options() const { return {header_.memory, header_.disk}; }

private:
    friend class Pin;
    friend class Block;
    friend class Uses;
    friend class LoadClaim;
    explicit Store(std::unique_ptr<Region> region);
    static std::shared_ptr<Store> start(std::unique_ptr<Region> region, bool fresh);
    void attach();

    Namespace& space(u32 id) const { return namespaces_[id]; }
    RobustLock lock_policy(u32 id);
    void repair_policy(u32 id);
    const Policy& policy_of(const Namespace& ns) const { return policy_by_number(ns.acting); }
    Order order_of(Namespace& ns) const {
        return {index_.nodes(), ns.order, region_->at(ns.scratch_at), ns.scratch_bytes};
    }
    void change_policy(u32 id);   // admin and policy locked
    void feed_policy(u32 id);
    void give_scratch(u32 id);
    bool find_scratch(u64 bytes, u64& at) const;
    void reorder(u32 id);
    bool current(const Entry& entry, const Namespace& ns) const;
    Identity identify(u32 at) const;  // pinned, or its shard locked
    bool outlived(const Identity& identity) const;
    bool any_removed(const u16* tags, u64 seq) const;  // since the record of that number was put
    u64 held_by(u8 holder) const;
    void finish_closing(u8 holder);
    u64 promised(Space space, Key key, Promised what) const;
    Promises& promises() const { return *reinterpret_cast<Promises*>(region_->at(header_.promises_at)); }
    void forget_promises(u32 client);
    void write_now(u32 at);
    void end_load(u32 at, u64 seq) noexcept;
    Holder& holder(u8 number) const { return reinterpret_cast<Holder*>(region_->at(header_.holders_at))[number]; }
    std::atomic<u64>& tag(u16 slot) const { return reinterpret_cast<std::atomic<u64>*>(region_->at(header_.tags_at))[slot]; }
    void raise_tag(const TagState& state);
    Changes& changes(u32 hash) const {
        return reinterpret_cast<Changes*>(region_->at(header_.changes_at))[(hash * 0x9E3779B1u) >> 16];
    }
    void note_change(u32 hash, u64 number) {
        if (header_.watched.load(std::memory_order_relaxed)) raise_to(changes(hash).last, number);
    }
    void note_change(u32 hash) {
        if (header_.watched.load(std::memory_order_relaxed)) raise_to(changes(hash).last, next_seq());
    }
    bool trusts(Space space, u32 hash, const Promotion& promotion) const;
    void distrust_unsent(Client& client);  // of one that ends
    void tell(Uses& uses);
    bool in_order(u32 id, const Uses::Hit& hit) const;
    void claim(u32 at, Lease& lease, Pin& pin);
    bool unpin(u32 slot, u32 at) noexcept;

    void put_in_order(Namespace& ns, u32 at, u32 depth);  // policy locked
    void take_from_order(Namespace& ns, u32 at, bool evicted);
    void drop(u32 at);                           // shard locked, and not in an order
    void bury(u32 at);
    void free_memory(u32 at, u32 departure);
    void release_through(u32 Entry::* reference, u32 at, u32 units, u32 departure);
    u32 take_departure();
    bool free_block(u32 slot) noexcept;
    void free_put_off();
    void do_what_was_put_off();

    Block take_block(u32 units, Space space, bool may_wait);
    bool may_leave(const Entry& entry) const;
    void leave_memory(u32 at);
    bool vacate(Allocator::Resident resident);
    // Who is to leave before the place is needed, later: not `spared`, nor what is much larger than the place.
    struct Plan {
        std::vector<Allocator::Resident> leaving;
        u32 spared = kNone;
        bool suits(u32 at, u32 its_units, u32 units) const { return at != spared && its_units <= 2 * units; }
    };
    // With a plan, others are put down there instead of being asked to leave at once.
    bool clear_window(u32 victim, u32 units, bool guaranteed_too, Plan* plan = nullptr);
    bool evict_from(u32 id, u32 units, bool guaranteed_too, Plan* plan = nullptr);
    bool evict_one(u32 units, u32 wanted);
    bool evict_oldest(u32 units, bool guaranteed_too, Plan* plan = nullptr);
    void make_room_ahead(u32 stored, u32 units);
    bool evict_entry_of(u32 shard);
    bool evict_keys();
    void leave_index(u32 at);
    bool anything_dirty() const;
    bool wait_for_progress(double seconds);
    void abort_block(u32 slot) noexcept;
    bool give_back_spares();
    struct Waiting {
        u32 entry, units;
        u64 seq;
    };
    bool wanted_often(u32 hash, u32 times);
    void use_unproven(u32 at);
    void enqueue_dirty(const Waiting& waiting);
    bool enough_dirty() const;
    template <class Done>
    bool wait_for_settled(std::unique_lock<std::mutex>& lock, double seconds, Done&& done);
    void settled(u64 bytes);
    void count_namespace(u32 id);

    u32 reap_dead();
    void reap_client(u32 slot);
    void sweep(u32 dead_owner);

    std::unique_ptr<Region> region_;
    Header& header_;
    Allocator allocator_;
    Clients clients_;
    Index index_;
    Namespace* namespaces_;
    u32 capacity_units_;

    std::atomic<bool> unburied_{false};  // zombies are left for which this process had no slot
    std::atomic<u32> next_shard_{0};  // of which evict_keys forgets some

    struct Ahead {  // of what will be wanted: see make_room_ahead
        std::atomic<u32> units{0};     // of the largest block that was taken lately
        std::atomic<bool> due{false};  // such a one was taken since
        std::mutex mutex;              // of the following
        Plan plan;
        u32 pause = 0;  // puts to be left alone, since nothing could leave
    };
    Ahead ahead_;

    std::mutex dirty_mutex_;
    std::condition_variable dirty_ready_, dirty_settled_;
    std::deque<Waiting> dirty_;  // oldest first
    u64 dirty_units_ = 0;        // of these
    struct {
        size_t records = 0;
        u64 bytes = 0;
    } batch_;                    // what the writer takes at once
    u64 settled_ = 0;            // how many
    u32 waiting_ = 0;            // threads that wait for some to be settled
    bool woken_ = false;
};

template <class NextKey>
void Store::look_ahead(Space wanted, size_t count, NextKey&& key, u32* hashes, bool records) const {
    for (size_t i = 0; i < count; ++i) index_.prefetch(hashes[i] = index_.hash(wanted.id, key(i)));
    for (size_t i = 0; i < count; ++i) index_.prefetch_entry(hashes[i]);
    for (size_t i = 0; records && i < count; ++i) index_.prefetch_record(hashes[i]);
}

template <class NextKey>
size_t Store::contains_prefix(Space wanted, size_t count, NextKey&& key) {
    constexpr size_t kAhead = 32;
    const Namespace& ns = space(wanted.id);
    if (wanted.version != ns.version.load()) return 0;
    u32 hashes[kAhead];
    for (size_t start = 0; start < count; start += kAhead) {
        const size_t n = std::min(kAhead, count - start);
        look_ahead(wanted, n, [&](size_t i) { return key(start + i); }, hashes, false);
        for (size_t i = 0; i < n; ++i) {
            const RobustLock held = index_.lock(Index::shard_of(hashes[i]));
            const u32 at = index_.find(hashes[i], wanted.id, key(start + i));
            if (!at || !current(index_.entry(at), ns)) return start + i;
        }
    }
    return count;
}

}  // namespace kvstrata
