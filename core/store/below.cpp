// What passes between memory and the tier below: records to be written, and records to be loaded.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/failpoints.hpp"
#include "store.hpp"

namespace kvstrata {

// ---- Down ---------------------------------------------------------------------------------------

// The writer is woken for the first of a batch, and when there is enough for one.
void Store::enqueue_dirty(const Waiting& waiting) {
    bool tell;
    {
        const std::lock_guard lock(dirty_mutex_);
        dirty_.push_back(waiting);
        dirty_units_ += waiting.units;
        tell = dirty_.size() == 1 || enough_dirty();
    }
    if (tell) dirty_ready_.notify_one();
}

// Whether a batch is worth it. `dirty_mutex_` is held.
bool Store::enough_dirty() const {
    return woken_ || waiting_ || dirty_.size() >= batch_.records || dirty_units_ * kUnit >= std::min(batch_.bytes, header_.memory / 16);
}

// Waits for records to be settled; no batch is gathered meanwhile.
template <class Done>
bool Store::wait_for_settled(std::unique_lock<std::mutex>& lock, double seconds, Done&& done) {
    ++waiting_;
    dirty_ready_.notify_all();
    const bool result = dirty_settled_.wait_for(lock, std::chrono::duration<double>(seconds), done);
    --waiting_;
    return result;
}

bool Store::wait_for_progress(double seconds) {
    std::unique_lock lock(dirty_mutex_);
    const u64 before = settled_;
    return wait_for_settled(lock, seconds, [&] { return settled_ != before; });
}

// Hands a lazy or postponed record to this process's writer. Its shard is locked.
void Store::write_now(u32 at) {
    Entry& entry = index_.entry(at);
    entry.flags = static_cast<u8>((entry.flags & ~kLazy) | kDirty);
    entry.owner = static_cast<u8>(clients_.self());
    clients_.mine().dirty_bytes.fetch_add(u64{entry.units} * kUnit);
    enqueue_dirty({at, entry.units, entry.seq});
}

void Store::write_lazy() {
    for (u32 number = 0; number < kShards; ++number) {
        const RobustLock held = index_.lock(number);
        index_.each_of(number, [&](u32 at, const Entry& entry) {
            if (entry.state == EntryState::live && is_lazy(entry) && entry.owner == clients_.self()) write_now(at);
        });
    }
}

size_t Store::write_postponed(u64 most_bytes) {
    std::vector<Waiting> found;
    for (u32 number = 0; number < kShards; ++number) {
        const RobustLock held = index_.lock(number);
        index_.each_of(number, [&](u32 at, const Entry& entry) {
            if (entry.state == EntryState::live && is_postponed(entry)) found.push_back({at, entry.units, entry.seq});
        });
    }
    std::sort(found.begin(), found.end(), [](const Waiting& a, const Waiting& b) { return a.seq < b.seq; });
    u64 bytes = 0;
    size_t queued = 0;
    for (const auto& [at, units, seq] : found) {
        if (queued && bytes + u64{units} * kUnit > std::min(most_bytes, header_.memory / 8)) break;
        const RobustLock held = index_.lock(index_.shard_holding(at));
        const Entry& entry = index_.entry(at);
        if (entry.state != EntryState::live || entry.seq != seq || !is_postponed(entry)) continue;
        write_now(at);
        bytes += u64{units} * kUnit;
        ++queued;
    }
    return queued;
}

void Store::wake_writer() {
    {
        const std::lock_guard lock(dirty_mutex_);
        woken_ = true;
    }
    dirty_ready_.notify_all();
}

// `bytes` are no longer waiting: written, failed or gone.
void Store::settled(u64 bytes) {
    clients_.mine().dirty_bytes.fetch_sub(bytes);
    {
        const std::lock_guard lock(dirty_mutex_);
        ++settled_;
    }
    dirty_settled_.notify_all();
}

std::vector<Dirty> Store::take_dirty(size_t most, u64 most_bytes, double timeout, double gather) {
    std::vector<Waiting> wanted;
    {
        std::unique_lock lock(dirty_mutex_);
        batch_ = {most, most_bytes};
        dirty_ready_.wait_for(lock, std::chrono::duration<double>(timeout), [this] { return !dirty_.empty() || woken_; });
        if (!dirty_.empty()) dirty_ready_.wait_for(lock, std::chrono::duration<double>(gather), [this] { return enough_dirty(); });
        woken_ = false;
        while (!dirty_.empty() && wanted.size() < most) {
            wanted.push_back(dirty_.front());
            dirty_units_ -= dirty_.front().units;
            dirty_.pop_front();
        }
    }
    std::vector<Dirty> taken;
    taken.reserve(wanted.size());
    u64 bytes = 0;
    size_t done = 0;
    try {
        for (; done < wanted.size() && (taken.empty() || bytes < most_bytes); ++done) {
            const auto [at, units, seq] = wanted[done];
            Pin pin;
            {
                Lease lease(clients_.pins);
                const RobustLock held = index_.lock(index_.shard_holding(at));
                Entry& entry = index_.entry(at);
                if (entry.state == EntryState::live && entry.seq == seq && (entry.flags & kDirty)) {
                    claim(at, lease, pin);
                    entry.flags |= kWriting;
                    bytes += u64{units} * kUnit;
                }
            }
            if (pin) {
                taken.push_back({std::move(pin), seq});
            } else {
                settled(u64{units} * kUnit);
            }
        }
    } catch (const TierUnavailable&) {
        // All pins are in use, or a lock can't be had: what is left has to wait for the next call.
    }
    if (done < wanted.size()) {
        const std::lock_guard lock(dirty_mutex_);
        for (size_t i = wanted.size(); i > done; --i) {
            dirty_.push_front(wanted[i - 1]);
            dirty_units_ += wanted[i - 1].units;
        }
    }
    return taken;
}

bool Store::still_live(u32 at, u64 seq) {
    const RobustLock held = index_.lock(index_.shard_holding(at));
    const Entry& entry = index_.entry(at);
    return entry.state == EntryState::live && entry.seq == seq && current(entry, space(entry.ns));
}

void Store::settle(Dirty& dirty, u32 segment, u64 offset, u64 encoded, bool postponed) {
    const u32 at = dirty.pin.entry();
    const u64 bytes = dirty.pin.record_size();
    {
        const RobustLock held = index_.lock(index_.shard_holding(at));
        Entry& entry = index_.entry(at);
        if (entry.state == EntryState::live) {
            entry.segment = segment;
            entry.position = static_cast<u32>(offset / kUnit);
            entry.disk_units = encoded ? static_cast<u32>(encoded / kUnit) : entry.units;
            entry.flags = static_cast<u8>((entry.flags & ~kEncoded) | (encoded ? kEncoded : 0));
        }
        entry.flags &= static_cast<u8>(~(kDirty | kWriting | kUsed));
        if (postponed && entry.state == EntryState::live) entry.flags |= kLazy;
    }
    dirty.pin = Pin();
    settled(bytes);
}

bool Store::wait_until_settled(double timeout) {
    std::unique_lock lock(dirty_mutex_);
    return wait_for_settled(lock, timeout, [this] { return clients_.mine().dirty_bytes.load() == 0; });
}

size_t Store::wait_until_durable(Space wanted, size_t count, const Key* keys, double timeout) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout);
    size_t missing = 0;
    for (size_t i = 0; i < count; ++i) {
        const u32 hash = index_.hash(wanted.id, keys[i]);
        for (;;) {
            u64 before;
            {
                const std::lock_guard lock(dirty_mutex_);
                before = settled_;
            }
            bool waiting = false, there = false, below = false;
            {
                const RobustLock held = index_.lock(Index::shard_of(hash));
                const u32 at = index_.find(hash, wanted.id, keys[i]);
                if (at) {
                    if (is_lazy(index_.entry(at))) write_now(at);
                    there = true;
                    waiting = index_.entry(at).flags & kDirty;
                    below = index_.entry(at).segment;
                }
            }
            if (!waiting) {
                missing += there && !below;
                break;
            }
            std::unique_lock lock(dirty_mutex_);
            // Another process's is not signalled here: look again after a while.
            wait_for_settled(lock, 0.05, [&] { return settled_ != before; });
            if (std::chrono::steady_clock::now() >= until) {
                ++missing;
                break;
            }
        }
    }
    return missing;
}

