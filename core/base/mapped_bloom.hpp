// A Bloom filter (Bloom 1970) of bits, in memory that processes may share, which can be begun anew while others use it.
//
// It takes names in before what they name can be found, and says of a name "certainly not in there" only while it is
// complete. To begin anew makes it incomplete; whoever did so puts in what there was until then, while all others go
// on putting in what is new, and then says that it is complete. A lookup that finds a bit unset looks once more whether
// the filter is the one that it was at the beginning, as with a seqlock (Lameter, "Effective synchronization on
// Linux/NUMA systems", 2005).
//
// Lookups and additions are lock-free. Those who put in and who begin anew have to exclude one another. Who dies
// half-way leaves too many bits, or a filter that isn't complete.
#pragma once

#include <algorithm>
#include <atomic>
#include <string_view>

#include "bloom.hpp"
#include "errors.hpp"
#include "siphash.hpp"
#include "types.hpp"

namespace kvstrata {

class MappedBloom {
public:
    using Word = std::atomic<u64>;
    static_assert(sizeof(Word) == 8 && Word::is_always_lock_free);

    // The memory that a filter for so many names needs.
    static u64 bytes_for(u64 capacity, double fp_rate) { return kHead + bits_for(capacity, fp_rate) / 8; }

    // `memory`: zeros, or what another one has written there; aligned to 8 bytes.
    MappedBloom(void* memory, u64 bytes) : words_(static_cast<Word*>(memory)) {
        if (bytes < kHead + 8) throw InvalidValue("that is too little memory for a filter");
        most_bits_ = (bytes - kHead) / 8 * 64;
    }

    // Takes everything out, and makes it one for `capacity` names, not complete. Returns what complete() wants to know.
    u64 begin(u64 capacity, double fp_rate, const u64 (&secret)[2]) {
        const u64 bits = bits_for(capacity, fp_rate);
        if (bits > most_bits_) throw InvalidValue("there isn't enough memory for a filter of so many names");
        const u64 phase = (words_[kPhase].load(std::memory_order_relaxed) | 1) + 2;  // odd
        words_[kPhase].store(phase, std::memory_order_release);
        // Whoever sees any of what follows sees that, too.
        put(kBits, bits);
        put(kHashes, BloomShape::of(capacity, fp_rate).hashes);
        put(kSecret, secret[0]);
        put(kSecret + 1, secret[1]);
        put(kCapacity, capacity);
        put(kCount, 0);
        for (u64 i = 0; i < bits / 64; ++i)  // what was never used needs no memory
            if (words_[kFirst + i].load(std::memory_order_relaxed)) put(kFirst + i, 0);
        put(kMagicAt, kMagic);
        return phase;
    }

    // Says that all is in; false if it was begun anew meanwhile.
    bool complete(u64 phase) {
        return words_[kPhase].compare_exchange_strong(phase, phase + 1, std::memory_order_acq_rel);
    }

    bool is_complete() const { return complete_in(get(kPhase)) && sound(); }

    // Puts a name in.
    void add(std::string_view name) {
        if (!sound()) return;  // nobody uses it before it is begun anew
        const u64 bits = get(kBits), hash = hash_of(name);
        const u32 hashes = static_cast<u32>(get(kHashes));
        BloomPositions at(hash, bits);
        bool fresh = false;
        for (u32 i = 0; i < hashes; ++i) {
            const u64 position = at.next(), bit = u64{1} << position % 64;
            Word& word = words_[kFirst + position / 64];
            if (!(word.load(std::memory_order_acquire) & bit))
                fresh |= !(word.fetch_or(bit, std::memory_order_acq_rel) & bit);
        }
        if (fresh) words_[kCount].fetch_add(1, std::memory_order_relaxed);
    }

    // Whether a name is certainly not in there.
    bool lacks(std::string_view name) const {
        const u64 phase = get(kPhase);
        if (!complete_in(phase) || !sound()) return false;
        const u64 bits = get(kBits), hash = hash_of(name);
        const u32 hashes = static_cast<u32>(get(kHashes));
        if (bits > most_bits_ || !bits) return false;  // begun anew just now
        BloomPositions at(hash, bits);
        for (u32 i = 0; i < std::min(hashes, BloomShape::kMostHashes); ++i) {
            const u64 position = at.next();
            if (!(get(kFirst + position / 64) >> position % 64 & 1)) return get(kPhase) == phase;
        }
        return false;
    }

    // For how many names it was begun, how many it has about, and the bytes that these lie in.
    u64 capacity() const { return get(kCapacity); }
    u64 count() const { return get(kCount); }
    u64 bytes() const { return kHead + get(kBits) / 8; }

private:
    enum : u64 { kMagicAt, kPhase, kBits, kHashes, kSecret, kCapacity = kSecret + 2, kCount, kFirst };
    static constexpr u64 kHead = kFirst * 8;
    static constexpr u64 kMagic = 0x31304d4f4c42564b;  // "KVBLOM01"

    static u64 bits_for(u64 capacity, double fp_rate) { return BloomShape::of(capacity, fp_rate).counters; }
    static bool complete_in(u64 phase) { return phase && phase % 2 == 0; }

    // All by acquire and release, without fences: so what a lookup sees of a newer filter tells it that there is one.
    u64 get(u64 at) const { return words_[at].load(std::memory_order_acquire); }
    void put(u64 at, u64 value) { words_[at].store(value, std::memory_order_release); }

    bool sound() const {
        const u64 bits = get(kBits), hashes = get(kHashes);
        return get(kMagicAt) == kMagic && bits && bits % 64 == 0 && bits <= most_bits_ && hashes &&
               hashes <= BloomShape::kMostHashes;
    }
    u64 hash_of(std::string_view name) const {
        return siphash13(get(kSecret), get(kSecret + 1), reinterpret_cast<const u8*>(name.data()), name.size());
    }

    Word* words_;
    u64 most_bits_;
};

}  // namespace kvstrata
