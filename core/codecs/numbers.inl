// Numbers: the part of the kernels, inside their namespace; kernels.inl includes it.
// All conversions round to nearest, ties to even.

inline u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }
inline float float_of(u32 bits) { return __builtin_bit_cast(float, bits); }

inline bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
inline float bounded(float x, float most) {  // a NaN becomes `most`
    x = x < most ? x : most;
    return x > -most ? x : -most;
}

struct F32 {
    static constexpr u32 size = 4;
    static constexpr float most = 3.40282347e38f;
    static float load(const u8* p) {
        float x;
        __builtin_memcpy(&x, p, 4);
        return x;
    }
    static void store(u8* p, float x) {
        x = bounded(x, most);
        __builtin_memcpy(p, &x, 4);
    }
};

struct BF16 {
    static constexpr u32 size = 2;
    static constexpr float most = 3.38953139e38f;
    static float load(const u8* p) {
        u16 word;
        __builtin_memcpy(&word, p, 2);
        return float_of(u32{word} << 16);
    }
    static void store(u8* p, float x) {
        const u32 bits = bits_of(bounded(x, most));
        const u16 word = static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        __builtin_memcpy(p, &word, 2);
    }
};

struct F16 {
    static constexpr u32 size = 2;
    static constexpr float most = 65504.0f;
    static float load(const u8* p) {
        u16 word;
        __builtin_memcpy(&word, p, 2);
        const u32 magnitude = word & 0x7fffu, sign = (word & 0x8000u) << 16;
        const u32 shifted = (magnitude << 13) + (112u << 23);
        const u32 normal = shifted + (magnitude >= 0x7c00u ? 112u << 23 : 0u);
        // Below 2^-14: as the end of a float from 2^-14 on, which is then taken off.
        const u32 small = bits_of(float_of((magnitude << 13) | 0x38800000u) - float_of(0x38800000u));
        return float_of((magnitude < 0x400u ? small : normal) | sign);
    }
    static void store(u8* p, float x) {
        x = bounded(x, most);
        const u32 bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const u32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
        const u32 small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
        const u16 word = static_cast<u16>((magnitude < 0x38800000u ? small : normal) | sign);
        __builtin_memcpy(p, &word, 2);
    }
};

inline float rounded_scale(u8* p, float x, Scales how) {
    switch (how) {
        case Scales::f32: F32::store(p, x); return F32::load(p);
        case Scales::bf16: BF16::store(p, x); return BF16::load(p);
        case Scales::f16: F16::store(p, x); return F16::load(p);
        case Scales::f8: break;
    }
    u16 word;
    F16::store(reinterpret_cast<u8*>(&word), x);
    *p = static_cast<u8>((word + 127) >> 7);
    word = static_cast<u16>(*p << 7);
    return F16::load(reinterpret_cast<const u8*>(&word));
}

template <class T>
void load_row(float* __restrict x, const u8* from, u32 cols) {
    for (u32 i = 0; i < cols; ++i) x[i] = T::load(from + u64{i} * T::size);
}

template <class T>
void store_row(u8* __restrict to, const float* x, u32 cols) {
    for (u32 i = 0; i < cols; ++i) T::store(to + u64{i} * T::size, x[i]);
}

inline bool all_finite(const float* x, u64 n) {
    u32 bad = 0;
    for (u64 i = 0; i < n; ++i) bad |= (bits_of(x[i]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
    return bad == 0;
}