// ---- Up -----------------------------------------------------------------------------------------

std::optional<Location> Store::locate(Space wanted, Key key) {
    Namespace& ns = space(wanted.id);
    const u32 hash = index_.hash(wanted.id, key);
    const RobustLock held = index_.lock(Index::shard_of(hash));
    const u32 at = index_.find(hash, wanted.id, key);
    if (!at || wanted.version != ns.version.load()) return std::nullopt;
    const Entry& entry = index_.entry(at);
    if (entry.memory || !entry.segment || !current(entry, ns)) return std::nullopt;
    return Location{at, entry.seq, entry.segment, u64{entry.position} * kUnit, u64{entry.disk_units} * kUnit,
                    bool(entry.flags & kEncoded)};
}

LoadClaim::~LoadClaim() {
    if (store_) store_->end_load(entry_, seq_);
}

bool Store::claim_load(const Location& location, bool take_over, LoadClaim& claim) {
    const RobustLock held = index_.lock(index_.shard_holding(location.entry));
    Entry& entry = index_.entry(location.entry);
    if (entry.state != EntryState::live || entry.seq != location.seq || entry.memory) return false;
    const bool others = entry.flags & kLoading && !clients_.is_dead(entry.owner) && clients_[entry.owner].used.load();
    if (others && !take_over) return false;
    entry.flags |= kLoading;
    entry.owner = static_cast<u8>(clients_.self());
    claim.store_ = this;
    claim.entry_ = location.entry;
    claim.seq_ = location.seq;
    return true;
}

