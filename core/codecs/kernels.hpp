// The arithmetic of the codecs: byte planes, and the quantization of planes of a tensor. One source (kernels.inl),
// compiled for several instruction sets; all give the same bits.
#pragma once

#include "base/types.hpp"

namespace kvstrata::codecs {

// Elements, as payloads name them (docs/format.md).
enum class Dtype : u8 { f32 = 1, f16 = 2, bf16 = 3 };
// How the scale and the minimum of a group are stored. f8: the scale as the upper half of an f16 without its sign,
// rounded up, and the minimum as an f16.
enum class Scales : u8 { f32 = 1, f16 = 2, bf16 = 3, f8 = 4 };
// What a quantized element is.
enum class Code : u8 { int8 = 1, int4 = 2, e4m3 = 3 };

inline constexpr u64 element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// One plane: `rows` tokens of `cols` channels, contiguous.
struct PlaneSpec {
    Dtype dtype;
    Code code;
    Scales scales;    // of int8 and int4; e4m3 has one f32 for the plane
    bool by_channel;  // a group is `group` tokens of one channel; else `group` channels of one token
    bool rotate;      // each token is multiplied by the orthonormal Hadamard matrix first; cols is a power of two
    u32 group, rows, cols;

    u64 plane_bytes() const { return u64{rows} * cols * element_bytes(dtype); }
    u64 entries() const {
        const u64 lengths = by_channel ? rows : cols, across = by_channel ? cols : rows;
        return (lengths + group - 1) / group * across;
    }
    u64 scale_bytes() const { return scales == Scales::f32 ? 4 : scales == Scales::f8 ? 1 : 2; }
    u64 minimum_bytes() const { return scales == Scales::f32 ? 4 : 2; }
    u64 row_bytes() const { return code == Code::int4 ? (u64{cols} + 1) / 2 : cols; }
    // Of the quantized plane: scales, minima, rows of codes. e4m3: the scale, rows of codes.
    u64 coded_bytes() const {
        const u64 codes = rows * row_bytes();
        return code == Code::e4m3 ? (rows && cols ? 4 : 0) + codes
                                  : entries() * (scale_bytes() + minimum_bytes()) + codes;
    }
    u64 tile_rows() const { return code == Code::e4m3 || by_channel ? (group < rows ? group : rows) : 1; }
    // Floats of scratch memory that quantize and dequantize need.
    u64 scratch_floats() const { return (tile_rows() + 6) * u64{cols}; }
};

struct Kernels {
    const char* name;
    // Splits n elements of `width` (2 or 4) bytes, rotated left by one bit so that the sign goes to the lowest
    // plane, into planes of n bytes each, lowest first; and back.
    void (*split)(u8* const* planes, const u8* from, u64 n, u32 width);
    void (*join)(u8* to, const u8* const* planes, u64 n, u32 width);
    // False, and `to` without meaning, if an element isn't finite or a scale has no representation.
    bool (*quantize)(const PlaneSpec& spec, u8* to, const u8* from, float* scratch);
    void (*dequantize)(const PlaneSpec& spec, u8* to, const u8* from, float* scratch);
    // Multiplies each row by the orthonormal Hadamard matrix; `scratch` holds one row, cols is a power of two.
    void (*hadamard)(float* rows, u64 count, u32 cols, float* scratch);
};

extern const Kernels kPortable;
#ifdef __x86_64__
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace kvstrata::codecs
