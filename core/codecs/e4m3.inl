// e4m3: the part of the kernels, inside their namespace; kernels.inl includes it.
// A code is a sign, four bits of exponent with a bias of 7, and three of mantissa; 448 is the most.

inline u8 to_e4m3(float x) {
    const u32 bits = bits_of(x), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
    const u32 normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
    const u32 small = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000u;  // units of 2^-9
    return static_cast<u8>((magnitude < 0x3c800000u ? small : normal) | sign);
}

inline float from_e4m3(u8 code) {
    const u32 magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
    const u32 normal = (magnitude << 20) + (120u << 23);
    const u32 small = bits_of(static_cast<float>(static_cast<int>(magnitude)) * 0.001953125f);
    return float_of((magnitude < 8 ? small : normal) | sign);
}

// The power of two that brings `most` into 224 (excluded) to 448; both it and its inverse are normal numbers.
inline float scale_of(float most) {
    float scale = 1.0f;
    while (most > 448.0f * scale && scale < 0x1p126f) scale *= 2.0f;
    while (most <= 224.0f * scale && scale > 0x1p-126f) scale *= 0.5f;
    return scale;
}

template <class T>
bool quantize_e4m3(const PlaneSpec& spec, u8* to, const u8* from, float* scratch) {
    const u32 cols = spec.cols;
    float* const x = scratch;
    float* const most = x + cols;
    if (spec.rows == 0 || cols == 0) return true;
    for (u32 i = 0; i < cols; ++i) most[i] = 0.0f;
    const u64 source_row = u64{cols} * T::size;
    for (u64 row = 0; row < spec.rows; ++row) {
        load_row<T>(x, from + row * source_row, cols);
        if (!all_finite(x, cols)) return false;
        for (u32 i = 0; i < cols; ++i) {
            const float magnitude = float_of(bits_of(x[i]) & 0x7fffffffu);
            most[i] = magnitude > most[i] ? magnitude : most[i];
        }
    }
    for (u32 i = 1; i < cols; ++i) most[0] = most[i] > most[0] ? most[i] : most[0];
    const float scale = most[0] > 0.0f ? scale_of(most[0]) : 1.0f, inverse = 1.0f / scale;
    F32::store(to, scale);
    u8* codes = to + 4;
    for (u64 row = 0; row < spec.rows; ++row, codes += cols) {
        load_row<T>(x, from + row * source_row, cols);
        for (u32 i = 0; i < cols; ++i) codes[i] = to_e4m3(bounded(x[i] * inverse, 448.0f));
    }
    return true;
}

template <class T>
void dequantize_e4m3(const PlaneSpec& spec, u8* __restrict to, const u8* from) {
    if (spec.rows == 0 || spec.cols == 0) return;
    const float scale = F32::load(from);
    const u8* codes = from + 4;
    for (u64 row = 0; row < spec.rows; ++row, codes += spec.cols, to += u64{spec.cols} * T::size)
        for (u32 i = 0; i < spec.cols; ++i) T::store(to + u64{i} * T::size, from_e4m3(codes[i]) * scale);
}
