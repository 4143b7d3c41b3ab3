// Short names for fixed-width integers, and the units that offsets are counted in.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvstrata {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

using Key = std::span<const u8>;

inline constexpr u64 kUnit = 64;         // records and blocks are placed at multiples of this
inline constexpr u64 kPage = 4096;       // large records are placed at multiples of this
inline constexpr u32 kMaxKey = 1024;     // bytes

inline constexpr u64 align_up(u64 value, u64 to) { return (value + to - 1) / to * to; }

// Raises a number that others may be raising, too; it never falls.
template <class T>
void raise_to(std::atomic<T>& number, T least) {
    T now = number.load();
    while (now < least && !number.compare_exchange_weak(now, least)) {
    }
}

}  // namespace kvstrata
