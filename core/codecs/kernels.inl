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

// ---- Numbers. All conversions round to nearest, ties to even. ----------------------------------

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

// ---- Byte planes -------------------------------------------------------------------------------

void split(u8* const* planes, const u8* from, u64 n, u32 width) {
    if (width == 2) {
        u8* __restrict low = planes[0];
        u8* __restrict high = planes[1];
        for (u64 i = 0; i < n; ++i) {
            u16 word;
            __builtin_memcpy(&word, from + 2 * i, 2);
            low[i] = static_cast<u8>((word << 1) | (word >> 15));
            high[i] = static_cast<u8>(word >> 7);
        }
        return;
    }
    u8* __restrict a = planes[0];
    u8* __restrict b = planes[1];
    u8* __restrict c = planes[2];
    u8* __restrict d = planes[3];
    for (u64 i = 0; i < n; ++i) {
        u32 word;
        __builtin_memcpy(&word, from + 4 * i, 4);
        a[i] = static_cast<u8>((word << 1) | (word >> 31));
        b[i] = static_cast<u8>(word >> 7);
        c[i] = static_cast<u8>(word >> 15);
        d[i] = static_cast<u8>(word >> 23);
    }
}

void join(u8* __restrict to, const u8* const* planes, u64 n, u32 width) {
    if (width == 2) {
        const u8* low = planes[0];
        const u8* high = planes[1];
        for (u64 i = 0; i < n; ++i) {
            const u16 word = static_cast<u16>(low[i] | (high[i] << 8));
            const u16 back = static_cast<u16>((word >> 1) | (word << 15));
            __builtin_memcpy(to + 2 * i, &back, 2);
        }
        return;
    }
    const u8* a = planes[0];
    const u8* b = planes[1];
    const u8* c = planes[2];
    const u8* d = planes[3];
    for (u64 i = 0; i < n; ++i) {
        const u32 word = u32{a[i]} | (u32{b[i]} << 8) | (u32{c[i]} << 16) | (u32{d[i]} << 24);
        const u32 back = (word >> 1) | (word << 31);
        __builtin_memcpy(to + 4 * i, &back, 4);
    }
}

// ---- The rotation ------------------------------------------------------------------------------

// One row. Each stage reads pairs half a row apart and writes neighbours: all stages are the same loop.
void rotate(float* row, u32 cols, float* scratch) {
    float* from = row;
    float* to = scratch;
    const u32 half = cols / 2;
    for (u32 stage = 1; stage < cols; stage *= 2) {
        const float* __restrict in = from;
        float* __restrict out = to;
        for (u32 i = 0; i < half; ++i) {
            out[2 * i] = in[i] + in[i + half];
            out[2 * i + 1] = in[i] - in[i + half];
        }
        float* const next = from;
        from = to;
        to = next;
    }
    const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(cols));
    for (u32 i = 0; i < cols; ++i) row[i] = from[i] * norm;
}

