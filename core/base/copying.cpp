#include "copying.hpp"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvstrata {
namespace {

constexpr size_t kLine = 64;

#if defined(__x86_64__)

// Into the second level of caches: the first one can wait for fewer lines at a time.
inline void fetch_soon(const u8* line) { __builtin_prefetch(line, 0, 2); }

void lines_by_sse2(u8* to, const u8* from, size_t count, size_t ahead) {
    for (const u8* const end = to + count * kLine; to != end; to += kLine, from += kLine) {
        fetch_soon(from + ahead);
        const auto* const source = reinterpret_cast<const __m128i*>(from);
        const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1), c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        auto* const target = reinterpret_cast<__m128i*>(to);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
}

// A line in one store: a tenth less time for the whole.
__attribute__((target("avx512f"))) void lines_by_avx512(u8* to, const u8* from, size_t count, size_t ahead) {
    for (const u8* const end = to + count * kLine; to != end; to += kLine, from += kLine) {
        fetch_soon(from + ahead);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
    }
}

#endif

void lines_by_memcpy(u8* to, const u8* from, size_t count, size_t) { std::memcpy(to, from, count * kLine); }

std::vector<StreamMethod> find_methods() {
    std::vector<StreamMethod> methods;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) methods.push_back({"avx512", lines_by_avx512});
    methods.push_back({"sse2", lines_by_sse2});
#endif
    methods.push_back({"portable", lines_by_memcpy});
    return methods;
}

}  // namespace

const std::vector<StreamMethod>& stream_methods() {
    static const std::vector<StreamMethod> methods = find_methods();
    return methods;
}

void stream_bytes(void* to, const void* from, size_t n, size_t ahead, const StreamMethod& method) {
    u8* const target = static_cast<u8*>(to);
    const u8* const source = static_cast<const u8*>(from);
    const size_t head = std::min(n, -reinterpret_cast<uintptr_t>(to) % kLine), tail = (n - head) % kLine;
    std::memcpy(target, source, head);
    method.lines(target + head, source + head, (n - head) / kLine, ahead);
    std::memcpy(target + n - tail, source + n - tail, tail);
}

void end_of_stream() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace kvstrata
