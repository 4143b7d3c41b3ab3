#include "crc32c.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "copying.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

static_assert(std::endian::native == std::endian::little, "the record format and the checksums are little endian");

namespace kvstrata {
namespace {

// ---- Arithmetic modulo the polynomial. Bit i of a word stands for x^(31-i). --------------------

constexpr u32 kPolynomial = 0x82f63b78;

constexpr u32 times_x(u32 a) { return (a >> 1) ^ ((a & 1) ? kPolynomial : 0); }

constexpr u32 multiply(u32 a, u32 b) {
    u32 product = 0;
    for (u32 bit = u32{1} << 31; bit != 0; bit >>= 1) {
        if (a & bit) product ^= b;
        b = times_x(b);
    }
    return product;
}

constexpr u32 power_of_x(u64 exponent) {
    u32 result = u32{1} << 31, square = u32{1} << 30;
    for (; exponent != 0; exponent >>= 1) {
        if (exponent & 1) result = multiply(result, square);
        square = multiply(square, square);
    }
    return result;
}

inline u64 load64(const u8* p) {
    u64 word;
    std::memcpy(&word, p, 8);
    return word;
}

// ---- Portable: eight tables, eight bytes a step ------------------------------------------------

constexpr auto kTables = [] {
    std::array<std::array<u32, 256>, 8> t{};
    for (u32 i = 0; i < 256; ++i) {
        u32 value = i;
        for (int bit = 0; bit < 8; ++bit) value = times_x(value);
        t[0][i] = value;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t i = 0; i < 256; ++i) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xff];
    return t;
}();

u32 run_portable(u32 crc, const void* data, size_t n) {
    const u8* p = static_cast<const u8*>(data);
    u32 state = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        const u64 word = load64(p) ^ state;
        u32 next = 0;
        for (size_t i = 0; i < 8; ++i) next ^= kTables[7 - i][(word >> (8 * i)) & 0xff];
        state = next;
    }
    for (; n != 0; --n) state = (state >> 8) ^ kTables[0][(state ^ *p++) & 0xff];
    return ~state;
}

// ---- By a checksum instruction, three streams at once to hide its latency ----------------------

#if defined(__x86_64__)
#define KVSTRATA_CRC_TARGET __attribute__((target("sse4.2")))
KVSTRATA_CRC_TARGET inline u32 step8(u32 state, u64 word) { return static_cast<u32>(_mm_crc32_u64(state, word)); }
KVSTRATA_CRC_TARGET inline u32 step1(u32 state, u8 byte) { return _mm_crc32_u8(state, byte); }
#elif defined(__aarch64__)
#define KVSTRATA_CRC_TARGET __attribute__((target("+crc")))
KVSTRATA_CRC_TARGET inline u32 step8(u32 state, u64 word) { return __crc32cd(state, word); }
KVSTRATA_CRC_TARGET inline u32 step1(u32 state, u8 byte) { return __crc32cb(state, byte); }
#endif

#ifdef KVSTRATA_CRC_TARGET

// Multiplies a state by x^(8 * kBytes), as if that many zero bytes followed.
template <size_t kBytes>
constexpr auto kShift = [] {
    std::array<std::array<u32, 256>, 4> t{};
    const u32 factor = power_of_x(8 * kBytes);
    for (size_t k = 0; k < 4; ++k) {
        for (u32 bit = 0; bit < 8; ++bit) t[k][size_t{1} << bit] = multiply(factor, u32{1} << (8 * k + bit));
        for (size_t i = 1; i < 256; ++i) t[k][i] = t[k][i & (i - 1)] ^ t[k][i & (~i + 1)];
    }
    return t;
}();

template <size_t kBytes>
inline u32 shift(u32 state) {
    const auto& t = kShift<kBytes>;
    return t[0][state & 0xff] ^ t[1][(state >> 8) & 0xff] ^ t[2][(state >> 16) & 0xff] ^ t[3][state >> 24];
}

KVSTRATA_CRC_TARGET inline u32 one_stream(u32 state, const u8* p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) state = step8(state, load64(p));
    for (; n != 0; --n) state = step1(state, *p++);
    return state;
}