void hadamard(float* rows, u64 count, u32 cols, float* scratch) {
    for (u64 i = 0; i < count; ++i) rotate(rows + i * cols, cols, scratch);
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

// ---- int8 and int4 -----------------------------------------------------------------------------

// From the bounds of `n` groups their stored scales and minima; and what elements are coded with, `inverse` and
// `minimum`, which is what the decoder will read. False if they have no representation.
bool settle(const PlaneSpec& spec, u8* scales, u8* minima, const float* low, const float* high, u64 n, float* inverse,
            float* minimum) {
    const float levels = spec.code == Code::int8 ? 255.0f : 15.0f;
    const bool narrow = spec.scales == Scales::f16 || spec.scales == Scales::f8;
    const Scales of_minima = spec.scales == Scales::f8 ? Scales::f16 : spec.scales;
    for (u64 i = 0; i < n; ++i) {
        const float step = (high[i] - low[i]) / levels;
        if (!is_finite(step)) return false;
        if (narrow && (step > F16::most || low[i] > F16::most || low[i] < -F16::most)) return false;
        const float scale = rounded_scale(scales + i * spec.scale_bytes(), step, spec.scales);
        const float one = 1.0f / scale;
        if (!is_finite(scale)) return false;
        inverse[i] = is_finite(one) ? one : 0.0f;
        minimum[i] = rounded_scale(minima + i * spec.minimum_bytes(), low[i], of_minima);
    }
    return true;
}

inline u8 coded(float x, float inverse, float minimum, float levels) {
    float t = (x - minimum) * inverse;
    t = t > 0.0f ? t : 0.0f;
    t = t < levels ? t : levels;
    return static_cast<u8>(bits_of(t + 8388608.0f));  // 2^23: what is behind the point is rounded off
}

void code_row(const PlaneSpec& spec, u8* __restrict to, const float* x, const float* inverse, const float* minimum) {
    if (spec.code == Code::int8) {
        for (u32 i = 0; i < spec.cols; ++i) to[i] = coded(x[i], inverse[i], minimum[i], 255.0f);
        return;
    }
    const u32 half = (spec.cols + 1) / 2, rest = spec.cols - half;
    for (u32 i = 0; i < rest; ++i) {
        const u8 low = coded(x[i], inverse[i], minimum[i], 15.0f);
        const u8 high = coded(x[i + half], inverse[i + half], minimum[i + half], 15.0f);
        to[i] = static_cast<u8>(low | (high << 4));
    }
    if (rest != half) to[rest] = coded(x[rest], inverse[rest], minimum[rest], 15.0f);
}

// The bounds of each run of `group` elements of a row, by sixteen lanes.
void bounds_of_row(const float* x, u32 cols, u32 group, float* low, float* high) {
    for (u32 start = 0, at = 0; start < cols; start += group, ++at) {
        const u32 n = cols - start < group ? cols - start : group;
        const float* const run = x + start;
        float lows[16], highs[16];
        for (u32 lane = 0; lane < 16; ++lane) lows[lane] = highs[lane] = run[0];
        u32 i = 0;
        for (; i + 16 <= n; i += 16)
            for (u32 lane = 0; lane < 16; ++lane) {
                lows[lane] = run[i + lane] < lows[lane] ? run[i + lane] : lows[lane];
                highs[lane] = run[i + lane] > highs[lane] ? run[i + lane] : highs[lane];
            }
        for (; i < n; ++i) {
            lows[0] = run[i] < lows[0] ? run[i] : lows[0];
            highs[0] = run[i] > highs[0] ? run[i] : highs[0];
        }
        for (u32 lane = 1; lane < 16; ++lane) {
            lows[0] = lows[lane] < lows[0] ? lows[lane] : lows[0];
            highs[0] = highs[lane] > highs[0] ? highs[lane] : highs[0];
        }
        low[at] = lows[0];
        high[at] = highs[0];
    }
}

void widen_bounds(float* __restrict low, float* __restrict high, const float* x, u32 cols) {
    for (u32 i = 0; i < cols; ++i) {
        low[i] = x[i] < low[i] ? x[i] : low[i];
        high[i] = x[i] > high[i] ? x[i] : high[i];
    }
}

inline void spread(float* to, const float* from, u32 cols, u32 group) {
    for (u32 start = 0, at = 0; start < cols; start += group, ++at) {
        const u32 end = cols - start < group ? cols : start + group;
        const float value = from[at];
        for (u32 i = start; i < end; ++i) to[i] = value;
    }
}

struct Parts {
    u8 *scales, *minima, *codes;
    Parts(const PlaneSpec& spec, u8* at)
        : scales(at),
          minima(at + spec.entries() * spec.scale_bytes()),
          codes(minima + spec.entries() * spec.minimum_bytes()) {}
};

template <class T>
bool quantize_plane(const PlaneSpec& spec, u8* to, const u8* from, float* scratch) {
    const u32 cols = spec.cols;
    const u64 tile = spec.tile_rows(), source_row = u64{cols} * T::size, per_row = (u64{cols} + spec.group - 1) / spec.group;
    float* const x = scratch;
    float* const low = x + tile * cols;
    float* const high = low + cols;
    float* const inverse = high + cols;
    float* const minimum = inverse + cols;
    float* const spare = minimum + cols;
    const Parts parts(spec, to);
    u64 entry = 0;
    for (u64 start = 0; start < spec.rows; start += tile) {
        const u64 rows = spec.rows - start < tile ? spec.rows - start : tile;
        for (u64 row = 0; row < rows; ++row) {
            load_row<T>(x + row * cols, from + (start + row) * source_row, cols);
            if (spec.rotate) rotate(x + row * cols, cols, spare);
        }
        if (!all_finite(x, rows * cols)) return false;
        u64 entries = cols;
        if (spec.by_channel) {
            for (u32 i = 0; i < cols; ++i) low[i] = high[i] = x[i];
            for (u64 row = 1; row < rows; ++row) widen_bounds(low, high, x + row * cols, cols);
        } else {
            bounds_of_row(x, cols, spec.group, low, high);
            entries = per_row;
        }
        if (!settle(spec, parts.scales + entry * spec.scale_bytes(), parts.minima + entry * spec.minimum_bytes(), low, high,
                    entries, inverse, minimum))
            return false;
        entry += entries;
        const float *by = inverse, *less = minimum;
        if (!spec.by_channel) {
            spread(low, inverse, cols, spec.group);
            spread(high, minimum, cols, spec.group);
            by = low, less = high;
        }
        for (u64 row = 0; row < rows; ++row)
            code_row(spec, parts.codes + (start + row) * spec.row_bytes(), x + row * cols, by, less);
    }
    return true;
}

void read_floats(float* __restrict to, const u8* from, u64 n, Scales how) {
    switch (how) {
        case Scales::f32: for (u64 i = 0; i < n; ++i) to[i] = F32::load(from + 4 * i); return;
        case Scales::f16: for (u64 i = 0; i < n; ++i) to[i] = F16::load(from + 2 * i); return;
        case Scales::bf16: for (u64 i = 0; i < n; ++i) to[i] = BF16::load(from + 2 * i); return;
        case Scales::f8: break;
    }
    for (u64 i = 0; i < n; ++i) {
        const u16 word = static_cast<u16>(from[i] << 7);
        to[i] = F16::load(reinterpret_cast<const u8*>(&word));
    }
}

template <class T>
void decode_run(u8* __restrict to, const u8* codes, u32 shift, u32 mask, const float* scale, const float* minimum,
                u32 n) {
    for (u32 i = 0; i < n; ++i)
        T::store(to + u64{i} * T::size,
                 minimum[i] + static_cast<float>(static_cast<int>((codes[i] >> shift) & mask)) * scale[i]);
}

// The same where one scale and minimum are those of all.
template <class T>
void decode_group(u8* __restrict to, const u8* codes, u32 shift, u32 mask, float scale, float minimum, u32 n) {
    for (u32 i = 0; i < n; ++i)
        T::store(to + u64{i} * T::size, minimum + static_cast<float>(static_cast<int>((codes[i] >> shift) & mask)) * scale);
}

template <class T>
void decode_groups(const PlaneSpec& spec, u8* to, const u8* codes, const float* scales, const float* minima) {
    const u32 half = (spec.cols + 1) / 2;
    for (u32 start = 0, at = 0; start < spec.cols; start += spec.group, ++at) {
        const u32 end = spec.cols - start < spec.group ? spec.cols : start + spec.group;
        if (spec.code == Code::int8) {
            decode_group<T>(to + u64{start} * T::size, codes + start, 0, 255, scales[at], minima[at], end - start);
            continue;
        }
        if (start < half)
            decode_group<T>(to + u64{start} * T::size, codes + start, 0, 15, scales[at], minima[at],
                            (end < half ? end : half) - start);
        const u32 from = start < half ? half : start;
        if (from < end)
            decode_group<T>(to + u64{from} * T::size, codes + (from - half), 4, 15, scales[at], minima[at], end - from);
    }
}

template <class T>
void decode_row(const PlaneSpec& spec, u8* to, const u8* codes, const float* scale, const float* minimum) {
    if (spec.code == Code::int8) return decode_run<T>(to, codes, 0, 255, scale, minimum, spec.cols);
    const u32 half = (spec.cols + 1) / 2;
    decode_run<T>(to, codes, 0, 15, scale, minimum, half);
    decode_run<T>(to + u64{half} * T::size, codes, 4, 15, scale + half, minimum + half, spec.cols - half);
}

template <class T>
void dequantize_plane(const PlaneSpec& spec, u8* to, const u8* from, float* scratch) {
    const u32 cols = spec.cols;
    const u64 per_row = (u64{cols} + spec.group - 1) / spec.group, target_row = u64{cols} * T::size;
    const u64 tile = spec.by_channel ? spec.tile_rows() : 1, entries = spec.by_channel ? cols : per_row;
    float* const scale = scratch;
    float* const minimum = scale + cols;
    float* const y = minimum + cols;
    float* const spare = y + cols;
    const Parts parts(spec, const_cast<u8*>(from));
    const Scales of_minima = spec.scales == Scales::f8 ? Scales::f16 : spec.scales;
    u64 entry = 0;
    for (u64 start = 0; start < spec.rows; start += tile, entry += entries) {
        const u64 rows = spec.rows - start < tile ? spec.rows - start : tile;
        const u8* const scales = parts.scales + entry * spec.scale_bytes();
        const u8* const minima = parts.minima + entry * spec.minimum_bytes();
        read_floats(scale, scales, entries, spec.scales);
        read_floats(minimum, minima, entries, of_minima);
        for (u64 row = start; row < start + rows; ++row) {
            const u8* const codes = parts.codes + row * spec.row_bytes();
            if (!spec.rotate) {
                if (spec.by_channel) decode_row<T>(spec, to + row * target_row, codes, scale, minimum);
                else decode_groups<T>(spec, to + row * target_row, codes, scale, minimum);
                continue;
            }
            u8* const plain = reinterpret_cast<u8*>(y);
            if (spec.by_channel) decode_row<F32>(spec, plain, codes, scale, minimum);
            else decode_groups<F32>(spec, plain, codes, scale, minimum);
            rotate(y, cols, spare);
            store_row<T>(to + row * target_row, y, cols);
        }
    }
}

// ---- e4m3: sign, four bits of exponent with a bias of 7, three of mantissa; 448 is the most --------

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

// ---- The table ---------------------------------------------------------------------------------

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
