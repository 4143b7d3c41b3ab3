// Segmented LRU (Karedla, Love, Wherry: "Caching Strategies to Improve Disk System Performance", IEEE Computer 1994): new
// records are on probation; a second use moves them to the protected segment, which holds at most 4/5 of the whole. What
// is pushed out of there gets another chance on probation; what is pushed out of probation leaves.
#pragma once

#include "segmented.hpp"

namespace kvstrata {

class Slru final : public Segmented {
public:
    const char* name() const override { return "slru"; }

protected:
    void on_insert(const Order& order, u32 record, u32) const override {
        order.nodes[record].mark = 0;
        order.push_front(order.state.lists[0], record);
    }
    void on_hit(const Order& order, u32 record) const override {
        use_again(order, order.state.lists[0], order.state.lists[1], record, segment_of(order, record), full_size(order.state));
    }
    void on_remove(const Order& order, u32 record, bool) const override {
        order.unlink(order.state.lists[segment_of(order, record)], record);
    }
    u32 choose(const Order& order) const override {
        const u32 probationer = order.state.lists[0].tail;
        return probationer ? probationer : order.state.lists[1].tail;
    }
    void put_back(const Order& order, u32 record) const override {
        order.push_back(order.state.lists[segment_of(order, record)], record);
    }

private:
    static bool segment_of(const Order& order, u32 record) { return order.nodes[record].mark & kProtected; }
};

}  // namespace kvstrata
