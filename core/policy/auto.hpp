// auto: made for the blocks of prefixes. What is least worth keeping leaves first, where the worth of a record of some class
// and age is learned (reuse.hpp) from a bounded history of all keys seen, evicted ones too (history.hpp).
//
// After Wang et al., "KVCache Cache in the Wild" (USENIX ATC 2025), who give each class of request its own distribution of
// the time until reuse, evict the block with the least chance of reuse within its expected lifetime, and of blocks of
// one request the last one first. Here the classes are what any cache of blocks can tell: how often a block has been
// seen; and of one seen once only, whether the request that brought it went on from known blocks, and whether it was
// the last of it. Instead of one lifetime for all, the Gittins index takes for each the one that makes it look best
// (as LHD by Beckmann, Chen, Cidon, NSDI 2018, a rate of hits per time occupied), so a loop that doesn't fit keeps a part
// of itself.
//
// A run of accesses that goes from block to block of a prefix counts as one: all get the stamp of its start, and lie in the
// lists tail before head.
//
// It is never much worse than LRU, since it knows what LRU would have: from the ages of all keys seen follows the age
// of the last one that LRU would have kept. When LRU would have hit more often for a while, LRU it is, for a while.
#pragma once

#include <algorithm>
#include <iterator>

#include "history.hpp"
#include "reuse.hpp"

namespace kvstrata {

class Auto final : public Policy {
public:
    const char* name() const override { return "auto"; }

    // History for 16 times the records, if it takes no more than 1/256 of the memory that they take, or 32 bytes a record.
    u64 scratch_for(const PolicyState& state, u32 records) const override {
        u64 bytes = u64{records} * 16 / History::kWays * sizeof(History::Set);
        if (state.unit_bytes) {
            const u64 a_share = state.units * state.unit_bytes / 256, a_little = u64{records} * 32;
            bytes = std::min(bytes, std::max(a_share, a_little));
        }
        return align_up(sizeof(Mind), kUnit) + std::max(align_up(bytes, kUnit), History::kLeastSets * sizeof(History::Set));
    }

protected:
    void on_insert(const Order& order, u32 record, u32 depth) const override {
        u16& mark = order.nodes[record].mark;
        mark = depth == kSameDepth ? mark & kPlace : place_for(depth);
        access(order, record, false);
    }
    void on_hit(const Order& order, u32 record) const override {
        unlink(order, record);
        access(order, record, true);
    }
    void on_remove(const Order& order, u32 record, bool) const override { unlink(order, record); }
    u32 choose(const Order& order) const override;
    void put_back(const Order& order, u32 record) const override;
    void on_reset(const Order& order) const override {
        mind_of(order) = {};
        mind_of(order).reuse.reset();
        mind_of(order).lru_age = ~0u;
        mind_of(order).penalty = 1;
        history(order).clear();
    }
    void on_move(const Order& order, u8* scratch, u64 bytes) const override {
        Mind& moved = *reinterpret_cast<Mind*>(scratch);
        moved = mind_of(order);
        moved.sweep = 0;
        std::memset(moved.ages, 0, sizeof moved.ages);
        History(scratch + kMindBytes, bytes - kMindBytes).copy(history(order), moved.run_stamp);
    }

private:
    // Marks: how often it has been seen (7 bits); of what has been seen once, how it came (2); place in its prefix (6).
    static constexpr u16 kUses = 0x7f, kContinues = 0x80, kInside = 0x100, kPlace = 0x7e00;
    static constexpr u32 kPlaceShift = 9, kPlaces = 63;
    static constexpr u32 kLongestRun = 1 << 16;  // accesses

