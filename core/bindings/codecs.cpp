// Byte planes and quantization over Python's buffers; src/kvstrata/codecs/ makes codecs of them.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "codecs/quantizer.hpp"

namespace kvstrata {
namespace {

using namespace codecs;

void check_width(u32 width) {
    if (width != 2 && width != 4) throw InvalidValue("elements have 2 or 4 bytes");
}

void split_planes(nb::handle from, nb::handle out, u32 width) {
    check_width(width);
    const Buffer source(from), target(out, true);
    const u64 n = source.size() / width;
    if (source.size() % width != 0 || target.size() != source.size())
        throw InvalidValue("out has to be as long as what is split, and that a multiple of width");
    u8* planes[4];
    for (u32 i = 0; i < 4; ++i) planes[i] = target.data() + (i < width ? i : 0) * n;
    const WithoutGil free(source.size());
    kernels().split(planes, source.data(), n, width);
}

void join_planes(nb::sequence planes, nb::handle out, u32 width) {
    check_width(width);
    const Buffer target(out, true);
    const u64 n = target.size() / width;
    std::vector<std::unique_ptr<Buffer>> sources;
    for (nb::handle plane : planes) sources.push_back(std::make_unique<Buffer>(plane));
    if (sources.size() != width || target.size() % width != 0)
        throw InvalidValue("there have to be as many planes as an element has bytes");
    const u8* from[4] = {};
    for (u32 i = 0; i < width; ++i) {
        if (sources[i]->size() != n) throw InvalidValue("each plane has one byte of each element");
        from[i] = sources[i]->data();
    }
    const WithoutGil free(target.size());
    kernels().join(target.data(), from, n, width);
}

void hadamard(nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> rows) {
    const u64 cols = rows.shape(1);
    if (cols == 0 || (cols & (cols - 1)) != 0 || cols > (u64{1} << 22))
        throw InvalidValue("the number of columns has to be a power of two");
    std::vector<float> scratch(cols);
    const nb::gil_scoped_release free;
    kernels().hadamard(rows.data(), rows.shape(0), static_cast<u32>(cols), scratch.data());
}

// A TensorSpec that was checked.
class Quantizer {
public:
    Quantizer(u8 dtype, u8 code, u8 scales_of_keys, u8 scales_of_values, u8 kind, u32 inner, u32 group, u32 rows,
              u32 cols, bool keys_by_channel, bool rotate_keys, bool rotate_values)
        : spec_{{Dtype{dtype}, Code{code}, Scales{scales_of_keys}, keys_by_channel, rotate_keys, group, rows, cols},
                {Dtype{dtype}, Code{code}, Scales{scales_of_values}, false, rotate_values, group, rows, cols},
                inner,
                TensorSpec::Kind{kind}} {
        spec_.check();
    }
    u64 plane_bytes() const { return spec_.plane_bytes(); }
    u64 coded_bytes(u64 first, u64 count) const { return spec_.coded_bytes(first, count); }

    bool encode(nb::handle from, nb::handle out, u64 first) const {
        const Buffer source(from), target(out, true);
        const u64 count = planes_in(source.size());
        if (target.size() != spec_.coded_bytes(first, count)) throw InvalidValue("out has another size");
        const WithoutGil free(source.size());
        return quantize(spec_, first, count, source.data(), target.data());
    }
    void decode(nb::handle from, nb::handle out, u64 first) const {
        const Buffer source(from), target(out, true);
        const u64 count = planes_in(target.size());
        if (source.size() != spec_.coded_bytes(first, count)) throw InvalidValue("quantized planes of another size");
        const WithoutGil free(target.size());
        dequantize(spec_, first, count, source.data(), target.data());
    }

private:
    u64 planes_in(u64 bytes) const {
        const u64 one = spec_.plane_bytes();
        if (one == 0 ? bytes != 0 : bytes % one != 0) throw InvalidValue("these aren't whole planes");
        return one == 0 ? 0 : bytes / one;
    }
    TensorSpec spec_;
};

}  // namespace

void bind_codecs(nb::module_& m) {
    m.def("split_planes", &split_planes, nb::arg("data"), nb::arg("out"), nb::arg("width"));
    m.def("join_planes", &join_planes, nb::arg("planes"), nb::arg("out"), nb::arg("width"));
    m.def("hadamard", &hadamard, nb::arg("rows").noconvert());
    m.def("codec_kernels", [] {
        std::vector<std::string> names;
        for (const Kernels& kernels : all_kernels()) names.emplace_back(kernels.name);
        return names;
    });
    m.def("codec_kernels_in_use", [] { return kernels().name; });
    m.def("use_codec_kernels", [](const std::string& name) { return use_kernels(name.c_str()); }, nb::arg("name"));
    nb::class_<Quantizer>(m, "Quantizer")
        .def(nb::init<u8, u8, u8, u8, u8, u32, u32, u32, u32, bool, bool, bool>(), nb::kw_only(), nb::arg("dtype"),
             nb::arg("code"), nb::arg("scales_of_keys"), nb::arg("scales_of_values"), nb::arg("kind"), nb::arg("inner"),
             nb::arg("group"), nb::arg("rows"), nb::arg("cols"), nb::arg("keys_by_channel"), nb::arg("rotate_keys"), nb::arg("rotate_values"))
        .def_prop_ro("plane_bytes", &Quantizer::plane_bytes)
        .def("coded_bytes", &Quantizer::coded_bytes, nb::arg("first"), nb::arg("count"))
        .def("encode", &Quantizer::encode, nb::arg("data"), nb::arg("out"), nb::arg("first") = 0)
        .def("decode", &Quantizer::decode, nb::arg("data"), nb::arg("out"), nb::arg("first") = 0);
}

}  // namespace kvstrata
