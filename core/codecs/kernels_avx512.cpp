// The kernels for AVX-512 (F, BW, DQ, VL).
#ifdef __x86_64__
#include "kernels.inl"

const kvstrata::codecs::Kernels kvstrata::codecs::kAvx512 = kvstrata::codecs::table("avx512");
#endif
