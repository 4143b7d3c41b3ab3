// CRC32C (Castagnoli), by the fastest instructions that the processor has.
#pragma once

#include <vector>

#include "types.hpp"

namespace kvstrata {

// Continues `crc` over n bytes: crc32c(0, "123456789", 9) == 0xE3069283, and
// crc32c(crc32c(0, a), b) == crc32c(0, ab).
u32 crc32c(u32 crc, const void* data, size_t n);

// crc32c(0, ...) of parts that lie one after the other, all of `part_bytes`, from the sum of each.
u32 crc32c_of_parts(const u32* sums, size_t count, u64 part_bytes);

// memcpy(dst, src, n), returning crc32c(crc, dst, n). The sum is taken of the copied bytes, each piece while it
// is still in the first-level cache, so a source that changes meanwhile can't make the sum of another content.
u32 copy_crc32c(void* dst, const void* src, size_t n, u32 crc);

// stream_bytes(dst, src, n), returning crc32c(crc, src, n): of a source that nobody changes meanwhile.
u32 stream_crc32c(void* dst, const void* src, size_t n, u32 crc);

// One way to compute it. All give the same result.
struct Crc32cMethod {
    const char* name;
    u32 (*run)(u32 crc, const void* data, size_t n);
};

// Those that this processor can run, the best first; the last is portable.
const std::vector<Crc32cMethod>& crc32c_methods();

}  // namespace kvstrata
