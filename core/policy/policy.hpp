// The interface of replacement policies: which record leaves the memory tier first.
//
// A policy is code without state. What it knows lies in the mapping: a PolicyNode in each record, a PolicyState per
// order (a namespace, or a simulator), and for some of them a block of scratch memory. All calls happen under the
// order's lock. Everything in an order may be rebuilt at any time by reset() and an insert() of each record, oldest
// first: that is how the death of a process inside is mended.
#pragma once

#include <bit>
#include <cstring>

#include "base/types.hpp"

namespace kvstrata {

// In every record. The policy's own, except for stamp and cost, which the owner sets before insert() and hit().
struct PolicyNode {
    u32 prev, next;  // neighbours in one of the policy's lists, 0 = none
    u32 stamp;       // tick of the last access; a policy may set it back to the start of a run of accesses
    u16 cost;        // to compute the value again, in the caller's unit: the upper half of a float
    u16 mark;        // frequency, list and the like; kAside is the same for all

    static constexpr u16 kAside = 0x8000;
    static PolicyNode fresh(u32 stamp, float cost) {
        return {0, 0, stamp, static_cast<u16>((std::bit_cast<u32>(cost) + 0x8000u) >> 16), 0};
    }
    float cost_value() const { return std::bit_cast<float>(u32{cost} << 16); }
};

// What a policy sees of a record: this is how it starts. Hash and units don't change while it is in an order.
struct PolicyRecord {
    PolicyNode node;
    u32 hash;   // of the key
    u32 units;  // its size, in the owner's unit
};
static_assert(sizeof(PolicyRecord) == 24);

// A list of nodes; the young end is `head`.
struct NodeList {
    u32 head, tail;
    u64 units;  // the sizes of what is in it
};

struct PolicyState {
    u32 count;      // records in the order
    u32 expected;   // how many it will hold, if the owner knows; else 0
    u64 units;      // their sizes
    u64 capacity;   // about what sum of sizes it may reach; a hint
    u64 unit_bytes; // bytes in a unit; 0 if a unit is a record
    u32 room;       // records that the scratch memory is made for; the owner's
    u32 hand;
    NodeList lists[3];
    NodeList aside;  // what may not leave now
    u32 words[4];
};

// The records of an owner, numbered from 1, wherever they lie.
class Nodes {
public:
    Nodes(void* first, size_t stride) : first_(static_cast<u8*>(first)), stride_(stride) {}
    PolicyNode& operator[](u32 number) const { return *reinterpret_cast<PolicyNode*>(at(number)); }
    u32 hash(u32 number) const { return field(number, offsetof(PolicyRecord, hash)); }
    u32 units(u32 number) const { return field(number, offsetof(PolicyRecord, units)); }

private:
    u8* at(u32 number) const { return first_ + u64{number} * stride_; }
    u32 field(u32 number, size_t offset) const { return *reinterpret_cast<const u32*>(at(number) + offset); }
    u8* first_;
    size_t stride_;
};

// What a policy works on. Lists are linked through the nodes of their records.
struct Order {
    Nodes nodes;
    PolicyState& state;
    u8* scratch;        // aligned to a cache line
    u64 scratch_bytes;

    template <class T>
    T& at_scratch(u64 offset = 0) const { return *reinterpret_cast<T*>(scratch + offset); }

    void push_front(NodeList& list, u32 record) const;
    void push_back(NodeList& list, u32 record) const;
    void push_after(NodeList& list, u32 other, u32 record) const;  // on the older side of `other`
    // To its place in a list whose older records are nearer to the tail, looked for from both ends.
    template <class Older>  // Older: (u32, u32) -> bool, whether the first is older than the second
    void push_in_place(NodeList& list, u32 record, Older&& older) const;
    void unlink(NodeList& list, u32 record) const;
    bool stamped_before(u32 record, u32 other) const {
        return static_cast<std::int32_t>(nodes[record].stamp - nodes[other].stamp) < 0;
    }
};

template <class Older>
void Order::push_in_place(NodeList& list, u32 record, Older&& older) const {
    for (u32 young = list.head, old = list.tail; young && old; young = nodes[young].next, old = nodes[old].prev) {
        if (!older(old, record)) return push_after(list, old, record);
        if (!older(young, record)) continue;
        if (const u32 before = nodes[young].prev) return push_after(list, before, record);
        break;
    }
    push_front(list, record);
}

class Policy {
public:
    virtual ~Policy() = default;
    virtual const char* name() const = 0;

    // `depth` is the record's place in its prefix, from 1 on; 0 if it is in none; kSameDepth if it was here before.
    void insert(const Order& order, u32 record, u32 depth) const;
    void hit(const Order& order, u32 record) const;
    // `evicted`: for the sake of room, and not because nobody wants it any more.
    void remove(const Order& order, u32 record, bool evicted) const;
    // The record to evict next, 0 when there is none. Naming it changes nothing that a second call would see.
    u32 victim(const Order& order) const;
    // `record`, the victim, may not leave now: it steps aside, and comes back to its place when others have come.
    void spare(const Order& order, u32 record) const;

    // Scratch memory for about that many records, 0 if it needs none. Until the owner has any to give, it has to let
    // another policy run the order. An order that outgrows its scratch memory works, with worse decisions.
    virtual u64 scratch_for(const PolicyState&, u32 /*records*/) const { return 0; }
    // Empties the order. The scratch memory may hold anything.
    void reset(const Order& order) const;
    // The order gets scratch memory of at least the size of its own, which may hold anything: takes over what is in the old.
    void move(const Order& order, u8* scratch, u64 bytes) const;

    static constexpr u32 kSameDepth = ~0u;

protected:
    virtual void on_insert(const Order& order, u32 record, u32 depth) const = 0;
    virtual void on_hit(const Order& order, u32 record) const = 0;
    // Takes it out of the lists. With `evicted`, ghosts may remember it.
    virtual void on_remove(const Order& order, u32 record, bool evicted) const = 0;
    virtual u32 choose(const Order& order) const = 0;
    // Where choose() names it again. It was taken out by on_remove(..., false).
    virtual void put_back(const Order& order, u32 record) const = 0;
    virtual void on_reset(const Order&) const {}
    virtual void on_move(const Order&, u8* /*scratch*/, u64 /*bytes*/) const {}

private:
    void bring_back(const Order& order, u32 record) const;
};

inline constexpr u32 kUnknownPolicy = ~0u;
u32 policy_number(const char* name);        // kUnknownPolicy if there is none of that name
const Policy& policy_by_number(u32 number);
u32 policy_count();
inline constexpr u32 kPlainPolicy = 0;      // needs no scratch memory

}  // namespace kvstrata
