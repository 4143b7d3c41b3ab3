// int8 and int4: the part of the kernels, inside their namespace; kernels.inl includes it.

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