template <size_t kBytes>
KVSTRATA_CRC_TARGET inline void three_streams(u32& state, const u8*& p, size_t& n) {
    for (; n >= 3 * kBytes; n -= 3 * kBytes, p += 3 * kBytes) {
        u32 a = state, b = 0, c = 0;
        for (size_t i = 0; i < kBytes; i += 8) {
            a = step8(a, load64(p + i));
            b = step8(b, load64(p + kBytes + i));
            c = step8(c, load64(p + 2 * kBytes + i));
        }
        state = shift<kBytes>(shift<kBytes>(a) ^ b) ^ c;
    }
}

KVSTRATA_CRC_TARGET u32 run_instruction(u32 crc, const void* data, size_t n) {
    const u8* p = static_cast<const u8*>(data);
    u32 state = ~crc;
    three_streams<4096>(state, p, n);
    three_streams<256>(state, p, n);
    return ~one_stream(state, p, n);
}
#endif

// ---- By carry-less multiplication: an accumulator is folded over the data that follows ---------

#if defined(__x86_64__)

// The factor that moves 64 bits forward by `bits`. The product of two reflected words is one bit short of its
// place, hence bits - 1; the 32-bit remainder stands in the upper half.
constexpr long long factor(u64 bits) {
    return static_cast<long long>(static_cast<u64>(power_of_x(bits - 1)) << 32);
}

// 128 bits are a first word, 64 bits ahead of the second.
template <u64 kBits>
struct Factors {
    static constexpr long long first = factor(kBits + 64), second = factor(kBits);
};

#define KVSTRATA_PCLMUL_TARGET __attribute__((target("sse4.2,pclmul")))

template <u64 kBits>
KVSTRATA_PCLMUL_TARGET inline __m128i fold(__m128i acc, __m128i next) {
    const __m128i factors = _mm_set_epi64x(Factors<kBits>::second, Factors<kBits>::first);
    const __m128i first = _mm_clmulepi64_si128(acc, factors, 0x00);
    const __m128i second = _mm_clmulepi64_si128(acc, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(first, second), next);
}

KVSTRATA_PCLMUL_TARGET inline __m128i load128(const u8* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Takes up the accumulator and what is left: the sum of 16 bytes that are congruent to all that was folded.
KVSTRATA_PCLMUL_TARGET inline u32 finish(__m128i acc, const u8* p, size_t n) {
    for (; n >= 16; n -= 16, p += 16) acc = fold<128>(acc, load128(p));
    u32 state = step8(0, static_cast<u64>(_mm_cvtsi128_si64(acc)));
    state = step8(state, static_cast<u64>(_mm_extract_epi64(acc, 1)));
    return one_stream(state, p, n);
}

KVSTRATA_PCLMUL_TARGET u32 run_pclmul(u32 crc, const void* data, size_t n) {
    const u8* p = static_cast<const u8*>(data);
    if (n < 128) return ~one_stream(~crc, p, n);
    __m128i a = _mm_xor_si128(load128(p), _mm_cvtsi32_si128(static_cast<int>(~crc)));
    __m128i b = load128(p + 16), c = load128(p + 32), d = load128(p + 48);
    __m128i e = load128(p + 64), f = load128(p + 80), g = load128(p + 96), h = load128(p + 112);
    for (n -= 128, p += 128; n >= 128; n -= 128, p += 128) {
        a = fold<1024>(a, load128(p));
        b = fold<1024>(b, load128(p + 16));
        c = fold<1024>(c, load128(p + 32));
        d = fold<1024>(d, load128(p + 48));
        e = fold<1024>(e, load128(p + 64));
        f = fold<1024>(f, load128(p + 80));
        g = fold<1024>(g, load128(p + 96));
        h = fold<1024>(h, load128(p + 112));
    }
    a = fold<512>(a, e);
    b = fold<512>(b, f);
    c = fold<512>(c, g);
    d = fold<512>(d, h);
    a = fold<256>(a, c);
    b = fold<256>(b, d);
    return ~finish(fold<128>(a, b), p, n);
}

#define KVSTRATA_VPCLMUL_TARGET __attribute__((target("sse4.2,pclmul,avx512f,avx512dq,avx512vl,vpclmulqdq")))

template <u64 kBits>
KVSTRATA_VPCLMUL_TARGET inline __m512i fold(__m512i acc, __m512i next) {
    constexpr long long f = Factors<kBits>::first, s = Factors<kBits>::second;
    const __m512i factors = _mm512_set_epi64(s, f, s, f, s, f, s, f);
    const __m512i first = _mm512_clmulepi64_epi128(acc, factors, 0x00);
    const __m512i second = _mm512_clmulepi64_epi128(acc, factors, 0x11);
    return _mm512_ternarylogic_epi64(first, second, next, 0x96);  // xor of all three
}

KVSTRATA_VPCLMUL_TARGET inline __m512i load512(const u8* p) { return _mm512_loadu_si512(p); }

KVSTRATA_VPCLMUL_TARGET u32 run_vpclmul(u32 crc, const void* data, size_t n) {
    const u8* p = static_cast<const u8*>(data);
    if (n < 256) return run_pclmul(crc, data, n);
    __m512i a = _mm512_xor_si512(load512(p), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(~crc))));
    __m512i b = load512(p + 64), c = load512(p + 128), d = load512(p + 192);
    for (n -= 256, p += 256; n >= 256; n -= 256, p += 256) {
        a = fold<2048>(a, load512(p));
        b = fold<2048>(b, load512(p + 64));
        c = fold<2048>(c, load512(p + 128));
        d = fold<2048>(d, load512(p + 192));
    }
    a = fold<1024>(a, c);
    b = fold<1024>(b, d);
    a = fold<512>(a, b);
    for (; n >= 64; n -= 64, p += 64) a = fold<512>(a, load512(p));
    __m128i lanes[4];
    _mm512_storeu_si512(lanes, a);
    const __m128i lane = fold<128>(fold<128>(fold<128>(lanes[0], lanes[1]), lanes[2]), lanes[3]);
    return ~finish(lane, p, n);
}
#endif

