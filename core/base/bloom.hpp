// A counting Bloom filter: "certainly not in there", or "perhaps", without having the keys.
//
// Bloom, "Space/time trade-offs in hash coding with allowable errors", 1970; counters instead of bits, so that keys can
// be taken out again: Fan, Cao, Almeida, Broder, "Summary cache", 2000; several positions from one hash: Kirsch,
// Mitzenmacher, "Less hashing, same performance", 2006. Counters have four bits; one that reached 15 no longer knows its
// number and stays. So whatever is in there is always found, as long as nobody takes out what he didn't put in.
//
// It knows nothing of what it is used for, and works on memory that somebody else holds: private, or shared by
// processes. All is lock-free. Who dies half-way leaves some counters too high, never one too low.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "types.hpp"

namespace kvstrata {

// Spreads a hash of few bits over 64 (the finalizer of SplitMix64: Steele, Lea, Flood, 2014).
inline u64 spread(u64 hash) {
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

// How large a filter is.
struct BloomShape {
    u64 counters;
    u32 hashes;
    u32 spare;

    static constexpr u32 kMostHashes = 24;

    // The smallest for which `capacity` keys give at most `fp_rate` false positives: m = -n ln p / (ln 2)^2, k = m/n ln 2.
    static BloomShape of(u64 capacity, double fp_rate) {
        const double n = static_cast<double>(std::max<u64>(capacity, 1));
        const double k = std::clamp(std::round(-std::log2(fp_rate)), 1.0, double{kMostHashes});
        // With k rounded, m is what (1 - e^(-kn/m))^k = p asks for.
        const double m = std::ceil(-k * n / std::log1p(-std::pow(fp_rate, 1 / k)));
        return {align_up(std::max<u64>(static_cast<u64>(m), 64), 64), static_cast<u32>(k), 0};
    }
    u64 bytes() const { return counters / 2; }
    // The part of other keys that it takes for its own, once `keys` are in it.
    double fp_rate(double keys) const {
        return std::pow(-std::expm1(-static_cast<double>(hashes) * keys / static_cast<double>(counters)), hashes);
    }
};

// Where a hash of 64 good bits (see spread()) has its places in a filter. Not at equal steps from each other: in filters
// of a few hundred keys those meet too often (measured: 1.3 times as many false positives).
class BloomPositions {
public:
    BloomPositions(u64 hash, u64 places) : at_(hash), step_(spread(hash + 0x9e3779b97f4a7c15u) | 1), places_(places) {}
    u64 next() {
        __extension__ using Wide = unsigned __int128;
        const u64 position = static_cast<u64>(Wide{at_} * places_ >> 64);
        at_ += step_;
        step_ *= 0xd1342543de82ef95u;
        return position;
    }

private:
    u64 at_, step_, places_;
};

class CountingBloom {
public:
    static constexpr u8 kStuck = 15;
    using Byte = std::atomic<u8>;  // two counters
    static_assert(sizeof(Byte) == 1 && Byte::is_always_lock_free);

    // `bytes` are shape.bytes() of zeros, or what another filter of this shape has written there.
    CountingBloom(Byte* bytes, const BloomShape& shape) : bytes_(bytes), shape_(shape) {}

    const BloomShape& shape() const { return shape_; }

    // A hash has 64 good bits: see spread().
    bool contains(u64 hash) const { return count(hash) != 0; }
    // How often it was added: never too few up to kStuck, and too many where all its counters are others', too.
    u32 count(u64 hash) const {
        BloomPositions at(hash, shape_.counters);
        u32 least = kStuck;
        for (u32 i = 0; i < shape_.hashes && least; ++i) least = std::min<u32>(least, counter(at.next()));
        return least;
    }
    void add(u64 hash) {
        BloomPositions at(hash, shape_.counters);
        for (u32 i = 0; i < shape_.hashes; ++i)
            change(at.next(), [](u8 count) { return static_cast<u8>(count + 1); });
    }
    // Only for what was added, and once for each time.
    void remove(u64 hash) {
        BloomPositions at(hash, shape_.counters);
        for (u32 i = 0; i < shape_.hashes; ++i)
            change(at.next(), [](u8 count) { return static_cast<u8>(count ? count - 1 : 0); });
    }
    void prefetch(u64 hash) const { __builtin_prefetch(&bytes_[BloomPositions(hash, shape_.counters).next() / 2]); }

    void clear() {
        for (u64 i = 0; i < shape_.bytes(); ++i) bytes_[i].store(0, std::memory_order_relaxed);
    }

    struct Figures {
        double fill;     // part of the counters that aren't zero
        double fp_rate;  // by the fill: the chance that all counters of another key aren't zero
        double keys;     // about how many different ones made it as full as it is
        u64 stuck;       // counters that can't be taken down any more
    };
    // Looks at every counter.
    Figures figures() const {
        u64 used = 0, stuck = 0;
        for (u64 i = 0; i < shape_.bytes(); ++i) {
            const u8 pair = bytes_[i].load(std::memory_order_relaxed);
            for (const u8 count : {static_cast<u8>(pair & 15), static_cast<u8>(pair >> 4)}) {
                used += count != 0;
                stuck += count == kStuck;
            }
        }
        const double fill = static_cast<double>(used) / static_cast<double>(shape_.counters);
        const double most = 1 - 0.5 / static_cast<double>(shape_.counters);  // when all are used, the number is unknown
        return {fill, std::pow(fill, shape_.hashes),
                -static_cast<double>(shape_.counters) / shape_.hashes * std::log1p(-std::min(fill, most)), stuck};
    }

private:
    u8 counter(u64 at) const { return bytes_[at / 2].load(std::memory_order_acquire) >> (at % 2 * 4) & 15; }

    template <class Next>
    void change(u64 at, Next&& next) {
        Byte& pair = bytes_[at / 2];
        const u32 shift = at % 2 * 4;
        u8 now = pair.load(std::memory_order_relaxed);
        for (;;) {
            const u8 count = now >> shift & 15;
            if (count == kStuck) return;
            const u8 wanted = static_cast<u8>((now & ~(15 << shift)) | next(count) << shift);
            if (pair.compare_exchange_weak(now, wanted, std::memory_order_acq_rel, std::memory_order_relaxed)) return;
        }
    }

    Byte* bytes_;
    BloomShape shape_;
};

}  // namespace kvstrata