void Store::end_load(u32 at, u64 seq) noexcept {
    if (clients_.self() == ~0u) return;  // a forked child: the claim is the parent's
    try {
        const RobustLock held = index_.lock(index_.shard_holding(at));
        Entry& entry = index_.entry(at);
        if (entry.state != EntryState::free && entry.seq == seq && entry.flags & kLoading && entry.owner == clients_.self())
            entry.flags &= static_cast<u8>(~kLoading);
    } catch (...) {
        return;  // the lock can't be had: others take it over when they have waited long enough
    }
}

std::optional<Loading> Store::begin_load(Space wanted, Key key, const Location& location, LoadClaim&& claim) {
    Loading loading{wanted, {key.begin(), key.end()}, location.entry, location.seq, {}, std::move(claim)};
    loading.block = take_block(static_cast<u32>(location.length / kUnit), wanted, false);
    if (!loading.block) return std::nullopt;
    return loading;
}

Pin Store::commit_load(Loading& loading, std::optional<u32> payload_crc) {
    Namespace& ns = space(loading.space.id);
    const u64 length = u64{loading.block.units()} * kUnit;
    RecordHeader header;
    RecordCheck check = check_record(loading.block.bytes(), length, header_.seed, !payload_crc, header);
    if (check == RecordCheck::ok && payload_crc && *payload_crc != header.payload_crc) check = RecordCheck::bad_payload;
    if (check != RecordCheck::ok) throw CorruptRecord(describe(check));
    if (header.ns != loading.space.id || header.seq != loading.seq || header.key_len != loading.key.size() ||
        std::memcmp(loading.block.bytes() + sizeof header, loading.key.data(), loading.key.size()) != 0 ||
        record_bytes(header.key_len, header.stored_len) != length)
        throw CorruptRecord("another record lies in its place");
    if (ns.hungry.load(std::memory_order_relaxed)) feed_policy(loading.space.id);
    Pin pin;
    const u32 at = loading.entry;
    const u32 hash = index_.hash(loading.space.id, loading.key);
    bool loaded = false;
    {
        Lease lease(clients_.pins);
        const RobustLock policy_held = lock_policy(loading.space.id);
        const RobustLock held = index_.lock(Index::shard_of(hash));
        Entry& entry = index_.entry(at);
        if (entry.state == EntryState::live && entry.seq == loading.seq && entry.expires != header.expires)
            throw CorruptRecord("its row in the catalog says another time of expiry");
        if (entry.state == EntryState::live && entry.seq == loading.seq &&
            (check_of_tags(entry.tags) != header.tag_check || bool(entry.tags[0]) != bool(header.flags & kRecordTagged)))
            throw CorruptRecord("its row in the catalog has other tags");
        const bool found = entry.state == EntryState::live && entry.seq == loading.seq && entry.hash == hash && current(entry, ns) &&
                loading.space.version == ns.version.load() && header.epoch == entry.epoch;
        if (found) {
            if (!entry.memory) {
                InFlight& flight = clients_.mine().in_flight[loading.block.slot_];
                flight.entry = at;
                KVSTRATA_COMMIT("store.loaded");
                entry.units = flight.units;
                entry.memory = flight.block;
                allocator_.set_owner(flight.block, flight.units, at);
                entry.flags &= static_cast<u8>(~kLoading);
                KVSTRATA_COMMIT("store.promoted");
                flight.block = kNone;
                put_in_order(ns, at, Policy::kSameDepth);
                loaded = true;
            }
            entry.flags |= kUsed;
            claim(at, lease, pin);
            clients_.mine().hits.fetch_add(1, std::memory_order_relaxed);
        }
    }
    if (loaded) {
        clients_.end_arrival(loading.block.slot_);
        loading.block.store_ = nullptr;
        loading.claim.store_ = nullptr;  // nothing is left to be ended
        header_.loads.fetch_add(1);
        header_.load_bytes.fetch_add(length);
    }
    return pin;
}

