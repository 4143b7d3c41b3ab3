// How often keys have been seen, approximately: a counting Bloom filter (Fan, Cao, Almeida, Broder: "Summary Cache", 1998).
//
// As many counters a record and as many hashes as a false-positive rate of 0.001 takes: an estimate is too high only when all
// ten counters are shared with others. Counters are halved now and then (Einziger, Friedman, Manes: "TinyLFU", 2017).
#pragma once

#include "policy.hpp"

namespace kvstrata {

class Sketch {
public:
    static constexpr double kCountersARecord = 14.378;  // -ln(0.001) / ln(2)^2
    static constexpr u32 kHashes = 10;                  // ln(2) * kCountersARecord

    static u64 bytes_for(u32 records) {
        return align_up(static_cast<u64>(kCountersARecord * records + 1) * sizeof(u16), kUnit);
    }

    Sketch(u8* scratch, u64 bytes) : counters_(reinterpret_cast<u16*>(scratch)), count_(bytes / sizeof(u16)) {}

    void clear() { std::memset(counters_, 0, count_ * sizeof(u16)); }

    void add(u32 hash) {
        each(hash, [](u16& counter) { counter = static_cast<u16>(counter + (counter != 0xffff)); });
    }

    u32 estimate(u32 hash) const {
        u32 least = ~0u;
        each(hash, [&](u16& counter) { least = counter < least ? counter : least; });
        return least;
    }

    void halve() {
        for (u64 i = 0; i < count_; ++i) counters_[i] = static_cast<u16>(counters_[i] >> 1);
    }

    // Makes this one, of another size, say what `other` says.
    void copy(const Sketch& other) {
        for (u64 i = 0; i < count_; ++i) counters_[i] = other.counters_[i * other.count_ / count_];
    }

private:
    template <class Visit>
    void each(u32 hash, Visit&& visit) const {
        u64 x = (hash + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
        x ^= x >> 31;
        const u64 step = (x * 0x94d049bb133111ebu) | 1;
        for (u32 i = 0; i < kHashes; ++i, x += step) visit(counters_[(x >> 32) * count_ >> 32]);
    }

    u16* counters_;
    u64 count_;
};

}  // namespace kvstrata
