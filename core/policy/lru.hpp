// LRU: the record whose last access is longest ago leaves first.
#pragma once

#include "policy.hpp"

namespace kvstrata {

class Lru final : public Policy {
public:
    const char* name() const override { return "lru"; }

    void on_insert(Nodes nodes, PolicyState& state, u32 record) const override {
        PolicyNode& node = nodes[record];
        node.prev = 0;
        node.next = state.head;
        if (state.head) nodes[state.head].prev = record;
        state.head = record;
        if (!state.tail) state.tail = record;
        ++state.count;
    }

    void on_hit(Nodes nodes, PolicyState& state, u32 record) const override {
        if (state.head == record) return;
        on_remove(nodes, state, record);
        on_insert(nodes, state, record);
    }

    void on_remove(Nodes nodes, PolicyState& state, u32 record) const override {
        const PolicyNode node = nodes[record];
        (node.prev ? nodes[node.prev].next : state.head) = node.next;
        (node.next ? nodes[node.next].prev : state.tail) = node.prev;
        --state.count;
    }

    u32 victim(Nodes, const PolicyState& state) const override { return state.tail; }

    void spare(Nodes nodes, PolicyState& state, u32 record) const override { on_hit(nodes, state, record); }
};

}  // namespace kvstrata
