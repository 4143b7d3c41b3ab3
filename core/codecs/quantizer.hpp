// Which kernels this processor runs, and the quantization of whole tensors with them.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace kvstrata::codecs {

// Those that this processor can run, the best first; the last is the portable one.
const std::vector<Kernels>& all_kernels();

// The best one, or the one that $KVSTRATA_SIMD names (portable, avx2, avx512) if it can run here.
const Kernels& kernels();

// From now on in this process: the kernels of that name. False if there are none. For tests and measurements.
bool use_kernels(const char* name);

// A tensor as a row of planes: runs of `inner` planes hold keys and values in turn, or all hold the same.
struct TensorSpec {
    enum class Kind : u8 { values = 0, keys = 1, both = 2 };
    PlaneSpec keys, values;  // equal but for scales, by_channel and rotate
    u32 inner;
    Kind kind;

    // Throws InvalidValue when it can't be.
    void check() const;
    const PlaneSpec& of(u64 plane) const {
        if (kind != Kind::both) return kind == Kind::keys ? keys : values;
        return plane / inner % 2 == 0 ? keys : values;
    }
    u64 plane_bytes() const { return values.plane_bytes(); }
    // Of `count` planes from `first` on, quantized.
    u64 coded_bytes(u64 first, u64 count) const;
};

// Quantizes `count` planes, of which the first has number `first` in its tensor; `to` has coded_bytes(first, count).
// False, and `to` without meaning, if an element isn't finite or a scale has no representation.
bool quantize(const TensorSpec& spec, u64 first, u64 count, const u8* from, u8* to);

// `to` gets count * plane_bytes(). Any bytes in `from` are safe: they give some finite numbers.
void dequantize(const TensorSpec& spec, u64 first, u64 count, const u8* from, u8* to);

}  // namespace kvstrata::codecs
