// What debug builds (KVSTRATA_DEBUG) do to memory so that misuse of it shows. In others nothing of it is left.
//
// A block in use has a canary behind its end; who writes beyond the end kills it. Free memory is filled with a pattern,
// in which a write to a block after it was freed is seen when it is handed out again. Under AddressSanitizer free memory
// is out of bounds, too, reads of it included, where somebody promises that one process has the mapping for itself:
// others would have to be told of each block.
#pragma once

#include <cstring>

#include "base/types.hpp"

#if defined(KVSTRATA_DEBUG) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kvstrata {

#ifdef KVSTRATA_DEBUG
inline constexpr bool kDebug = true;
inline constexpr u32 kCanaryUnits = 1;  // that a block is longer than asked for
#else
inline constexpr bool kDebug = false;
inline constexpr u32 kCanaryUnits = 0;
#endif
inline constexpr u8 kCanary = 0xC5;  // no byte of the other pattern, and unlikely in what is written too far
inline constexpr u8 kFreed = 0xDD;

inline bool all_are(const u8* bytes, u64 count, u8 what) {
    return count == 0 || (*bytes == what && std::memcmp(bytes, bytes + 1, count - 1) == 0);
}

inline void allow_access([[maybe_unused]] const u8* bytes, [[maybe_unused]] u64 count) {
#if defined(KVSTRATA_DEBUG) && defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bytes, count);
#endif
}

inline void forbid_access([[maybe_unused]] const u8* bytes, [[maybe_unused]] u64 count) {
#if defined(KVSTRATA_DEBUG) && defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(bytes, count);
#endif
}

}  // namespace kvstrata
