// The last keys that left, oldest out first: 64-byte buckets of hashes and the numbers under which they came. Which numbers
// still count is a ring of bits, so a ghost that is taken out makes room for another.
#pragma once

#include <algorithm>

#include "policy.hpp"

namespace kvstrata {

class Ghosts {
public:
    static u64 bytes_for(u32 most) { return sizeof(Header) + bits_for(most) / 8 + buckets_for(most) * sizeof(Bucket); }

    // Lays out an empty one for as many as fit.
    static void make(u8* scratch, u64 bytes) {
        u32 most = 0;
        for (u32 bit = u32{1} << 30; bit; bit /= 2)
            if (bytes_for(most + bit) <= bytes) most += bit;
        std::memset(scratch, 0, bytes_for(most));
        *reinterpret_cast<Header*>(scratch) = {1, 1, 0, most};
    }

    explicit Ghosts(u8* scratch)
        : header_(*reinterpret_cast<Header*>(scratch)),
          bits_(reinterpret_cast<u64*>(scratch + sizeof(Header))),
          ring_(bits_for(header_.most)),
          buckets_(reinterpret_cast<Bucket*>(scratch + sizeof(Header) + ring_ / 8)),
          bucket_count_(buckets_for(header_.most)) {}

    // At most `limit` are kept.
    void add(u32 hash, u32 limit) {
        limit = std::min(limit, header_.most);
        if (!limit) return;
        while (header_.live >= limit || header_.next - header_.oldest >= ring_) forget(header_.oldest), ++header_.oldest;
        Bucket& bucket = bucket_of(hash);
        u32 place = 0, longest = 0;
        for (u32 i = 0; i < kWays; ++i) {
            if (!alive(bucket.number[i])) {
                place = i;
                break;
            }
            const u32 age = header_.next - bucket.number[i];
            if (age > longest) longest = age, place = i;
        }
        forget(bucket.number[place]);
        bucket.hash[place] = hash;
        bucket.number[place] = header_.next;
        word(header_.next) |= bit(header_.next);
        if (++header_.next == 0) ++header_.next;
        ++header_.live;
    }

    // Whether it was there; it isn't afterwards.
    bool take(u32 hash) {
        Bucket& bucket = bucket_of(hash);
        for (u32 i = 0; i < kWays; ++i) {
            if (bucket.hash[i] != hash || !alive(bucket.number[i])) continue;
            forget(bucket.number[i]);
            return true;
        }
        return false;
    }

private:
    static constexpr u32 kWays = 8;
    struct alignas(64) Header {
        u32 next, oldest;  // numbers; 0 is none
        u32 live;
        u32 most;
    };
    struct alignas(64) Bucket {
        u32 hash[kWays], number[kWays];
    };
    static u64 bits_for(u32 most) { return std::bit_ceil(u64{2} * (most < 256 ? 256 : most)); }
    static u64 buckets_for(u32 most) { return (u64{most} * 3 / 2 + kWays) / kWays; }

    Bucket& bucket_of(u32 hash) const { return buckets_[hash * bucket_count_ >> 32]; }
    static u64 bit(u32 number) { return u64{1} << (number % 64); }
    u64& word(u32 number) const { return bits_[number % ring_ / 64]; }
    bool alive(u32 number) const {
        return number && header_.next - number - 1 < header_.next - header_.oldest && (word(number) & bit(number));
    }
    void forget(u32 number) {
        if (!alive(number)) return;
        word(number) &= ~bit(number);
        --header_.live;
    }

    Header& header_;
    u64* bits_;
    u64 ring_;
    Bucket* buckets_;
    u64 bucket_count_;
};

}  // namespace kvstrata
