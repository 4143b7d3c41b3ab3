// LRU: the record whose last access is longest ago leaves first.
#pragma once

#include "fifo.hpp"

namespace kvstrata {

class Lru final : public Fifo {
public:
    const char* name() const override { return "lru"; }

protected:
    void on_hit(const Order& order, u32 record) const override {
        if (queue(order).head == record) return;
        order.unlink(queue(order), record);
        order.push_front(queue(order), record);
    }
    void put_back(const Order& order, u32 record) const override {
        order.push_in_place(queue(order), record, [&](u32 a, u32 b) { return order.stamped_before(a, b); });
    }
};

}  // namespace kvstrata
