// This process's place in the mapping: its pins, and its blocks in flight.
//
// What it holds is written down in its slot before it is relied on, so that the others can undo it when it dies.
#pragma once

#include <condition_variable>
#include <mutex>
#include <optional>
#include <vector>

#include "memory/region.hpp"
#include "memory/spares.hpp"

namespace kvstrata {

// Numbers from `first` on to be handed out, within this process.
class SlotPool {
public:
    SlotPool(u32 first, u32 count, const char* what, bool full = true);
    u32 take();                     // waits a little for one to come back; throws TierUnavailable
    std::optional<u32> try_take();  // nothing when all are taken
    void give_back(u32 slot);
    u32 in_use() const;

private:
    std::vector<std::atomic<u64>> free_;  // a bit each
    const u32 first_, count_;
    const char* const what_;
    std::atomic<u32> next_{0};  // the word in which one may be free
    std::atomic<u32> waiting_{0};
    std::mutex mutex_;
    std::condition_variable returned_;
};

// Slots of which what they hold has yet to be given back, since somebody held a lock for too long.
class PutOff {
public:
    explicit PutOff(u32 count) : slots_(0, count, "", false) {}
    void add(u32 slot) {
        slots_.give_back(slot);
        any_.store(true);
    }
    bool any() const { return any_.load(std::memory_order_relaxed); }
    // Takes all that there are now out, and tries each: `give_back(slot)` says whether it could be done, and adds it again if not.
    template <class GiveBack>
    bool retry(GiveBack&& give_back) {
        if (!any_.exchange(false)) return true;
        while (const auto slot = slots_.try_take()) {
            if (give_back(*slot)) continue;
            any_.store(true);  // for those that haven't been tried
            return false;
        }
        return true;
    }

private:
    SlotPool slots_;
    std::atomic<bool> any_{false};
};

// A slot that goes back to its pool unless it is kept.
class Lease {
public:
    explicit Lease(SlotPool& pool) : Lease(pool, pool.take()) {}
    Lease(SlotPool& pool, u32 slot) : pool_(pool), slot_(slot) {}
    ~Lease() {
        if (!kept_) pool_.give_back(slot_);
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    u32 slot() const { return slot_; }
    void keep() { kept_ = true; }

private:
    SlotPool& pool_;
    u32 slot_;
    bool kept_ = false;
};

class Clients {
public:
    explicit Clients(Region& region);

    static void init(Region& region);
    // Takes a slot. Called under the admin lock, when the slots of the dead are empty as far as that could be done.
    void attach();
    // Leaves the slot. What couldn't be given back stays in it, for the next reaper, as if this process had died.
    void detach();
    void settle_counts(Client& client);  // of one that ends
    void forget() { self_ = ~0u; }  // in a forked child: the slot is the parent's

    u32 self() const { return self_; }
    Client& operator[](u32 slot) const;
    Client& mine() const { return (*this)[self_]; }
    // Whether the owner of a used slot is gone.
    bool is_dead(u32 slot) const;

    SlotPool pins{0, kPins, "pins"};
    // For blocks on their way in: taken before any lock.
    SlotPool arrivals{0, kInFlight - kDepartures, "values being written"};
    // For blocks on their way out: taken under locks, and given back without waiting for one that is held outside. Some of
    // them may stay, as spare blocks, and then come in again.
    SlotPool departures{kInFlight - kDepartures, kDepartures, "values being freed"};
    Spares spares;
    PutOff pins_put_off{kPins}, blocks_put_off{kInFlight};
    // A slot whose block, on its way in, has arrived or is gone.
    void end_arrival(u32 slot);
    void give_back(u32 slot) { (slot < kInFlight - kDepartures ? arrivals : departures).give_back(slot); }
    void no_spare_any_more(u32 slot) {  // one that may have been lent, and whose block is to be freed
        if (slot >= kInFlight - kDepartures) spares.returned();
    }
    u32 blocks_arriving() const { return arrivals.in_use() + spares.lent(); }

private:
    static constexpr u32 kDepartures = 64;
    void claim(u32 slot);

    Region& region_;
    u32 self_ = ~0u;
};

}  // namespace kvstrata
