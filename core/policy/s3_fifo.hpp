// S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023): a small queue of 10 %
// through which new records pass, a main queue, and the keys of the last ones that left the small queue (as many as
// 90 % of the whole would be). Used twice in the small queue, a record goes on to the main one; a key among the ghosts goes
// there at once. In the main queue a use, of which three are counted, buys another round.
#pragma once

#include "ghosts.hpp"
#include "segmented.hpp"

namespace kvstrata {

class S3Fifo final : public Segmented {
public:
    const char* name() const override { return "s3-fifo"; }
    u64 scratch_for(const PolicyState&, u32 records) const override { return Ghosts::bytes_for(ghosts_of(records)); }

protected:
    void on_insert(const Order& order, u32 record, u32) const override {
        const u64 full = full_size(order.state);
        // Until something has left, what doesn't fit in the small queue may fill the main one.
        const bool filling = order.state.capacity && !has_evicted(order) && small(order).units >= full / 10;
        const bool to_main = ghosts(order).take(order.nodes.hash(record)) || filling;
        order.nodes[record].mark = to_main ? kMain : 0;
        order.push_front(to_main ? main(order) : small(order), record);
    }

    void on_hit(const Order& order, u32 record) const override {
        u16& mark = order.nodes[record].mark;
        if ((mark & kUses) < kUses) ++mark;
    }

    void on_remove(const Order& order, u32 record, bool evicted) const override {
        const bool was_main = order.nodes[record].mark & kMain;
        order.unlink(was_main ? main(order) : small(order), record);
        if (record == order.state.hand) order.state.hand = 0;
        if (!evicted) return;
        has_evicted(order) = 1;
        if (!was_main) ghosts(order).add(order.nodes.hash(record), ghost_limit(order.state));
    }

    u32 choose(const Order& order) const override {
        // The hand holds the one that has been named in the small queue.
        if (order.state.hand && uses(order, order.state.hand) < kEnough) return order.state.hand;
        order.state.hand = 0;
        const u64 full = full_size(order.state);
        if (main(order).units <= full - full / 10) {
            while (const u32 at = small(order).tail) {
                if (uses(order, at) < kEnough) return order.state.hand = at;
                order.unlink(small(order), at);
                order.nodes[at].mark = kMain;
                order.push_front(main(order), at);
            }
        }
        while (const u32 at = main(order).tail) {
            if (!uses(order, at)) return at;
            --order.nodes[at].mark;
            order.unlink(main(order), at);
            order.push_front(main(order), at);
        }
        return small(order).tail;
    }

    void put_back(const Order& order, u32 record) const override {
        order.push_back(order.nodes[record].mark & kMain ? main(order) : small(order), record);
    }

    void on_reset(const Order& order) const override { Ghosts::make(order.scratch, order.scratch_bytes); }
    void on_move(const Order&, u8* scratch, u64 bytes) const override {
        Ghosts::make(scratch, bytes);  // the old ones are forgotten
    }

private:
    static constexpr u16 kUses = 3, kMain = 4;
    static constexpr u16 kEnough = 2;  // uses that show that a new record is no one-hit wonder

    static NodeList& small(const Order& order) { return order.state.lists[0]; }
    static NodeList& main(const Order& order) { return order.state.lists[1]; }
    static u32& has_evicted(const Order& order) { return order.state.words[0]; }
    static u16 uses(const Order& order, u32 record) { return order.nodes[record].mark & kUses; }
    static u32 ghosts_of(u32 records) { return static_cast<u32>(u64{records} * 9 / 10); }
    static u32 ghost_limit(const PolicyState& state) {
        return ghosts_of(state.expected ? state.expected : state.count);
    }
    static Ghosts ghosts(const Order& order) { return Ghosts(order.scratch); }
};

}  // namespace kvstrata
