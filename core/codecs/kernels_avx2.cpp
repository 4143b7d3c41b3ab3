// The kernels for AVX2.
#ifdef __x86_64__
#include "kernels.inl"

const kvstrata::codecs::Kernels kvstrata::codecs::kAvx2 = kvstrata::codecs::table("avx2");
#endif
