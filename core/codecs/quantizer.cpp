#include "quantizer.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "base/errors.hpp"

static_assert(std::endian::native == std::endian::little, "payloads are little endian");

namespace kvstrata::codecs {
namespace {

constexpr u64 kMostScratch = u64{4} << 20;  // floats

std::vector<Kernels> find_kernels() {
    std::vector<Kernels> found;
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(kAvx512);
    if (avx2) found.push_back(kAvx2);
#endif
    found.push_back(kPortable);
    return found;
}

const Kernels* named(const char* name) {
    for (const Kernels& kernels : all_kernels())
        if (std::strcmp(kernels.name, name) == 0) return &kernels;
    return nullptr;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> choice{[] {
        const char* const wanted = std::getenv("KVSTRATA_SIMD");
        const Kernels* const found = wanted ? named(wanted) : nullptr;
        return found ? found : &all_kernels().front();
    }()};
    return choice;
}

std::vector<float> scratch_for(const TensorSpec& spec) {
    return std::vector<float>(std::max(spec.keys.scratch_floats(), spec.values.scratch_floats()));
}

}  // namespace

const std::vector<Kernels>& all_kernels() {
    static const std::vector<Kernels> found = find_kernels();
    return found;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
    const Kernels* const found = named(name);
    if (found) chosen().store(found, std::memory_order_relaxed);
    return found != nullptr;
}

void TensorSpec::check() const {
    for (const PlaneSpec* plane : {&keys, &values}) {
        if (plane->dtype < Dtype::f32 || plane->dtype > Dtype::bf16) throw InvalidValue("no such element type");
        if (plane->code < Code::int8 || plane->code > Code::e4m3) throw InvalidValue("no such code");
        if (plane->scales < Scales::f32 || plane->scales > Scales::f8) throw InvalidValue("no such type of scales");
        if (plane->group == 0) throw InvalidValue("a group has at least one element");
        if (plane->cols != 0 && plane->scratch_floats() / plane->cols < plane->tile_rows())
            throw InvalidValue("a plane is too large");
        if (plane->cols > kMostScratch || plane->scratch_floats() > kMostScratch)
            throw InvalidValue("a group of tokens is too large to be quantized: use a smaller group");
        if (plane->rotate && !std::has_single_bit(plane->cols))
            throw InvalidValue("a Hadamard rotation needs a number of channels that is a power of two");
    }
    if (inner == 0 || kind > Kind::both) throw InvalidValue("no such arrangement of planes");
}

u64 TensorSpec::coded_bytes(u64 first, u64 count) const {
    u64 of_keys = kind == Kind::keys ? count : 0;
    if (kind == Kind::both) {
        const auto before = [&](u64 plane) {  // planes with keys before this one
            return plane / (u64{inner} * 2) * inner + std::min<u64>(plane % (u64{inner} * 2), inner);
        };
        of_keys = before(first + count) - before(first);
    }
    return of_keys * keys.coded_bytes() + (count - of_keys) * values.coded_bytes();
}

bool quantize(const TensorSpec& spec, u64 first, u64 count, const u8* from, u8* to) {
    std::vector<float> scratch = scratch_for(spec);
    const Kernels& use = kernels();
    for (u64 plane = first; plane < first + count; ++plane) {
        const PlaneSpec& one = spec.of(plane);
        if (!use.quantize(one, to, from, scratch.data())) return false;
        from += one.plane_bytes();
        to += one.coded_bytes();
    }
    return true;
}

void dequantize(const TensorSpec& spec, u64 first, u64 count, const u8* from, u8* to) {
    std::vector<float> scratch = scratch_for(spec);
    const Kernels& use = kernels();
    for (u64 plane = first; plane < first + count; ++plane) {
        const PlaneSpec& one = spec.of(plane);
        use.dequantize(one, to, from, scratch.data());
        from += one.coded_bytes();
        to += one.plane_bytes();
    }
}

}  // namespace kvstrata::codecs
