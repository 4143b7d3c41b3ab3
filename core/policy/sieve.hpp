// SIEVE (Zhang, Yang, Yue, Vigfusson, Rashmi: "SIEVE is Simpler than LRU", NSDI 2024): one queue in order of arrival and a
// hand that goes through it from old to young. A hit only marks the record. The hand takes the marks off and evicts
// the first record without one; what survives stays where it is, so new records are sifted out quickly.
#pragma once

#include "fifo.hpp"

namespace kvstrata {

class Sieve final : public Fifo {
public:
    const char* name() const override { return "sieve"; }

protected:
    void on_insert(const Order& order, u32 record, u32) const override {
        order.nodes[record].mark = 0;
        order.push_front(queue(order), record);
    }
    void on_hit(const Order& order, u32 record) const override { order.nodes[record].mark = kVisited; }
    void on_remove(const Order& order, u32 record, bool) const override {
        if (order.state.hand == record) order.state.hand = order.nodes[record].prev;
        order.unlink(queue(order), record);
    }
    u32 choose(const Order& order) const override {
        u32 at = order.state.hand ? order.state.hand : queue(order).tail;
        while (at && order.nodes[at].mark & kVisited) {
            order.nodes[at].mark = 0;
            at = order.nodes[at].prev ? order.nodes[at].prev : queue(order).tail;
        }
        return order.state.hand = at;
    }

private:
    static constexpr u16 kVisited = 1;
};

}  // namespace kvstrata