// ---- What the tier below says of itself -----------------------------------------------------------

bool Store::insert_disk(const DiskRow& row) {
    if (!row.ns || row.ns >= kMaxNamespaces || row.key.empty() || row.key.size() > kMaxKey || !row.segment ||
        row.length / kUnit > ~u32{0} || row.offset / kUnit > ~u32{0} || row.length < sizeof(RecordHeader))
        return true;  // a row that lies
    Namespace& ns = space(row.ns);
    if (!ns.defined.load() || row.epoch != ns.epoch.load() || row.version != ns.version.load() ||
        any_removed(row.tags, row.seq))
        return true;
    const u32 hash = index_.hash(row.ns, row.key);
    Block key_block;
    if (row.key.size() > kInlineKey) {
        key_block = take_block(static_cast<u32>(align_up(row.key.size(), kUnit) / kUnit), {row.ns, row.version}, false);
        if (!key_block) {
            index_.borrow(hash);  // the row is there, and the index does not tell of it
            return false;
        }
        std::memcpy(key_block.bytes(), row.key.data(), row.key.size());
    }
    const u32 number = Index::shard_of(hash);
    const RobustLock held = index_.lock(number);
    if (index_.find(hash, row.ns, row.key)) return true;
    const u32 at = index_.take_entry(number);
    if (!at) {
        index_.borrow(hash);
        return false;
    }
    Entry& entry = index_.entry(at);
    index_.set_seq(at, row.seq);
    entry.expires = row.expires;
    entry.hash = hash;
    entry.memory = entry.pins = 0;
    entry.units = entry.disk_units = static_cast<u32>(row.length / kUnit);
    entry.segment = row.segment;
    entry.position = static_cast<u32>(row.offset / kUnit);
    entry.epoch = row.epoch;
    entry.ns = static_cast<u16>(row.ns);
    entry.key_len = static_cast<u16>(row.key.size());
    entry.flags = static_cast<u8>((row.flags & kRecordImmutable ? kImmutable : 0) | (row.flags & kRecordEncoded ? kEncoded : 0));
    entry.owner = entry.holder = 0;
    std::memcpy(entry.tags, row.tags, sizeof entry.tags);
    entry.node = PolicyNode::fresh(header_.tick.load(), 1);
    if (key_block) {
        InFlight& flight = clients_.mine().in_flight[key_block.slot_];
        flight.entry = at;
        entry.key_block = flight.block;
        allocator_.set_owner(flight.block, flight.units, at);
        KVSTRATA_COMMIT("store.row");
        index_.link(at);
        flight.block = kNone;
        clients_.end_arrival(key_block.slot_);
        key_block.store_ = nullptr;
    } else {
        std::memcpy(entry.key, row.key.data(), row.key.size());
        index_.link(at);
    }
    return true;
}

bool Store::forget_disk(u32 ns, Key key, u64 seq) {
    const u32 hash = index_.hash(ns, key);
    const RobustLock held = index_.lock(Index::shard_of(hash));
    const u32 at = index_.find(hash, ns, key);
    if (!at || index_.entry(at).seq != seq || !index_.entry(at).segment) return false;
    index_.entry(at).segment = 0;
    if (!index_.entry(at).memory) drop(at);
    return true;
}

u64 Store::drop_segment(u32 segment) {
    u64 dropped = 0;
    for (u32 number = 0; number < kShards; ++number) {
        const RobustLock held = index_.lock(number);
        index_.each_of(number, [&](u32 at, Entry& entry) {
            if (entry.state != EntryState::live || entry.segment != segment) return;
            entry.segment = 0;
            if (!entry.memory) drop(at);
            ++dropped;
        });
    }
    header_.segments_changed.fetch_add(1);
    return dropped;
}

void Store::pay(u32 ns, Key key) { index_.pay(index_.hash(ns, key)); }

void Store::raise_seq(u64 above) { raise_to(header_.seq, above + 1); }

}  // namespace kvstrata