    // 0 for none, 1 for the first block, then 2 to 63 over and over.
    static u16 place_for(u32 depth) {
        if (depth <= 1) return static_cast<u16>(depth << kPlaceShift);
        return static_cast<u16>((2 + (depth - 2) % (kPlaces - 1)) << kPlaceShift);
    }
    // Whether it is further from the head of their prefix; as far as one can tell, since places come over and over.
    static bool deeper(u16 place, u16 other) {
        const u32 a = place >> kPlaceShift, b = other >> kPlaceShift;
        if (a <= 1 || b <= 1) return a > b;
        const u32 ahead = (a + (kPlaces - 1) - b) % (kPlaces - 1);
        return ahead && ahead < kPlaces / 2;
    }
    static bool follows(u16 place, u16 other) {
        const u32 before = other >> kPlaceShift;
        return before && place >> kPlaceShift == (before == kPlaces ? 2 : before + 1);
    }
    static u32 class_of(u16 mark) {
        const u32 uses = mark & kUses;
        if (uses == 1) return (mark & (kContinues | kInside)) >> 7;
        constexpr u8 kUpTo[] = {2, 3, 5, 8, 16, 64};
        u32 number = 4;
        for (const u8 most : kUpTo) number += uses > most;
        return number;
    }
    static_assert(4 + 6 + 1 == Reuse::kClasses);

    struct Class {
        NodeList list;
        u32 newest;      // the record that came to it last
        u32 newest_run;  // and in which run
    };
    struct Mind {
        Reuse reuse;
        Class classes[Reuse::kClasses];
        u32 run, run_stamp;  // the present run: its number, and when it began
        u32 run_known;       // blocks in it that were known before
        u32 run_least;       // the lowest class in it
        u32 last;            // the last record accessed, if it is there
        u16 last_place;
        u32 until_learning;  // accesses
        u64 sweep;           // the next set of the history to look at
        u32 ages[240];       // of what this sweep has seen
        // What LRU would have done:
        u32 lru_age;         // it would have kept what is younger
        u32 accesses, hits, lru_hits;  // in this window
        u32 lru_windows;     // how many more to play LRU
        u32 penalty;         // for how many windows the next time
    };
    static constexpr u64 kMindBytes = (sizeof(Mind) + kUnit - 1) / kUnit * kUnit;

    static Mind& mind_of(const Order& order) { return order.at_scratch<Mind>(); }
    static History history(const Order& order) { return {order.scratch + kMindBytes, order.scratch_bytes - kMindBytes}; }

    static void access(const Order& order, u32 record, bool hit);
    static void begin_run(const Order& order, u32 now);
    static void raise(const Order& order, u32 uses);
    static void enter(const Order& order, u32 record);
    static void unlink(const Order& order, u32 record);
    static void sweep(const Order& order, u32 now);
    static void compare(const Order& order);

