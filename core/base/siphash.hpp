// SipHash-1-3 (Aumasson, Bernstein 2012): a keyed hash, so that chosen keys can't be made to collide.
#pragma once

#include <bit>
#include <cstring>

#include "types.hpp"

namespace kvstrata {

inline u64 siphash13(u64 k0, u64 k1, const u8* data, size_t size) {
    u64 v0 = k0 ^ 0x736f6d6570736575u, v1 = k1 ^ 0x646f72616e646f6du;
    u64 v2 = k0 ^ 0x6c7967656e657261u, v3 = k1 ^ 0x7465646279746573u;
    auto round = [&] {
        v0 += v1; v1 = std::rotl(v1, 13); v1 ^= v0; v0 = std::rotl(v0, 32);
        v2 += v3; v3 = std::rotl(v3, 16); v3 ^= v2;
        v0 += v3; v3 = std::rotl(v3, 21); v3 ^= v0;
        v2 += v1; v1 = std::rotl(v1, 17); v1 ^= v2; v2 = std::rotl(v2, 32);
    };
    const size_t whole = size / 8 * 8;
    for (size_t i = 0; i < whole; i += 8) {
        u64 word;
        std::memcpy(&word, data + i, 8);
        v3 ^= word;
        round();
        v0 ^= word;
    }
    u64 last = static_cast<u64>(size) << 56;
    for (size_t i = whole; i < size; ++i) last |= static_cast<u64>(data[i]) << (8 * (i - whole));
    v3 ^= last;
    round();
    v0 ^= last;
    v2 ^= 0xff;
    round(); round(); round();
    return v0 ^ v1 ^ v2 ^ v3;
}

}  // namespace kvstrata
