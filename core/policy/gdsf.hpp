// GDSF (Cherkasova: "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998): a
// record is worth the clock at its last use + uses x cost / size, and the least worth leaves. The clock is the worth of
// what left last, so what isn't used any more is overtaken. Among equals, the last use decides.
//
// A heap with four children a node; records without room in it wait aside.
#pragma once

#include "policy.hpp"

namespace kvstrata {

class Gdsf final : public Policy {
public:
    const char* name() const override { return "gdsf"; }
    u64 scratch_for(const PolicyState&, u32 records) const override { return sizeof(Heap) + u64{records} * sizeof(Place); }

protected:
    void on_insert(const Order& order, u32 record, u32) const override {
        order.nodes[record].mark = 1;
        enter(order, record, order.at_scratch<Heap>().clock + gain(order, record));
    }
    void on_hit(const Order& order, u32 record) const override {
        PolicyNode& node = order.nodes[record];
        if (node.mark & PolicyNode::kAside) return;  // there was no room for it
        if (node.mark < kMost) ++node.mark;
        place(order, node.prev, {order.at_scratch<Heap>().clock + gain(order, record), node.stamp, record});
        sink(order, node.prev);
    }
    void on_remove(const Order& order, u32 record, bool evicted) const override {
        Heap& heap = order.at_scratch<Heap>();
        const u32 hole = order.nodes[record].prev;
        const double worth = heap.places()[hole].worth;
        if (evicted && worth > heap.clock) heap.clock = worth;
        if (--heap.count == hole) return;
        place(order, hole, heap.places()[heap.count]);
        sink(order, rise(order, hole));
    }
    u32 choose(const Order& order) const override {
        Heap& heap = order.at_scratch<Heap>();
        return heap.count ? heap.places()[0].record : 0;
    }
    void put_back(const Order& order, u32 record) const override { enter(order, record, order.at_scratch<Heap>().clock); }
    void on_reset(const Order& order) const override { order.at_scratch<Heap>() = {0, 0}; }
    void on_move(const Order& order, u8* scratch, u64) const override {
        const Heap& heap = order.at_scratch<Heap>();
        std::memcpy(scratch, &heap, sizeof heap + heap.count * sizeof(Place));
    }

private:
    static constexpr u16 kMost = PolicyNode::kAside - 1;
    static constexpr u32 kChildren = 4;
    struct Place {
        double worth;
        u32 stamp;
        u32 record;  // whose node's `prev` is the number of this place
        bool operator<(const Place& other) const {
            return worth != other.worth ? worth < other.worth : static_cast<std::int32_t>(stamp - other.stamp) < 0;
        }
    };
    struct Heap {
        u64 count;
        double clock;
        Place* places() { return reinterpret_cast<Place*>(this + 1); }
    };

    static double gain(const Order& order, u32 record) {
        const PolicyNode& node = order.nodes[record];
        return double{node.cost_value()} * node.mark / order.nodes.units(record);
    }
    static void place(const Order& order, u32 number, const Place& what) {
        order.at_scratch<Heap>().places()[number] = what;
        order.nodes[what.record].prev = number;
    }
    static void enter(const Order& order, u32 record, double worth) {
        Heap& heap = order.at_scratch<Heap>();
        PolicyNode& node = order.nodes[record];
        if (heap.count >= (order.scratch_bytes - sizeof(Heap)) / sizeof(Place)) {
            node.mark |= PolicyNode::kAside;
            order.push_front(order.state.aside, record);
            return;
        }
        const u32 number = static_cast<u32>(heap.count++);
        place(order, number, {worth, node.stamp, record});
        rise(order, number);
    }
    static u32 rise(const Order& order, u32 number) {
        Place* const places = order.at_scratch<Heap>().places();
        const Place moving = places[number];
        for (; number && moving < places[(number - 1) / kChildren]; number = (number - 1) / kChildren)
            place(order, number, places[(number - 1) / kChildren]);
        place(order, number, moving);
        return number;
    }
    static void sink(const Order& order, u32 number) {
        Heap& heap = order.at_scratch<Heap>();
        Place* const places = heap.places();
        const Place moving = places[number];
        for (;;) {
            const u64 first = u64{number} * kChildren + 1;
            if (first >= heap.count) break;
            u64 least = first;
            for (u64 child = first + 1; child < first + kChildren && child < heap.count; ++child)
                if (places[child] < places[least]) least = child;
            if (!(places[least] < moving)) break;
            place(order, number, places[least]);
            number = static_cast<u32>(least);
        }
        place(order, number, moving);
    }
};

}  // namespace kvstrata
