// Copying bytes.
#pragma once

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "types.hpp"

namespace kvstrata {

// memcpy. Where it is `rep movsb`, as in glibc from 2 KiB to half a MiB, AMD's processors (seen on Zen 3) take three to four times
// as long when the target lies 1 to 31 bytes behind the source within a page: just as arrays of numpy do, 16 bytes into
// one, to values that begin one. Then pieces are copied, each too small for that instruction.
inline void copy_bytes(void* to, const void* from, size_t n) {
    constexpr size_t kPiece = 1024, kLongest = 512 << 10;
    const size_t apart = (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) % 4096;
    if (n <= kPiece || n >= kLongest || apart == 0 || apart >= 32) {
        std::memcpy(to, from, n);
        return;
    }
    u8* target = static_cast<u8*>(to);
    const u8* source = static_cast<const u8*>(from);
    for (; n > kPiece; n -= kPiece, target += kPiece, source += kPiece) std::memcpy(target, source, kPiece);
    std::memcpy(target, source, n);
}

// memcpy around the processor's caches, for what is more than they hold: memory that is only written is not read before, and what
// others compute with stays in them. Other threads may look at it after end_of_stream().
inline void stream_bytes(void* to, const void* from, size_t n) {
#if defined(__x86_64__)
    constexpr size_t kLine = 64, kAhead = 1024;  // which is beyond a page before the processor would follow there by itself
    const size_t head = std::min(n, -reinterpret_cast<uintptr_t>(to) % kLine);
    u8* target = static_cast<u8*>(to);
    const u8* source = static_cast<const u8*>(from);
    std::memcpy(target, source, head);
    for (target += head, source += head, n -= head; n >= kLine; target += kLine, source += kLine, n -= kLine) {
        __builtin_prefetch(source + kAhead);
        const auto* const words = reinterpret_cast<const __m128i*>(source);
        const __m128i a = _mm_loadu_si128(words), b = _mm_loadu_si128(words + 1), c = _mm_loadu_si128(words + 2),
                      d = _mm_loadu_si128(words + 3);
        auto* const line = reinterpret_cast<__m128i*>(target);
        _mm_stream_si128(line, a);
        _mm_stream_si128(line + 1, b);
        _mm_stream_si128(line + 2, c);
        _mm_stream_si128(line + 3, d);
    }
    std::memcpy(target, source, n);
#else
    std::memcpy(to, from, n);
#endif
}

inline void end_of_stream() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace kvstrata
