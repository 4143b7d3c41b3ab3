// FIFO: what came first leaves first, however often it is used.
#pragma once

#include "policy.hpp"

namespace kvstrata {

class Fifo : public Policy {
public:
    const char* name() const override { return "fifo"; }

protected:
    void on_insert(const Order& order, u32 record, u32) const override { order.push_front(queue(order), record); }
    void on_hit(const Order&, u32) const override {}
    void on_remove(const Order& order, u32 record, bool) const override { order.unlink(queue(order), record); }
    u32 choose(const Order& order) const override { return queue(order).tail; }
    void put_back(const Order& order, u32 record) const override { order.push_back(queue(order), record); }

    static NodeList& queue(const Order& order) { return order.state.lists[0]; }
};

}  // namespace kvstrata
