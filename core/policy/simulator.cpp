#include "simulator.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "base/errors.hpp"

namespace kvstrata {
namespace {

u64 mixed(u64 key) {
    key = (key + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    key = (key ^ key >> 31) * 0x94d049bb133111ebu;
    return key ^ key >> 32;
}

const Policy& named(const char* name) {
    const u32 number = policy_number(name);
    if (number == kUnknownPolicy) throw InvalidValue(std::string("unknown policy ") + name);
    return policy_by_number(number);
}

constexpr u32 kFirstRoom = 64;   // records
constexpr u32 kFirstBits = 6;     // of the index

}  // namespace

Simulator::Simulator(const char* policy, u64 capacity, bool by_bytes)
    : policy_(named(policy)), capacity_(capacity), by_bytes_(by_bytes), records_(1), slots_(u64{1} << kFirstBits), shift_(64 - kFirstBits) {
    state_.capacity = capacity;
    state_.unit_bytes = by_bytes ? 1 : 0;
    if (!by_bytes) state_.expected = static_cast<u32>(std::min<u64>(capacity, ~u32{0}));
    grow_scratch();
}

Order Simulator::order() { return {{records_.data(), sizeof(Record)}, state_, scratch_, scratch_bytes_}; }

void Simulator::grow_scratch() {
    const bool first = !scratch_;
    state_.room = std::max(kFirstRoom, std::bit_ceil(state_.count + 1));
    if (state_.expected) state_.room = std::min(state_.room, std::max(state_.expected, kFirstRoom));
    const u64 bytes = policy_.scratch_for(state_, state_.room);
    if (!bytes) {
        state_.room = ~u32{0};
        return;
    }
    std::vector<u8> memory(bytes + kUnit);
    u8* const scratch = reinterpret_cast<u8*>(align_up(reinterpret_cast<u64>(memory.data()), kUnit));
    if (!first) policy_.move(order(), scratch, bytes);
    scratch_memory_ = std::move(memory);
    scratch_ = scratch;
    scratch_bytes_ = bytes;
    if (first) policy_.reset(order());
}

// ---- Index: open addressing with linear probing ---------------------------------------------------

u64 Simulator::home(u64 key) const { return mixed(key) >> shift_; }

void Simulator::prefetch(u64 key) const { __builtin_prefetch(&slots_[home(key)]); }

u32* Simulator::find(u64 key) const {
    const u64 mask = slots_.size() - 1;
    u64 slot = home(key);
    while (slots_[slot] && records_[slots_[slot]].key != key) slot = (slot + 1) & mask;
    return &slots_[slot];
}

void Simulator::erase(u32* slot) {
    const u64 mask = slots_.size() - 1;
    u64 hole = static_cast<u64>(slot - slots_.data());
    for (u64 next = (hole + 1) & mask; slots_[next]; next = (next + 1) & mask) {
        const u64 wanted = home(records_[slots_[next]].key);
        if (((next - wanted) & mask) < ((next - hole) & mask)) continue;  // would come to lie before its home
        slots_[hole] = slots_[next];
        hole = next;
    }
    slots_[hole] = 0;
}

void Simulator::grow_index() {
    const std::vector<u32> old = std::exchange(slots_, std::vector<u32>(slots_.size() * 2));
    --shift_;
    for (const u32 at : old)
        if (at) *find(records_[at].key) = at;
}

// ---- Accesses -------------------------------------------------------------------------------------

bool Simulator::access(const Access& access) {
    if (by_bytes_ && access.size > ~u32{0}) throw InvalidValue("a simulated record has less than 4 GiB");
    const u32 units = by_bytes_ ? static_cast<u32>(access.size) : 1;
    u32* slot = find(access.key);
    const u32 present = *slot;
    u32 depth = access.place == Place::unknown ? 0 : 1;
    if (access.place == Place::inside && access.parent != access.key) {
        u32 before = last_depth_;
        if (access.parent != last_key_) {
            const u32 parent = *find(access.parent);
            before = parent ? records_[parent].depth : 0;
        }
        depth = std::max(before, 1u) + 1;
    }
    last_key_ = access.key;
    last_depth_ = depth;
    const u32 now = ++tick_;
    if (present) {
        records_[present].node.stamp = now;
        policy_.hit(order(), present);
        return true;
    }
    if (units > capacity_) return false;
    while (state_.units + units > capacity_) leave(policy_.victim(order()), true);
    if (state_.count >= state_.room) grow_scratch();
    u32 at = free_;
    if (at) {
        free_ = records_[at].next_free;
    } else {
        at = static_cast<u32>(records_.size());
        records_.emplace_back();
        if (records_.size() * 2 > slots_.size()) grow_index();
    }
    Record& record = records_[at];
    record.node = PolicyNode::fresh(now, access.cost);
    record.hash = static_cast<u32>(mixed(access.key));
    record.units = units;
    record.key = access.key;
    record.depth = depth;
    *find(access.key) = at;
    policy_.insert(order(), at, depth);
    return false;
}

void Simulator::leave(u32 at, bool evicted) {
    policy_.remove(order(), at, evicted);
    erase(find(records_[at].key));
    records_[at].next_free = free_;
    free_ = at;
}

bool Simulator::remove(u64 key) {
    const u32 at = *find(key);
    if (at) leave(at, false);
    return at != 0;
}

}  // namespace kvstrata