// ---- Choice ------------------------------------------------------------------------------------

std::vector<Crc32cMethod> find_methods() {
    std::vector<Crc32cMethod> methods;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool instruction = __builtin_cpu_supports("sse4.2");
    const bool pclmul = instruction && __builtin_cpu_supports("pclmul");
    if (pclmul && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("vpclmulqdq"))
        methods.push_back({"vpclmul", run_vpclmul});
    if (pclmul) methods.push_back({"pclmul", run_pclmul});
    if (instruction) methods.push_back({"sse4.2", run_instruction});
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_CRC32) methods.push_back({"armv8", run_instruction});
#endif
    methods.push_back({"portable", run_portable});
    return methods;
}

}  // namespace

const std::vector<Crc32cMethod>& crc32c_methods() {
    static const std::vector<Crc32cMethod> methods = find_methods();
    return methods;
}

u32 crc32c(u32 crc, const void* data, size_t n) {
    static const auto run = crc32c_methods().front().run;
    return run(crc, data, n);
}

u32 crc32c_of_parts(const u32* sums, size_t count, u64 part_bytes) {
    const u32 factor = power_of_x(8 * part_bytes);
    u32 crc = 0;
    for (size_t i = 0; i < count; ++i) crc = multiply(crc, factor) ^ sums[i];
    return crc;
}

static constexpr size_t kPiece = 4096;  // twice it fits into the smallest first-level cache

u32 copy_crc32c(void* dst, const void* src, size_t n, u32 crc) {
    u8* to = static_cast<u8*>(dst);
    const u8* from = static_cast<const u8*>(src);
    if (n <= kPiece) {  // by way of what is in the cache, so as not to wait for memory that is only written
        u8 copied[kPiece];
        copy_bytes(copied, from, n);
        crc = crc32c(crc, copied, n);
        copy_bytes(to, copied, n);
        return crc;
    }
    while (n != 0) {
        const size_t piece = std::min(n, 2 * kPiece);
        copy_bytes(to, from, piece);
        crc = crc32c(crc, to, piece);
        to += piece;
        from += piece;
        n -= piece;
    }
    return crc;
}

u32 stream_crc32c(void* dst, const void* src, size_t n, u32 crc) {
    u8* to = static_cast<u8*>(dst);
    const u8* from = static_cast<const u8*>(src);
    for (size_t done = 0; done < n; done += kPiece) {
        const size_t piece = std::min(n - done, kPiece);
        crc = crc32c(crc, from + done, piece);  // which brings it into the cache
        stream_bytes(to + done, from + done, piece, 0);
    }
    return crc;
}

}  // namespace kvstrata
