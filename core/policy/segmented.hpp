// Two segments, of which the second is for what has been used again: SLRU as a whole, the main part of W-TinyLFU.
#pragma once

#include "policy.hpp"

namespace kvstrata {

class Segmented : public Policy {
protected:
    // The sum of sizes at which an order is full. Where its owner can't say, what it holds is taken for that.
    static u64 full_size(const PolicyState& state) { return state.capacity ? state.capacity : state.units; }

    // `size` is what both segments together may hold; 4/5 of it are for the protected one.
    static u64 protected_size(u64 size) { return size * 4 / 5; }

    static void use_again(const Order& order, NodeList& probation, NodeList& protected_, u32 record, bool was_protected,
                          u64 size) {
        order.unlink(was_protected ? protected_ : probation, record);
        order.push_front(protected_, record);
        order.nodes[record].mark |= kProtected;
        while (protected_.units > protected_size(size) && protected_.tail != record) {
            const u32 cooled = protected_.tail;
            order.unlink(protected_, cooled);
            order.nodes[cooled].mark &= static_cast<u16>(~kProtected);
            order.push_front(probation, cooled);
        }
    }

    static constexpr u16 kProtected = 1;
};

}  // namespace kvstrata
