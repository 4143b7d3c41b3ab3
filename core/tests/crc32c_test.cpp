// Every method of this processor against a sum computed bit by bit.
#include "base/crc32c.hpp"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

using namespace kvstrata;

namespace {

u32 bit_by_bit(u32 crc, const u8* p, size_t n) {
    u32 state = ~crc;
    for (size_t i = 0; i < n; ++i) {
        state ^= p[i];
        for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1) ? 0x82f63b78u : 0);
    }
    return ~state;
}

std::vector<u8> random_bytes(size_t n, unsigned seed) {
    std::mt19937_64 random(seed);
    std::vector<u8> bytes(n);
    for (u8& byte : bytes) byte = static_cast<u8>(random());
    return bytes;
}

// Vectors of RFC 3720, appendix B.4, and the usual one.
void known_sums(const Crc32cMethod& method) {
    u8 up[32], down[32];
    for (u8 i = 0; i < 32; ++i) {
        up[i] = i;
        down[i] = static_cast<u8>(31 - i);
    }
    CHECK(method.run(0, "123456789", 9) == 0xE3069283u);
    CHECK(method.run(0, std::vector<u8>(32, 0x00).data(), 32) == 0x8A9136AAu);
    CHECK(method.run(0, std::vector<u8>(32, 0xff).data(), 32) == 0x62A8AB43u);
    CHECK(method.run(0, up, 32) == 0x46DD794Eu);
    CHECK(method.run(0, down, 32) == 0x113FDB5Cu);
    CHECK(method.run(0x12345678u, nullptr, 0) == 0x12345678u);
}

void every_short_length_and_alignment(const Crc32cMethod& method) {
    const std::vector<u8> bytes = random_bytes(1200, 1);
    for (size_t start = 0; start < 16; ++start)
        for (size_t n = 0; n <= 1100; n += (n < 300 ? 1 : 13))
            CHECK(method.run(7, bytes.data() + start, n) == bit_by_bit(7, bytes.data() + start, n));
}

// The buffer ends with the data, so that a sanitizer sees a read beyond it.
void long_lengths_in_random_parts(const Crc32cMethod& method) {
    std::mt19937_64 random(2);
    for (int round = 0; round < 150; ++round) {
        const size_t n = random() % 70000, start = random() % std::min<size_t>(n + 1, 64);
        const std::vector<u8> bytes = random_bytes(n, static_cast<unsigned>(round));
        const u32 first = static_cast<u32>(random());
        const u32 expected = bit_by_bit(first, bytes.data() + start, n - start);
        CHECK(method.run(first, bytes.data() + start, n - start) == expected);
        u32 chained = first;
        for (size_t at = start; at < n;) {
            const size_t part = std::min<size_t>(n - at, random() % 9000);
            chained = method.run(chained, bytes.data() + at, part);
            at += part;
        }
        CHECK(chained == expected);
    }
}

}  // namespace

TEST(every_method_gives_the_known_sums) {
    for (const Crc32cMethod& method : crc32c_methods()) known_sums(method);
    CHECK(crc32c(0, "123456789", 9) == 0xE3069283u);
}

TEST(every_method_agrees_at_every_short_length_and_alignment) {
    for (const Crc32cMethod& method : crc32c_methods()) every_short_length_and_alignment(method);
}

TEST(every_method_agrees_at_long_lengths_and_when_continued) {
    for (const Crc32cMethod& method : crc32c_methods()) long_lengths_in_random_parts(method);
}

TEST(the_last_method_is_the_portable_one) {
    CHECK(std::string(crc32c_methods().back().name) == "portable");
}

TEST(the_sum_of_parts_is_had_from_their_sums) {
    for (const size_t part : {1, 7, 64, 4096, 65536}) {
        const std::vector<u8> bytes = random_bytes(9 * part, static_cast<unsigned>(part));
        std::vector<u32> sums;
        for (size_t at = 0; at < bytes.size(); at += part) sums.push_back(crc32c(0, bytes.data() + at, part));
        for (size_t count = 0; count <= sums.size(); ++count)
            CHECK(crc32c_of_parts(sums.data(), count, part) == crc32c(0, bytes.data(), count * part));
    }
}

TEST(copying_with_a_sum_equals_memcpy_and_a_sum) {
    std::mt19937_64 random(3);
    for (int round = 0; round < 100; ++round) {
        const size_t n = random() % 50000, from = random() % 64, to = random() % 64;
        const std::vector<u8> source = random_bytes(from + n, static_cast<unsigned>(round));
        std::vector<u8> expected(to + n + 64, 0xa5);
        std::copy_n(source.data() + from, n, expected.data() + to);
        const u32 first = static_cast<u32>(random());
        for (const auto copy : {copy_crc32c, stream_crc32c}) {
            std::vector<u8> target(to + n + 64, 0xa5);
            CHECK(copy(target.data() + to, source.data() + from, n, first) == crc32c(first, source.data() + from, n));
            CHECK(target == expected);
        }
    }
}
