// Byte planes and the rotation: the part of the kernels, inside their namespace; kernels.inl includes it.

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
