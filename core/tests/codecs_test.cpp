// The kernels of the codecs: every instruction set of this processor against the portable one and against plain
// arithmetic. Buffers end with their data, so that a sanitizer sees an access beyond it.
#include "codecs/quantizer.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>

#include "check.hpp"
#include "base/errors.hpp"

using namespace kvstrata;
using namespace kvstrata::codecs;

namespace {

using Bytes = std::vector<u8>;

Bytes random_bytes(size_t n, u32 seed) {
    std::mt19937_64 random(seed);
    Bytes bytes(n);
    for (u8& byte : bytes) byte = static_cast<u8>(random());
    return bytes;
}

u16 bf16_of(float x) {
    const u32 bits = std::bit_cast<u32>(x);
    return static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Halves of normal size only: enough for what the tests make.
u16 f16_of(float x) {
    if (x == 0) return 0;
    int exponent;
    const float fraction = std::frexp(std::fabs(x), &exponent);  // 0.5 <= fraction < 1
    const int mantissa = static_cast<int>(fraction * 2048);
    if (exponent < -13) return 0;
    return static_cast<u16>((x < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | (mantissa & 0x3ff));
}

float float_of(u16 word, Dtype dtype) {
    if (dtype == Dtype::bf16) return std::bit_cast<float>(u32{word} << 16);
    const int exponent = (word >> 10) & 31, mantissa = word & 0x3ff;
    const float magnitude = exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                                     : std::ldexp(static_cast<float>(mantissa), -24);
    return word & 0x8000 ? -magnitude : magnitude;
}

Bytes elements(const std::vector<float>& values, Dtype dtype) {
    Bytes bytes(values.size() * element_bytes(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
        if (dtype == Dtype::f32) {
            std::memcpy(bytes.data() + 4 * i, &values[i], 4);
        } else {
            const u16 word = dtype == Dtype::bf16 ? bf16_of(values[i]) : f16_of(values[i]);
            std::memcpy(bytes.data() + 2 * i, &word, 2);
        }
    }
    return bytes;
}

std::vector<float> values_of(const Bytes& bytes, Dtype dtype) {
    std::vector<float> values(bytes.size() / element_bytes(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
        u16 word;
        if (dtype == Dtype::f32) std::memcpy(&values[i], bytes.data() + 4 * i, 4);
        else std::memcpy(&word, bytes.data() + 2 * i, 2), values[i] = float_of(word, dtype);
    }
    return values;
}

// Spread over some powers of ten, with outlying channels and groups in which all are equal.
std::vector<float> some_values(size_t n, u32 cols, u32 seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const float size = std::pow(10.0f, static_cast<float>(random() % 5) - 3.0f);
    std::vector<float> values(n);
    const bool equal = random() % 8 == 0;
    for (size_t i = 0; i < n; ++i) {
        const float outlier = cols && i % cols % 17 == 3 ? 20.0f : 1.0f;
        values[i] = equal ? size : size * outlier * normal(random);
    }
    return values;
}

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr Code kCodes[] = {Code::int8, Code::int4, Code::e4m3};
constexpr Scales kScales[] = {Scales::f32, Scales::f16, Scales::bf16, Scales::f8};

// Calls it with planes of all kinds of types and sizes.
template <class Each>
void each_plane(u32 rounds, Each&& call) {
    std::mt19937 random(7);
    for (u32 round = 0; round < rounds; ++round)
        for (const Code code : kCodes)
            for (const Dtype dtype : kDtypes) {
                PlaneSpec spec{dtype, code, kScales[random() % 4], random() % 2 == 0, random() % 3 == 0,
                               static_cast<u32>(1 + random() % 70), static_cast<u32>(random() % 40),
                               static_cast<u32>(random() % 140)};
                if (spec.rotate) spec.cols = u32{1} << random() % 8;
                call(spec, round);
            }
}

TensorSpec tensor(const PlaneSpec& plane) { return {plane, plane, 1, TensorSpec::Kind::values}; }

struct Coded {
    bool done;
    Bytes bytes;
};

Coded coded(const Kernels& kernels, const PlaneSpec& spec, const Bytes& from) {
    Coded result{false, Bytes(spec.coded_bytes())};
    std::vector<float> scratch(spec.scratch_floats());
    result.done = kernels.quantize(spec, result.bytes.data(), from.data(), scratch.data());
    return result;
}

Bytes decoded(const Kernels& kernels, const PlaneSpec& spec, const Bytes& from) {
    Bytes bytes(spec.plane_bytes());
    std::vector<float> scratch(spec.scratch_floats());
    kernels.dequantize(spec, bytes.data(), from.data(), scratch.data());
    return bytes;
}

}  // namespace

TEST(the_last_kernels_are_the_portable_ones_and_any_can_be_chosen) {
    CHECK(std::string(all_kernels().back().name) == "portable");
    const std::string before = kernels().name;
    for (const Kernels& one : all_kernels()) {
        CHECK(use_kernels(one.name));
        CHECK(std::string(kernels().name) == one.name);
    }
    CHECK(!use_kernels("abacus"));
    CHECK(use_kernels(before.c_str()));
}

TEST(planes_are_the_bytes_of_the_rotated_elements_and_join_to_what_was_split) {
    for (const Kernels& kernels : all_kernels())
        for (const u32 width : {2u, 4u})
            for (size_t n = 0; n < 300; n += n < 70 ? 1 : 37) {
                const Bytes from = random_bytes(n * width, static_cast<u32>(n));
                std::vector<Bytes> planes(width, Bytes(n));
                u8* to[4] = {};
                for (u32 i = 0; i < width; ++i) to[i] = planes[i].data();
                kernels.split(to, from.data(), n, width);
                bool same = true;
                for (size_t i = 0; i < n; ++i) {
                    u64 word = 0;
                    std::memcpy(&word, from.data() + i * width, width);
                    word = word << 1 | word >> (8 * width - 1);
                    for (u32 plane = 0; plane < width; ++plane)
                        same = same && planes[plane][i] == static_cast<u8>(word >> (8 * plane));
                }
                CHECK(same);
                Bytes back(from.size());
                kernels.join(back.data(), to, n, width);
                CHECK(back == from);
            }
}

TEST(every_instruction_set_gives_the_bits_of_the_portable_one) {
    each_plane(120, [](const PlaneSpec& spec, u32 seed) {
        const Bytes from = elements(some_values(u64{spec.rows} * spec.cols, spec.cols, seed), spec.dtype);
        const Coded expected = coded(kPortable, spec, from);
        for (const Kernels& kernels : all_kernels()) {
            const Coded ours = coded(kernels, spec, from);
            CHECK(ours.done == expected.done);
            if (!expected.done) continue;
            CHECK(ours.bytes == expected.bytes);
            CHECK(decoded(kernels, spec, expected.bytes) == decoded(kPortable, spec, expected.bytes));
        }
    });
}

TEST(every_instruction_set_makes_the_same_of_any_bits) {
    each_plane(60, [](const PlaneSpec& spec, u32 seed) {
        const Bytes from = random_bytes(spec.plane_bytes(), seed);
        const Coded expected = coded(kPortable, spec, from);
        const Bytes noise = random_bytes(spec.coded_bytes(), seed + 1);
        const Bytes made = decoded(kPortable, spec, noise);
        for (const float value : values_of(made, spec.dtype)) {
            if (!CHECK(std::isfinite(value))) break;
        }
        for (const Kernels& kernels : all_kernels()) {
            const Coded ours = coded(kernels, spec, from);
            CHECK(ours.done == expected.done);
            CHECK(!expected.done || ours.bytes == expected.bytes);
            CHECK(decoded(kernels, spec, noise) == made);
        }
    });
}

TEST(no_element_is_further_from_its_own_than_half_a_step) {
    each_plane(60, [](PlaneSpec spec, u32 seed) {
        if (spec.code == Code::e4m3) return;
        spec.rotate = false;
        const u64 n = u64{spec.rows} * spec.cols;
        const Bytes from = elements(some_values(n, spec.cols, seed), spec.dtype);
        const std::vector<float> values = values_of(from, spec.dtype);
        const Coded quantized = coded(kPortable, spec, from);
        if (!CHECK(quantized.done)) return;
        const std::vector<float> back = values_of(decoded(kPortable, spec, quantized.bytes), spec.dtype);
        const float levels = spec.code == Code::int8 ? 255 : 15;
        // What scales and minima lose by their own type, and results by theirs.
        const float of_type = spec.scales == Scales::f32 ? 1e-6f : spec.scales == Scales::bf16 ? 1 / 256.0f : 1 / 2048.0f;
        const float of_element = spec.dtype == Dtype::f32 ? 1e-6f : spec.dtype == Dtype::bf16 ? 1 / 256.0f : 1 / 2048.0f;
        bool close = true;
        for (u32 row = 0; row < spec.rows; ++row)
            for (u32 col = 0; col < spec.cols; ++col) {
                float low = values[row * u64{spec.cols} + col], high = low;
                const u32 start = (spec.by_channel ? row : col) / spec.group * spec.group;
                const u32 end = std::min(start + spec.group, spec.by_channel ? spec.rows : spec.cols);
                for (u32 i = start; i < end; ++i) {
                    const float x = spec.by_channel ? values[i * u64{spec.cols} + col] : values[row * u64{spec.cols} + i];
                    low = std::min(low, x), high = std::max(high, x);
                }
                const float most = std::max(std::fabs(low), std::fabs(high));
                const float coarse = spec.scales == Scales::f8 ? 1.126f : 1;
                const float bound = (high - low) / levels / 2 * coarse + (high - low) * of_type + most * of_type +
                                    most * of_element + levels * 0x1p-24f + 0x1p-17f * (spec.scales == Scales::f8) * levels;
                const u64 at = row * u64{spec.cols} + col;
                close = close && std::fabs(values[at] - back[at]) <= bound;
            }
        CHECK(close);
    });
}

TEST(every_number_of_16_bits_is_read_and_written_as_it_is) {
    // As a group of its own, an element is its own minimum, which is kept in 32 bits.
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
        std::vector<u16> words;
        for (u32 word = 0; word < 65536; ++word) {
            const u32 infinite = dtype == Dtype::f16 ? 0x7c00 : 0x7f80;
            if ((word & infinite) != infinite && word != 0x8000) words.push_back(static_cast<u16>(word));
        }
        const PlaneSpec spec{dtype, Code::int8, Scales::f32, false, false, 1, static_cast<u32>(words.size()), 1};
        Bytes from(words.size() * 2);
        std::memcpy(from.data(), words.data(), from.size());
        for (const Kernels& kernels : all_kernels()) {
            const Coded quantized = coded(kernels, spec, from);
            CHECK(quantized.done);
            CHECK(decoded(kernels, spec, quantized.bytes) == from);
        }
    }
}

TEST(e4m3_takes_the_nearest_of_its_numbers_and_the_even_one_of_two) {
    // All positive numbers of the format, by its definition.
    std::vector<float> numbers;
    for (int code = 0; code < 127; ++code) {
        const int exponent = code >> 3, mantissa = code & 7;
        numbers.push_back(exponent ? std::ldexp(static_cast<float>(8 + mantissa), exponent - 10)
                                   : std::ldexp(static_cast<float>(mantissa), -9));
    }
    // 448 makes the scale 1. Each number, the middle to the next one, and what is just beside that.
    std::vector<float> values{448.0f}, expected{448.0f};
    for (size_t i = 0; i + 1 < numbers.size(); ++i) {
        const float middle = (numbers[i] + numbers[i + 1]) / 2;
        const float below = std::nextafter(middle, 0.0f), above = std::nextafter(middle, 1000.0f);
        for (const float sign : {1.0f, -1.0f}) {
            for (const float x : {numbers[i], below}) values.push_back(sign * x), expected.push_back(sign * numbers[i]);
            values.push_back(sign * middle), expected.push_back(sign * numbers[i % 2 == 0 ? i : i + 1]);
            values.push_back(sign * above), expected.push_back(sign * numbers[i + 1]);
        }
    }
    const PlaneSpec spec{Dtype::f32, Code::e4m3, Scales::f32, false, false, 1, 1, static_cast<u32>(values.size())};
    for (const Kernels& kernels : all_kernels()) {
        const Coded quantized = coded(kernels, spec, elements(values, Dtype::f32));
        CHECK(quantized.done);
        CHECK(values_of(decoded(kernels, spec, quantized.bytes), Dtype::f32) == expected);
    }
}

TEST(e4m3_of_any_finite_plane_is_within_a_sixteenth_of_each_element) {
    for (const float size : {1e-30f, 1e-6f, 1.0f, 1e6f, 1e30f, 3.4e38f}) {
        const std::vector<float> values{size, -size, size / 2, size / 100, 0};
        const PlaneSpec spec{Dtype::f32, Code::e4m3, Scales::f32, false, false, 1, 1, 5};
        const Coded quantized = coded(kernels(), spec, elements(values, Dtype::f32));
        CHECK(quantized.done);
        const std::vector<float> back = values_of(decoded(kernels(), spec, quantized.bytes), Dtype::f32);
        for (size_t i = 0; i < values.size(); ++i) CHECK(std::fabs(back[i] - values[i]) <= std::fabs(values[i]) / 16);
    }
}

TEST(what_is_not_finite_is_refused_wherever_it_stands) {
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    for (const Kernels& kernels : all_kernels())
        for (const Code code : kCodes)
            for (const bool by_channel : {false, true})
                for (const float bad : {infinity, -infinity, nan})
                    for (u32 at = 0; at < 37 * 3; at += 5) {
                        std::vector<float> values(37 * 3, 1.0f);
                        const PlaneSpec spec{Dtype::f32, code, Scales::f32, by_channel, false, 8, 3, 37};
                        CHECK(coded(kernels, spec, elements(values, Dtype::f32)).done);
                        values[at] = bad;
                        CHECK(!coded(kernels, spec, elements(values, Dtype::f32)).done);
                    }
}

TEST(a_scale_that_has_no_representation_is_refused) {
    const auto tried = [](Scales scales, float low, float high) {
        const PlaneSpec spec{Dtype::f32, Code::int4, scales, false, false, 2, 1, 2};
        return coded(kernels(), spec, elements({low, high}, Dtype::f32)).done;
    };
    CHECK(tried(Scales::f16, -60000, 60000) && tried(Scales::f8, -60000, 60000));
    CHECK(!tried(Scales::f16, 70000, 70001) && !tried(Scales::f8, 70000, 70001));
    CHECK(!tried(Scales::f16, 0, 1e7f) && !tried(Scales::f8, 0, 1e7f));
    CHECK(!tried(Scales::f8, 0, 15 * 65000.0f));  // rounded up, it is too much
    CHECK(tried(Scales::bf16, -1e38f, 1e38f) && tried(Scales::f32, -1e38f, 1e38f));
    CHECK(!tried(Scales::f32, -3e38f, 3e38f));  // the range has no representation
}

TEST(the_rotation_is_the_hadamard_matrix_over_the_root_of_its_size) {
    for (const Kernels& kernels : all_kernels())
        for (u32 cols = 1; cols <= 512; cols *= 2) {
            std::vector<float> rows = some_values(3 * cols, cols, cols), scratch(cols), before = rows;
            kernels.hadamard(rows.data(), 3, cols, scratch.data());
            bool right = true;
            for (u32 row = 0; row < 3; ++row) {
                double size = 0;
                for (u32 i = 0; i < cols; ++i) size = std::max(size, std::fabs(double{before[row * cols + i]}));
                for (u32 i = 0; i < cols; ++i) {
                    double sum = 0;
                    for (u32 k = 0; k < cols; ++k)
                        sum += (std::popcount(i & k) % 2 ? -1.0 : 1.0) * before[row * cols + k];
                    right = right && std::fabs(rows[row * cols + i] - sum / std::sqrt(cols)) <= 1e-5 * size * std::sqrt(cols);
                }
            }
            CHECK(right);
        }
}

TEST(planes_of_keys_and_values_alternate_by_runs) {
    const PlaneSpec values{Dtype::f32, Code::int4, Scales::f16, false, false, 16, 10, 24};
    PlaneSpec keys = values;
    keys.by_channel = true;
    const TensorSpec spec{keys, values, 3, TensorSpec::Kind::both};
    spec.check();
    CHECK(keys.coded_bytes() != values.coded_bytes());
    const u64 planes = 2 * 2 * 3;
    u64 bytes = 0;
    for (u64 plane = 0; plane < planes; ++plane) {
        CHECK(&spec.of(plane) == (plane % 6 < 3 ? &spec.keys : &spec.values));
        CHECK(spec.coded_bytes(0, plane) == bytes);
        bytes += spec.of(plane).coded_bytes();
    }
    const Bytes from = elements(some_values(planes * 240, 24, 5), Dtype::f32);
    Bytes whole(spec.coded_bytes(0, planes)), parts(whole.size());
    CHECK(whole.size() == bytes);
    CHECK(quantize(spec, 0, planes, from.data(), whole.data()));
    for (u64 plane = 0, at = 0; plane < planes; ++plane) {
        CHECK(quantize(spec, plane, 1, from.data() + plane * spec.plane_bytes(), parts.data() + at));
        at += spec.of(plane).coded_bytes();
    }
    CHECK(whole == parts);
}

TEST(a_tensor_that_can_not_be_is_refused) {
    const PlaneSpec good{Dtype::f32, Code::int8, Scales::f32, true, false, 32, 32, 64};
    tensor(good).check();
    const auto refused = [&](auto&& change) {
        PlaneSpec plane = good;
        change(plane);
        CHECK_THROWS(InvalidValue, tensor(plane).check());
    };
    refused([](PlaneSpec& plane) { plane.dtype = Dtype{9}; });
    refused([](PlaneSpec& plane) { plane.code = Code{0}; });
    refused([](PlaneSpec& plane) { plane.scales = Scales{5}; });
    refused([](PlaneSpec& plane) { plane.group = 0; });
    refused([](PlaneSpec& plane) { plane.cols = 1u << 30; });
    refused([](PlaneSpec& plane) { plane.cols = 65536, plane.rows = plane.group = 1u << 31; });
    refused([](PlaneSpec& plane) { plane.rotate = true, plane.cols = 96; });
    refused([](PlaneSpec& plane) { plane.rotate = true, plane.cols = 0; });
    TensorSpec spec = tensor(good);
    spec.inner = 0;
    CHECK_THROWS(InvalidValue, spec.check());
    spec = tensor(good);
    spec.kind = TensorSpec::Kind{3};
    CHECK_THROWS(InvalidValue, spec.check());
}

TEST(threads_quantize_at_the_same_time) {
    const PlaneSpec plane{Dtype::bf16, Code::int4, Scales::f16, true, true, 32, 32, 64};
    const TensorSpec spec = tensor(plane);
    const u64 planes = 40;
    const Bytes from = elements(some_values(planes * 32 * 64, 64, 3), Dtype::bf16);
    Bytes expected(spec.coded_bytes(0, planes));
    CHECK(quantize(spec, 0, planes, from.data(), expected.data()));
    std::vector<Bytes> found(4, Bytes(expected.size()));
    std::vector<std::thread> threads;
    for (Bytes& mine : found)
        threads.emplace_back([&spec, &from, &mine] { quantize(spec, 0, planes, from.data(), mine.data()); });
    for (auto& thread : threads) thread.join();
    for (const Bytes& mine : found) CHECK(mine == expected);
}
