// The kernels for any processor of this architecture (SSE2, NEON).
#include "kernels.inl"

const kvstrata::codecs::Kernels kvstrata::codecs::kPortable = kvstrata::codecs::table("portable");