    // Eight to an octave.
    static u32 fine_octave(u32 age) {
        if (age < 8) return age;
        const u32 octave = static_cast<u32>(std::bit_width(age)) - 4;
        return octave * 8 + (age >> octave);
    }
    static u32 fine_start(u32 number) { return number < 8 ? number : (8 + number % 8) << (number / 8 - 1); }
};

// ---- Accesses -----------------------------------------------------------------------------------

inline void Auto::access(const Order& order, u32 record, bool hit) {
    Mind& mind = mind_of(order);
    PolicyNode& node = order.nodes[record];
    const u32 now = node.stamp, hash = order.nodes.hash(record);
    const u16 place = node.mark & kPlace;
    if (!follows(place, mind.last_place) || now - mind.run_stamp > kLongestRun) begin_run(order, now);
    mind.last_place = place;
    mind.last = record;

    History seen = history(order);
    u32 uses = hit ? node.mark & kUses : 0;
    const bool known = seen.find(hash, [&](History::Seen before) {
        const u32 age = mind.run_stamp - before.stamp;
        mind.reuse.used_again(class_of(before.mark), age);
        mind.lru_hits += age < mind.lru_age;
        uses = std::max<u32>(uses, before.mark & kUses) >> std::min<u64>(age / (seen.sets() * History::kWays), 7);
        before.stamp = mind.run_stamp;
        uses = std::min<u32>(uses + 1, kUses);
        before.mark = static_cast<u16>(uses);
    });
    if (!known) uses = std::min<u32>(uses + 1, kUses);
    node.mark = static_cast<u16>(place | uses | (uses > 1 ? 0 : mind.run_known > 1 ? kContinues | kInside : kInside));
    node.stamp = mind.run_stamp;
    mind.run_known += uses > 1;
    if (!known) seen.add(hash, node.stamp, node.mark & ~kPlace, now);
    const u32 its_class = class_of(node.mark);
    if (uses > 1 && its_class > mind.run_least) raise(order, uses);
    mind.run_least = std::min(mind.run_least, its_class);
    enter(order, record);

    mind.hits += hit;
    ++mind.accesses;
    sweep(order, now);
    if (mind.accesses >= std::max(1024u, 4 * order.state.count)) compare(order);
}

inline void Auto::begin_run(const Order& order, u32 now) {
    Mind& mind = mind_of(order);
    // The last block of a prefix that came is a class of its own, as long as it has been seen once only.
    if (const u32 last = mind.last; last && mind.last_place && (order.nodes[last].mark & (kUses | PolicyNode::kAside)) == 1) {
        PolicyNode& node = order.nodes[last];
        unlink(order, last);
        node.mark &= static_cast<u16>(~kInside);
        enter(order, last);
        history(order).find(order.nodes.hash(last), [&](History::Seen seen) { seen.mark = node.mark & ~kPlace; });
    }
    ++mind.run;
    mind.run_stamp = now;
    mind.run_known = 0;
    mind.run_least = Reuse::kClasses;
}

// A block can't have been used less often than what follows it in a prefix: where the history has lost it, what follows
// tells. So it takes little history to know how often a prefix was used.
inline void Auto::raise(const Order& order, u32 uses) {
    Mind& mind = mind_of(order);
    const u32 wanted = class_of(static_cast<u16>(uses));
    for (u32 number = mind.run_least; number < wanted; ++number) {
        Class& its = mind.classes[number];
        if (!its.newest || its.newest_run != mind.run) continue;
        u32 first = its.newest;
        for (u32 before; (before = order.nodes[first].prev) && order.nodes[before].stamp == mind.run_stamp;) first = before;
        for (u32 record = first; record && order.nodes[record].stamp == mind.run_stamp;) {
            const u32 next = order.nodes[record].next;
            unlink(order, record);
            PolicyNode& node = order.nodes[record];
            node.mark = static_cast<u16>((node.mark & kPlace) | uses);
            enter(order, record);
            history(order).find(order.nodes.hash(record), [&](History::Seen seen) { seen.mark = static_cast<u16>(uses); });
            record = next;
        }
    }
    mind.run_least = wanted;
}

inline void Auto::enter(const Order& order, u32 record) {
    Mind& mind = mind_of(order);
    Class& its = mind.classes[class_of(order.nodes[record].mark)];
    if (its.newest && its.newest_run == mind.run) {
        order.push_after(its.list, its.newest, record);
    } else {
        order.push_front(its.list, record);
    }
    its.newest = record;
    its.newest_run = mind.run;
}

inline void Auto::unlink(const Order& order, u32 record) {
    const PolicyNode& node = order.nodes[record];
    Mind& mind = mind_of(order);
    Class& its = mind.classes[class_of(node.mark)];
    if (its.newest == record) its.newest = node.prev;
    if (mind.last == record) mind.last = 0;
    order.unlink(its.list, record);
}

// Of one run, what is deeper in the prefix leaves first, as if it were older.
inline void Auto::put_back(const Order& order, u32 record) const {
    Mind& mind = mind_of(order);
    const PolicyNode& node = order.nodes[record];
    Class& its = mind.classes[class_of(node.mark)];
    order.push_in_place(its.list, record, [&](u32 a, u32 b) {
        if (order.nodes[a].stamp != order.nodes[b].stamp) return order.stamped_before(a, b);
        return deeper(order.nodes[a].mark & kPlace, order.nodes[b].mark & kPlace);
    });
    const bool of_this_run = its.newest_run == mind.run && node.stamp == mind.run_stamp;
    if (of_this_run && (!its.newest || node.prev == its.newest)) its.newest = record;
}

// ---- Choice -------------------------------------------------------------------------------------

inline u32 Auto::choose(const Order& order) const {
    const Mind& mind = mind_of(order);
    u32 chosen = 0;
    if (mind.lru_windows) {
        u32 oldest = 0;
        for (const Class& its : mind.classes) {
            if (!its.list.tail) continue;
            const u32 age = mind.run_stamp - order.nodes[its.list.tail].stamp;
            if (!chosen || age > oldest) oldest = age, chosen = its.list.tail;
        }
        return chosen;
    }
    float least = 0;
    const auto consider = [&](u32 number, u32 record) {
        const float worth = mind.reuse.worth(number, mind.run_stamp - order.nodes[record].stamp);
        if (chosen && worth >= least) return;
        least = worth;
        chosen = record;
    };
    u32 deepest = Reuse::kClasses;  // the class of the last block of the present run
    for (u32 number = 0; number < Reuse::kClasses; ++number) {
        const Class& its = mind.classes[number];
        if (!its.list.tail) continue;
        consider(number, its.list.tail);
        if (!mind.last_place) {
            consider(number, its.list.head);
        } else if (deepest == Reuse::kClasses && its.newest && its.newest_run == mind.run) {
            deepest = number;
        }
    }
    // Of what is young, only the run that is still coming in may be cut short: elsewhere one can't tell what follows.
    if (deepest < Reuse::kClasses) consider(deepest, mind.classes[deepest].newest);
    return chosen;
}

// ---- Learning -----------------------------------------------------------------------------------

// Looks at one set of the history, so that each key in it is seen once in as many accesses as there are sets.
inline void Auto::sweep(const Order& order, u32 now) {
    Mind& mind = mind_of(order);
    const History seen = history(order);
    const History::Set& set = seen.set(mind.sweep);
    for (u32 i = 0; i < History::kWays; ++i) {
        if (!set.mark[i]) continue;
        const u32 age = now - set.stamp[i];
        mind.reuse.seen(class_of(set.mark[i]), age);
        ++mind.ages[fine_octave(age)];
    }
    if (++mind.sweep == seen.sets()) {
        mind.sweep = 0;
        u64 younger = 0;
        mind.lru_age = ~0u;
        for (u32 i = 0; i < std::size(mind.ages); ++i) {
            if (younger + mind.ages[i] < order.state.count) {
                younger += mind.ages[i];
                continue;
            }
            const double part = static_cast<double>(order.state.count - younger) / mind.ages[i];
            mind.lru_age = fine_start(i) + static_cast<u32>(part * (fine_start(i + 1) - fine_start(i)));
            break;
        }
        std::memset(mind.ages, 0, sizeof mind.ages);
    }
    if (mind.until_learning-- == 0) {
        // A quarter of what it takes to fill the cache; what was learned is worth half when the history has turned over.
        const u32 period = std::max(512u, order.state.count / 4);
        const double span = static_cast<double>(seen.sets() * History::kWays);
        mind.reuse.learn(static_cast<float>(seen.sets()), static_cast<float>(std::exp2(-static_cast<double>(period) / std::max(span, 16384.0))),
                         mind.last_place != 0);
        mind.until_learning = period;
    }
}

// Whether it would have been better to play LRU: by more than a quarter of a point of all accesses.
inline void Auto::compare(const Order& order) {
    Mind& mind = mind_of(order);
    (void)order;
    if (mind.lru_windows) {
        --mind.lru_windows;
    } else if (mind.lru_age != ~0u && mind.lru_hits > mind.hits + mind.accesses / 400) {
        mind.lru_windows = mind.penalty;
        mind.penalty = std::min(2 * mind.penalty, 64u);
    } else {
        mind.penalty = std::max(mind.penalty / 2, 1u);
    }
    mind.accesses = mind.hits = mind.lru_hits = 0;
}

}  // namespace kvstrata
