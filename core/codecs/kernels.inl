// The kernels, included by one source for each instruction set. Plain loops that compilers vectorize; without
// contraction to fused operations (CMakeLists.txt), so that each instruction set computes the same bits. Nothing of the
// standard library is used here: an inline function of it, compiled for AVX, could be the one that the linker keeps
// for everybody.
//
// Groups with scale and minimum, keys by channel and values by token: KIVI (Liu et al., 2024, arXiv:2402.02750).
// The rotation: QuaRot (Ashkboos et al., 2024, arXiv:2404.00456).
#include "kernels.hpp"

namespace kvstrata::codecs {
namespace {

// In this order.
#include "numbers.inl"
#include "planes.inl"
#include "groups.inl"
#include "e4m3.inl"

template <class T>
bool quantize_as(const PlaneSpec& spec, u8* to, const u8* from, float* scratch) {
    return spec.code == Code::e4m3 ? quantize_e4m3<T>(spec, to, from, scratch)
                                   : quantize_plane<T>(spec, to, from, scratch);
}

template <class T>
void dequantize_as(const PlaneSpec& spec, u8* to, const u8* from, float* scratch) {
    if (spec.code == Code::e4m3) return dequantize_e4m3<T>(spec, to, from);
    dequantize_plane<T>(spec, to, from, scratch);
}

bool quantize(const PlaneSpec& spec, u8* to, const u8* from, float* scratch) {
    switch (spec.dtype) {
        case Dtype::f32: return quantize_as<F32>(spec, to, from, scratch);
        case Dtype::f16: return quantize_as<F16>(spec, to, from, scratch);
        case Dtype::bf16: break;
    }
    return quantize_as<BF16>(spec, to, from, scratch);
}

void dequantize(const PlaneSpec& spec, u8* to, const u8* from, float* scratch) {
    switch (spec.dtype) {
        case Dtype::f32: return dequantize_as<F32>(spec, to, from, scratch);
        case Dtype::f16: return dequantize_as<F16>(spec, to, from, scratch);
        case Dtype::bf16: break;
    }
    dequantize_as<BF16>(spec, to, from, scratch);
}

constexpr Kernels table(const char* name) { return {name, split, join, quantize, dequantize, hadamard}; }

}  // namespace
}  // namespace kvstrata::codecs
