// W-TinyLFU (Einziger, Friedman, Manes: "TinyLFU: A Highly Efficient Cache Admission Policy", ACM TOS 2017): LRU and LFU
// combined. New records pass through a window, an LRU of 1 % of the whole. At its end each stands against the next victim
// of the main part, a segmented LRU, and the one that a sketch has seen less often leaves. So admission is a choice of
// victims, and a put always stores.
//
// The segments of the main part hold at most 1/5 and 4/5 of it. When a use moves a record to the protected segment, and
// what that pushes out doesn't fit on probation any more, the last one there is the next to leave, and the candidate
// after it enters without a contest.
//
// The sketch counts arrivals, uses in the main part, and candidates once more when they have been judged; its counters are
// halved after as many uses in the main part as 32 times the records that it holds. All this is as libCacheSim has it.
#pragma once

#include "segmented.hpp"
#include "sketch.hpp"

namespace kvstrata {

class WTinyLfu final : public Segmented {
public:
    const char* name() const override { return "w-tinylfu"; }
    u64 scratch_for(const PolicyState& state, u32 records) const override {
        const u32 whole = state.expected ? state.expected : records;
        return sizeof(Counted) + Sketch::bytes_for(whole - whole / 100);
    }

protected:
    void on_insert(const Order& order, u32 record, u32) const override {
        order.nodes[record].mark = 0;
        order.push_front(window(order), record);
        sketch(order).add(order.nodes.hash(record));
    }

    void on_hit(const Order& order, u32 record) const override {
        const u16 mark = order.nodes[record].mark;
        if (!(mark & kMain)) {
            order.unlink(window(order), record);
            order.push_front(window(order), record);
            return;
        }
        const u64 size = main_size(order.state);
        u32& overdue = overdue_in(order);
        if (overdue == record) overdue = 0;
        use_again(order, probation(order), protected_segment(order), record, mark & kProtected, size);
        if (!overdue && !(mark & kProtected) && probation(order).units > size / 5) overdue = probation(order).tail;
        sketch(order).add(order.nodes.hash(record));
        Counted& counted = order.at_scratch<Counted>();
        if (++counted.uses < 32 * u64{order.state.count - order.state.count / 100}) return;
        counted.uses = 0;
        sketch(order).halve();
    }

    void on_remove(const Order& order, u32 record, bool evicted) const override {
        const u16 mark = order.nodes[record].mark;
        order.unlink(list_of(order, mark), record);
        if (overdue_in(order) == record) overdue_in(order) = 0;
        if (!evicted) return;
        const u32 candidate = window(order).tail;
        if (!(mark & kMain)) {
            sketch(order).add(order.nodes.hash(record));
        } else if (record == order.state.hand && candidate) {  // it has lost against the candidate
            enter_main(order, candidate);
        }
    }

    u32 choose(const Order& order) const override {
        order.state.hand = 0;
        if (overdue_in(order)) return overdue_in(order);
        u32 candidate;
        while ((candidate = window(order).tail)) {
            if (main_units(order) + order.nodes.units(candidate) > main_size(order.state)) break;
            enter_main(order, candidate);
        }
        const u32 probationer = probation(order).tail;
        const u32 victim = probationer ? probationer : protected_segment(order).tail;
        if (!candidate || !victim) return candidate ? candidate : victim;
        const Sketch seen = sketch(order);
        if (seen.estimate(order.nodes.hash(candidate)) <= seen.estimate(order.nodes.hash(victim))) return candidate;
        return order.state.hand = victim;
    }

    void put_back(const Order& order, u32 record) const override {
        order.push_back(list_of(order, order.nodes[record].mark), record);
    }

    void on_reset(const Order& order) const override {
        order.at_scratch<Counted>() = {};
        sketch(order).clear();
    }
    void on_move(const Order& order, u8* scratch, u64 bytes) const override {
        *reinterpret_cast<Counted*>(scratch) = order.at_scratch<Counted>();
        Sketch(scratch + sizeof(Counted), bytes - sizeof(Counted)).copy(sketch(order));
    }

private:
    struct alignas(kUnit) Counted {
        u64 uses;  // in the main part, since the counters were halved
    };
    static constexpr u16 kMain = 2;

    static u32& overdue_in(const Order& order) { return order.state.words[0]; }
    static NodeList& window(const Order& order) { return order.state.lists[0]; }
    static NodeList& probation(const Order& order) { return order.state.lists[1]; }
    static NodeList& protected_segment(const Order& order) { return order.state.lists[2]; }
    static NodeList& list_of(const Order& order, u16 mark) {
        return !(mark & kMain) ? window(order) : mark & kProtected ? protected_segment(order) : probation(order);
    }
    static Sketch sketch(const Order& order) {
        return {order.scratch + sizeof(Counted), order.scratch_bytes - sizeof(Counted)};
    }
    static u64 main_units(const Order& order) { return probation(order).units + protected_segment(order).units; }
    static u64 main_size(const PolicyState& state) {
        const u64 full = full_size(state);
        const u64 one = state.count ? state.units / state.count : 0;  // the window holds a record at least
        return full - (full / 100 > one ? full / 100 : one);
    }

    // From the window to the main part: to the lower segment that has room.
    static void enter_main(const Order& order, u32 record) {
        const u32 hash = order.nodes.hash(record);
        const u64 units = order.nodes.units(record), size = main_size(order.state), above = protected_size(size);
        order.unlink(window(order), record);
        const bool upper = probation(order).units + units > size / 5 && protected_segment(order).units + units <= above;
        order.nodes[record].mark = upper ? kMain | kProtected : kMain;
        order.push_front(upper ? protected_segment(order) : probation(order), record);
        sketch(order).add(hash);
    }
};

}  // namespace kvstrata
