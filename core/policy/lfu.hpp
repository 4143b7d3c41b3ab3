// LFU: the record that has been used least often since it came leaves first; among equals, the one that has had that count
// for longest. A list for each count up to 127, and eight for each octave above; all operations take constant time
// (after Shah, Mitra, Matani: "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010).
#pragma once

#include "policy.hpp"

namespace kvstrata {

class Lfu final : public Policy {
public:
    const char* name() const override { return "lfu"; }
    u64 scratch_for(const PolicyState&, u32) const override { return sizeof(Counts); }

protected:
    void on_insert(const Order& order, u32 record, u32) const override { enter(order, record, 1); }
    void on_hit(const Order& order, u32 record) const override {
        const u16 uses = order.nodes[record].mark;
        leave(order, record);
        enter(order, record, uses < kMost ? static_cast<u16>(uses + 1) : kMost);
    }
    void on_remove(const Order& order, u32 record, bool) const override { leave(order, record); }
    u32 choose(const Order& order) const override {
        const Counts& counts = order.at_scratch<Counts>();
        for (u32 word = 0; word < kLists / 64; ++word)
            if (counts.used[word]) return counts.lists[word * 64 + static_cast<u32>(std::countr_zero(counts.used[word]))].tail;
        return 0;
    }
    void put_back(const Order& order, u32 record) const override {
        Counts& counts = order.at_scratch<Counts>();
        const u32 number = list_of(order.nodes[record].mark);
        order.push_back(counts.lists[number], record);
        counts.used[number / 64] |= u64{1} << number % 64;
    }
    void on_reset(const Order& order) const override { order.at_scratch<Counts>() = {}; }
    void on_move(const Order& order, u8* scratch, u64) const override {
        *reinterpret_cast<Counts*>(scratch) = order.at_scratch<Counts>();
    }

private:
    static constexpr u32 kLists = 192;
    static constexpr u16 kMost = PolicyNode::kAside - 1;
    struct Counts {
        u64 used[kLists / 64];  // bit n: there is something in list n
        NodeList lists[kLists];
    };

    static u32 list_of(u16 uses) {
        if (uses < 128) return uses;
        const u32 octave = static_cast<u32>(std::bit_width(uses)) - 1;
        return 128 + (octave - 7) * 8 + (uses >> (octave - 3) & 7);
    }
    static_assert(128 + (14 - 7) * 8 + 7 < kLists);

    static void enter(const Order& order, u32 record, u16 uses) {
        Counts& counts = order.at_scratch<Counts>();
        const u32 number = list_of(uses);
        order.nodes[record].mark = uses;
        order.push_front(counts.lists[number], record);
        counts.used[number / 64] |= u64{1} << number % 64;
    }
    static void leave(const Order& order, u32 record) {
        Counts& counts = order.at_scratch<Counts>();
        const u32 number = list_of(order.nodes[record].mark);
        order.unlink(counts.lists[number], record);
        if (!counts.lists[number].head) counts.used[number / 64] &= ~(u64{1} << number % 64);
    }
};

}  // namespace kvstrata
