// What all policies have in common: lists, counting, and records that step aside.
#include "policy.hpp"

#include "base/failpoints.hpp"

namespace kvstrata {

void Order::push_front(NodeList& list, u32 record) const {
    PolicyNode& node = nodes[record];
    node.prev = 0;
    node.next = list.head;
    (list.head ? nodes[list.head].prev : list.tail) = record;
    list.head = record;
    list.units += nodes.units(record);
}

void Order::push_back(NodeList& list, u32 record) const {
    PolicyNode& node = nodes[record];
    node.prev = list.tail;
    node.next = 0;
    (list.tail ? nodes[list.tail].next : list.head) = record;
    list.tail = record;
    list.units += nodes.units(record);
}

void Order::push_after(NodeList& list, u32 other, u32 record) const {
    PolicyNode& node = nodes[record];
    node.prev = other;
    node.next = nodes[other].next;
    (node.next ? nodes[node.next].prev : list.tail) = record;
    nodes[other].next = record;
    list.units += nodes.units(record);
}

void Order::unlink(NodeList& list, u32 record) const {
    const PolicyNode& node = nodes[record];
    (node.prev ? nodes[node.prev].next : list.head) = node.next;
    (node.next ? nodes[node.next].prev : list.tail) = node.prev;
    list.units -= nodes.units(record);
}

void Policy::insert(const Order& order, u32 record, u32 depth) const {
    PolicyState& state = order.state;
    if (state.aside.head) bring_back(order, state.aside.tail);  // the one that has waited longest
    ++state.count;
    state.units += order.nodes.units(record);
    order.nodes[record].mark &= static_cast<u16>(~PolicyNode::kAside);
    on_insert(order, record, depth);
    KVSTRATA_COMMIT("policy.inserted");
}

void Policy::hit(const Order& order, u32 record) const {
    if (order.nodes[record].mark & PolicyNode::kAside) bring_back(order, record);
    on_hit(order, record);
}

void Policy::remove(const Order& order, u32 record, bool evicted) const {
    PolicyState& state = order.state;
    if (order.nodes[record].mark & PolicyNode::kAside) {
        order.unlink(state.aside, record);
    } else {
        on_remove(order, record, evicted);
    }
    KVSTRATA_COMMIT("policy.removed");
    --state.count;
    state.units -= order.nodes.units(record);
}

u32 Policy::victim(const Order& order) const {
    const u32 chosen = choose(order);
    if (chosen || !order.state.aside.tail) return chosen;
    bring_back(order, order.state.aside.tail);
    return choose(order);
}

void Policy::spare(const Order& order, u32 record) const {
    on_remove(order, record, false);
    order.nodes[record].mark |= PolicyNode::kAside;
    order.push_front(order.state.aside, record);
}

void Policy::bring_back(const Order& order, u32 record) const {
    order.unlink(order.state.aside, record);
    order.nodes[record].mark &= static_cast<u16>(~PolicyNode::kAside);
    put_back(order, record);
}

void Policy::reset(const Order& order) const {
    const PolicyState before = order.state;
    order.state = {};
    order.state.expected = before.expected;
    order.state.capacity = before.capacity;
    order.state.unit_bytes = before.unit_bytes;
    order.state.room = before.room;
    on_reset(order);
}

void Policy::move(const Order& order, u8* scratch, u64 bytes) const { on_move(order, scratch, bytes); }

}  // namespace kvstrata
