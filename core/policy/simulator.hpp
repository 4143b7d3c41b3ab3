// A cache without values: the core's policies, driven by keys and sizes alone.
#pragma once

#include <vector>

#include "policy.hpp"

namespace kvstrata {

class Simulator {
public:
    // With by_bytes, sizes are bytes; else each record counts one. Throws InvalidValue for an unknown policy.
    Simulator(const char* policy, u64 capacity, bool by_bytes);

    enum class Place : u8 { unknown, first, inside };  // in a prefix
    struct Access {
        u64 key;            // or a 64-bit hash of it
        u64 size = 1;
        float cost = 1;
        Place place = Place::unknown;
        u64 parent = 0;     // the block before it in its prefix, if it is inside of one
    };
    // Whether it was there. If not, it is now, unless it is larger than the whole.
    bool access(const Access& access);
    void prefetch(u64 key) const;

    // Takes it out, as a deletion does.
    bool remove(u64 key);
    bool contains(u64 key) const { return *find(key) != 0; }

    const Policy& policy() const { return policy_; }
    u64 capacity() const { return capacity_; }
    u64 count() const { return state_.count; }
    u64 size() const { return state_.units; }
    template <class Visit>
    void each_key(Visit&& visit) const {
        for (const u32 at : slots_)
            if (at) visit(records_[at].key);
    }

private:
    struct Record : PolicyRecord {
        u64 key;
        u32 depth;  // in its prefix, 0 = in none
        u32 next_free;
    };

    Order order();
    u32* find(u64 key) const;    // its slot, or the empty one where it would be
    u64 home(u64 key) const;
    void leave(u32 at, bool evicted);
    void erase(u32* slot);
    void grow_index();
    void grow_scratch();

    const Policy& policy_;
    const u64 capacity_;
    const bool by_bytes_;
    PolicyState state_{};
    std::vector<Record> records_;  // from 1 on
    u32 free_ = 0;
    mutable std::vector<u32> slots_;
    u32 shift_;                    // of a 64-bit hash, to a slot
    std::vector<u8> scratch_memory_;
    u8* scratch_ = nullptr;
    u64 scratch_bytes_ = 0;
    u32 tick_ = 0;
    u64 last_key_ = 0;
    u32 last_depth_ = 0;
};

}  // namespace kvstrata
