// The last access of each key seen lately, whether its record is still there or not: 64-byte sets of six, in which the
// longest unseen is replaced. Bounded, so what has not been seen for long is forgotten.
#pragma once

#include "policy.hpp"

namespace kvstrata {

class History {
public:
    static constexpr u32 kWays = 6;
    static constexpr u32 kLeastSets = 256;
    struct alignas(64) Set {
        u32 hash[kWays];
        u32 stamp[kWays];
        u16 mark[kWays];  // 0: nothing here
        u32 spare;
    };
    struct Seen {
        u32& stamp;
        u16& mark;
    };

    History(u8* scratch, u64 bytes) : sets_(reinterpret_cast<Set*>(scratch)), count_(bytes / sizeof(Set)) {}

    u64 sets() const { return count_; }
    const Set& set(u64 number) const { return sets_[number]; }
    void clear() { std::memset(sets_, 0, count_ * sizeof(Set)); }

    // Calls found(Seen) if the key is there.
    template <class Found>
    bool find(u32 hash, Found&& found) {
        Set& set = set_of(hash);
        for (u32 i = 0; i < kWays; ++i) {
            if (set.hash[i] != hash || !set.mark[i]) continue;
            found(Seen{set.stamp[i], set.mark[i]});
            return true;
        }
        return false;
    }

    // The key isn't there.
    void add(u32 hash, u32 stamp, u16 mark, u32 now) {
        Set& set = set_of(hash);
        u32 place = 0, longest = 0;
        for (u32 i = 0; i < kWays; ++i) {
            if (!set.mark[i]) {
                place = i;
                break;
            }
            if (now - set.stamp[i] >= longest) longest = now - set.stamp[i], place = i;
        }
        set.hash[place] = hash;
        set.stamp[place] = stamp;
        set.mark[place] = mark;
    }

    void copy(const History& other, u32 now) {
        clear();
        for (u64 number = 0; number < other.count_; ++number)
            for (u32 i = 0; i < kWays; ++i)
                if (const Set& from = other.sets_[number]; from.mark[i]) add(from.hash[i], from.stamp[i], from.mark[i], now);
    }

private:
    Set& set_of(u32 hash) const { return sets_[hash * count_ >> 32]; }

    Set* sets_;
    u64 count_;
};

}  // namespace kvstrata
