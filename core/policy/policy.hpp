// The interface of replacement policies: which record leaves the memory tier first.
//
// A policy is code without state. Its state lies in the mapping: one PolicyState per namespace, one PolicyNode per
// record. All calls happen under the namespace's policy lock.
#pragma once

#include "../types.hpp"

namespace kvstrata {

struct PolicyNode {
    u32 prev, next;  // neighbours in the policy's order, 0 = none
    u32 stamp;       // tick of the last access
    float cost;      // to compute the value again, in the caller's unit; 1 if not given
};

struct PolicyState {
    u32 head, tail;
    u32 count;
    u32 spare[13];
};

// The nodes of all records, numbered from 1, wherever they lie.
class Nodes {
public:
    Nodes(void* first, size_t stride) : first_(static_cast<u8*>(first)), stride_(stride) {}
    PolicyNode& operator[](u32 number) const {
        return *reinterpret_cast<PolicyNode*>(first_ + u64{number} * stride_);
    }

private:
    u8* first_;
    size_t stride_;
};

class Policy {
public:
    virtual ~Policy() = default;
    virtual const char* name() const = 0;
    virtual void on_insert(Nodes nodes, PolicyState& state, u32 record) const = 0;
    virtual void on_hit(Nodes nodes, PolicyState& state, u32 record) const = 0;
    virtual void on_remove(Nodes nodes, PolicyState& state, u32 record) const = 0;
    // The record to evict next, 0 when there is none.
    virtual u32 victim(Nodes nodes, const PolicyState& state) const = 0;
    // `record`, the victim, may not leave now: make victim() name another.
    virtual void spare(Nodes nodes, PolicyState& state, u32 record) const = 0;
};

inline constexpr u32 kUnknownPolicy = ~0u;
u32 policy_number(const char* name);        // kUnknownPolicy if there is none of that name
const Policy& policy_by_number(u32 number);
u32 policy_count();

}  // namespace kvstrata
