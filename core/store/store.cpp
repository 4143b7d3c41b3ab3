// Opening, namespaces, reading and writing. Eviction, the tier below and reaping have files of their own.
#include "store.hpp"

#include <cstring>

#include "base/crc32c.hpp"
#include "base/clock.hpp"
#include "base/failpoints.hpp"

namespace kvstrata {

// ---- Opening ------------------------------------------------------------------------------------

Store::Store(std::unique_ptr<Region> region)
    : region_(std::move(region)),
      header_(region_->header()),
      allocator_(*region_),
      clients_(*region_),
      index_(*region_, allocator_, clients_),
      namespaces_(reinterpret_cast<Namespace*>(region_->at(header_.namespaces_at))),
      capacity_units_(static_cast<u32>((header_.end - header_.data_at - kPage) / kUnit)) {}

std::shared_ptr<Store> Store::start(std::unique_ptr<Region> region, bool fresh) {
    std::shared_ptr<Store> store(new Store(std::move(region)));
    if (fresh) {
        Clients::init(*store->region_);
        store->header_.admin.init();
        store->header_.seq.store(1);
        store->header_.seed = static_cast<u32>(store->header_.secret[1]);
        store->allocator_.init();
        store->index_.init();
        store->promises().mutex.init();
        for (u32 id = 0; id < kMaxNamespaces; ++id) store->namespaces_[id].mutex.init();
    }
    store->attach();
    return store;
}

std::shared_ptr<Store> Store::open_private(const StoreOptions& options) {
    return start(Region::create_private(options), true);
}
std::shared_ptr<Store> Store::create_shared(const std::string& file, const StoreOptions& options) {
    return start(Region::create_shared(file, options), true);
}
std::shared_ptr<Store> Store::attach_shared(const std::string& file) {
    auto region = Region::attach_shared(file);
    if (region->header().ready.load() != 1) throw FormatError(file + " was never completed; remove it");
    return start(std::move(region), false);
}

void Store::attach() {
    const RobustLock held(header_.admin, [] {});
    clients_.attach();
    reap_dead();
    if (alone())  // nobody has a namespace open: its options may be chosen anew
        for (u32 id = 1; id < kMaxNamespaces; ++id) namespaces_[id].configured = 0, namespaces_[id].guarantee.store(0);
}

Store::~Store() {
    if (clients_.self() == ~0u) return;
    try {
        do_what_was_put_off();
        const RobustLock held(header_.admin, [] {});
        sweep(clients_.self());
        give_back_spares();
        distrust_unsent(clients_.mine());
        clients_.detach();
    } catch (...) {
        // The lock on the slot goes with the descriptor; the next reaper finds a dead client.
    }
}

void Store::leave_to_parent() {
    clients_.forget();
    region_->leave_locks();  // they must not live on in this process
}

std::shared_ptr<Store> Store::attach_again() const { return start(region_->reopen(), false); }

bool Store::alone() const {
    for (u32 slot = 0; slot < kMaxClients; ++slot)
        if (slot != clients_.self() && region_->client_lock_held_elsewhere(slot)) return false;
    return true;
}

// ---- Namespaces ---------------------------------------------------------------------------------

RobustLock Store::lock_policy(u32 id) {
    return RobustLock(space(id).mutex, [this, id] { repair_policy(id); });
}

Space Store::open_namespace(u32 id, const std::string& name, u32 version, const NamespaceOptions& options) {
    if (name.empty() || name.size() > kMaxName)
        throw InvalidValue("a namespace's name has 1 to " + std::to_string(kMaxName) + " bytes, not " +
                           std::to_string(name.size()));
    const u32 policy = policy_number(options.policy.c_str());
    if (policy == kUnknownPolicy) throw InvalidValue("unknown policy " + options.policy);
    const RobustLock held(header_.admin, [] {});
    u32 chosen = id;
    for (u32 at = 1; at < kMaxNamespaces && !id; ++at) {  // those restored from a catalog may leave gaps
        const Namespace& ns = namespaces_[at];
        if (!ns.defined.load()) {
            if (!chosen) chosen = at;
        } else if (ns.name_len == name.size() && std::memcmp(ns.name, name.data(), name.size()) == 0) {
            chosen = at;
            break;
        }
    }
    if (!chosen || chosen >= kMaxNamespaces)
        throw InvalidValue("a cache holds at most " + std::to_string(kMaxNamespaces - 1) + " namespaces");
    Namespace& ns = namespaces_[chosen];
    const RobustLock policy_held = lock_policy(chosen);
    if (!ns.defined.load()) {
        std::memcpy(ns.name, name.data(), name.size());
        ns.name_len = static_cast<u32>(name.size());
        ns.version.store(version);
        ns.epoch.store(1);
        ns.durable_epoch.store(1);
        count_namespace(chosen);
    }
    if (version < ns.version.load())
        throw VersionConflict("namespace '" + name + "' is at version " + std::to_string(ns.version.load()) +
                              ", which is newer than " + std::to_string(version));
    if (!ns.configured) {
        const bool reorder = ns.policy != policy;
        ns.policy = policy;
        u64 promised = options.guarantee;
        for (u32 at = 1; at < header_.namespaces.load(); ++at)
            if (at != chosen && namespaces_[at].configured) promised += namespaces_[at].guarantee.load();
        if (promised > header_.memory / 4 * 3)
            throw ConfigError("guarantees of " + std::to_string(promised) + " bytes together are more than 3/4 of the memory");
        ns.guarantee.store(options.guarantee);
        ns.quota = options.quota;
        ns.immutable = options.immutable;
        ns.admission = options.admission;
        ns.write_back = options.write_back;
        ns.remote = options.remote;
        ns.defined.store(1);  // first: a slot that isn't defined is given to the next name
        KVSTRATA_COMMIT("store.defined");
        ns.configured = 1;
        if (reorder) change_policy(chosen);
    } else {
        std::string differs;
        if (ns.policy != policy) differs = std::string("policy '") + policy_by_number(ns.policy).name() + "'";
        else if (ns.quota != options.quota) differs = "quota " + std::to_string(ns.quota);
        else if (ns.guarantee.load() != options.guarantee) differs = "guarantee " + std::to_string(ns.guarantee.load());
        else if (ns.immutable != u32{options.immutable}) differs = ns.immutable ? "immutable=True" : "immutable=False";
        else if (ns.admission != options.admission)
            differs = ns.admission == 1 ? "admission='all'" : ns.admission == 2 ? "admission='reused'" : "admission='frequent'";
        else if (ns.write_back != u32{options.write_back}) differs = ns.write_back ? "write='back'" : "another write than 'back'";
        else if (ns.remote != u32{options.remote}) differs = ns.remote ? "remote=True" : "remote=False";
        if (!differs.empty())
            throw ConfigMismatch("namespace '" + name + "' is already open with " + differs + "; use the same");
    }
    if (version > ns.version.load()) {
        ns.epoch.fetch_add(1);
        KVSTRATA_COMMIT("store.epoch");  // the new version must never be there with the old records
        ns.version.store(version);
    }
    return {chosen, version};
}

void Store::restore_namespace(u32 id, const std::string& name, u32 version, u32 epoch, bool immutable) {
    if (!id || id >= kMaxNamespaces || name.empty() || name.size() > kMaxName) return;
    const RobustLock held(header_.admin, [] {});
    const RobustLock policy_held = lock_policy(id);
    Namespace& ns = namespaces_[id];
    if (ns.defined.load()) return;
    std::memcpy(ns.name, name.data(), name.size());
    ns.name_len = static_cast<u32>(name.size());
    ns.version.store(version);
    ns.epoch.store(epoch);
    ns.durable_epoch.store(epoch);
    ns.immutable = immutable;
    ns.defined.store(1);
    count_namespace(id);
}

void Store::count_namespace(u32 id) { header_.namespaces.store(std::max(header_.namespaces.load(), id + 1)); }

Space Store::current_space(u32 id) const {
    if (!id || id >= kMaxNamespaces) throw InvalidValue("there is no namespace " + std::to_string(id));
    return {id, space(id).version.load()};
}

u32 Store::undurable_epoch(u32 id) const {
    const u32 epoch = space(id).epoch.load();
    return header_.disk && space(id).durable_epoch.load() < epoch ? epoch : 0;
}

void Store::epoch_is_durable(u32 id, u32 epoch) {
    raise_to(space(id).durable_epoch, epoch);
}

u32 Store::epoch(Space wanted) const { return space(wanted.id).epoch.load(); }

std::pair<u64, u64> Store::usage(u32 id) const { return {space(id).records.load(), space(id).bytes.load()}; }

// ---- Writing ------------------------------------------------------------------------------------

Block::~Block() {
    if (store_) store_->abort_block(slot_);
}
u8* Block::bytes() const {
    return store_->region_->data() + u64{store_->clients_.mine().in_flight[slot_].block} * kUnit;
}
u32 Block::units() const { return store_->clients_.mine().in_flight[slot_].units; }

std::optional<Reservation> Store::reserve(Space wanted, Key key, u32 hash, u64 bytes, const PutOptions& options, bool may_wait) {
    const Namespace& ns = space(wanted.id);
    const u64 length = record_bytes(key.size(), bytes);
    if (bytes > kMaxPayload || length > u64{capacity_units_} * kUnit)
        throw TierFull("memory", bytes > kMaxPayload ? bytes : length, u64{capacity_units_} * kUnit);
    if (ns.quota && length > ns.quota) throw TierFull("memory (quota of the namespace)", length, ns.quota);
    Reservation reservation{wanted, hash, {}, options, {}, {}};
    index_.prefetch(hash);
    reservation.block = take_block(static_cast<u32>(length / kUnit), wanted, may_wait);
    if (!reservation.block) return std::nullopt;
    u8* const record = reservation.block.bytes();
    fetch_to_write(record, reservation.block.units());
    index_.prefetch_entry(hash);
    if (key.size() > kInlineKey) {
        reservation.key_block = take_block(static_cast<u32>(align_up(key.size(), kUnit) / kUnit), wanted, may_wait);
        if (!reservation.key_block) return std::nullopt;
        std::memcpy(reservation.key_block.bytes(), key.data(), key.size());
    }
    RecordHeader& header = reservation.header;
    begin_frame(record, header, key, bytes);
    header.ns = wanted.id;
    header.version = wanted.version;
    header.flags = static_cast<u8>((ns.immutable ? kRecordImmutable : 0) | (options.tags[0] ? kRecordTagged : 0));
    header.tag_check = check_of_tags(options.tags);
    header.expires = options.expires;
    header.value_len = bytes;
    return reservation;
}

Published Store::publish(Reservation& reservation, Pin* keep, const Promotion* promotion) {
    std::optional<Lease> lease;
    if (keep) lease.emplace(clients_.pins);
    const Space wanted = reservation.space;
    const Key key = reservation.key();
    Namespace& ns = space(wanted.id);
    const u32 hash = reservation.hash;
    const u32 shard_number = Index::shard_of(hash);
    index_.prefetch_around(hash);
    RecordHeader& header = reservation.header;
    const u64 length = u64{reservation.block.units()} * kUnit;
    if (ns.hungry.load(std::memory_order_relaxed)) feed_policy(wanted.id);
    const bool writes = header_.disk && (ns.admission <= 1 || wanted_often(hash, ns.admission)), at_once = writes && !ns.write_back;
    Published result = Published::stored;
    u32 at = kNone;
    for (int tries = 0;; ++tries) {
        {
            const RobustLock policy_held = lock_policy(wanted.id);
            if (wanted.version != ns.version.load()) {
                if (promotion) return Published::refused;
                throw VersionConflict("this namespace has moved on to version " + std::to_string(ns.version.load()));
            }
            const RobustLock held = index_.lock(shard_number);
            Shard& shard = index_.shard(shard_number);
            const u32 old = index_.find(hash, wanted.id, key);
            if (old && (ns.immutable || promotion) && current(index_.entry(old), ns)) return Published::present;
            if (promotion && !trusts(wanted, hash, *promotion)) return Published::refused;
            at = index_.take_entry(shard_number);
            if (at) {
                header.epoch = ns.epoch.load();
                header.seq = next_seq();  // here, so that the newest number is the one that stays
                if (!promotion && !ns.immutable) note_change(hash, header.seq);
                seal(header, key.data(), header_.seed);
                std::memcpy(reservation.block.bytes(), &header, sizeof header);
                if ((old && may_be_on_disk(index_.entry(old))) || index_.owes(hash) || undurable_epoch(wanted.id)) {
                    result = Published::replaced_on_disk;
                    index_.borrow(hash);
                    KVSTRATA_COMMIT("store.borrowed");
                }
                if (old) {
                    if (index_.entry(old).memory) take_from_order(ns, old, false);
                    drop(old);
                }
                Entry& entry = index_.entry(at);
                index_.set_seq(at, header.seq);
                entry.expires = header.expires;
                entry.hash = hash;
                entry.units = reservation.block.units();
                entry.disk_units = 0;
                entry.segment = entry.position = entry.pins = 0;
                entry.epoch = header.epoch;
                entry.ns = static_cast<u16>(wanted.id);
                entry.key_len = static_cast<u16>(key.size());
                entry.flags = static_cast<u8>((ns.immutable ? kImmutable : 0) | (writes ? kDirty : header_.disk ? kUnproven : 0) |
                                                (writes && !at_once ? kLazy : 0));
                entry.owner = static_cast<u8>(clients_.self());
                entry.holder = 0;
                std::memcpy(entry.tags, reservation.options.tags, sizeof entry.tags);
                entry.node = PolicyNode::fresh(0, reservation.options.cost);
                InFlight& flight = clients_.mine().in_flight[reservation.block.slot_];
                flight.entry = at;
                entry.memory = flight.block;
                allocator_.set_owner(flight.block, flight.units, at);
                InFlight* key_flight = nullptr;
                if (reservation.key_block) {
                    key_flight = &clients_.mine().in_flight[reservation.key_block.slot_];
                    key_flight->entry = at;
                    entry.key_block = key_flight->block;
                    allocator_.set_owner(key_flight->block, key_flight->units, at);
                } else {
                    std::memcpy(entry.key, key.data(), key.size());
                }
                KVSTRATA_COMMIT("store.filled");
                index_.link(at);
                KVSTRATA_COMMIT("store.published");
                flight.block = kNone;
                if (key_flight) key_flight->block = kNone;
                put_in_order(ns, at, reservation.options.depth);
                if (keep) claim(at, *lease, *keep);
                ++shard.puts;
            }
        }
        if (at) break;
        if (tries == 3 || !evict_entry_of(shard_number)) throw TierFull("memory (index)", 1, 0);
    }
    for (Block* block : {&reservation.block, &reservation.key_block}) {
        if (!*block) continue;
        clients_.end_arrival(block->slot_);
        block->store_ = nullptr;
    }
    if (at_once) {
        clients_.mine().dirty_bytes.fetch_add(length);
        enqueue_dirty({at, static_cast<u32>(length / kUnit), header.seq});
    }
    try {
        make_room_ahead(at, static_cast<u32>(length / kUnit));
    } catch (const TierUnavailable&) {
        // Somebody who is stopped holds a lock. The next put needs it, and says so; this one has been stored.
    }
    return result;
}

}  // namespace kvstrata
