// The Bloom filter as kvstrata.bloom sees it.
#include "bindings.hpp"

#include <nanobind/stl/optional.h>

#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "base/bloom.hpp"
#include "base/mapped_bloom.hpp"
#include "base/siphash.hpp"

namespace kvstrata {
namespace {

using Digests = nb::ndarray<const u8, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Answers = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr u64 kMostBytes = u64{1} << 36;

// A filter in memory of its own. Hashes are keyed, so that nobody can choose keys that it takes for its own; filters with
// the same secret hash alike, wherever they are.
class Filter {
public:
    Filter(u64 capacity, double fp_rate, const std::optional<nb::bytes>& secret)
        : shape_(checked(capacity, fp_rate)),
          bytes_(new CountingBloom::Byte[shape_.bytes()]()),
          bloom_(bytes_.get(), shape_) {
        if (secret) {
            if (secret->size() != sizeof secret_) throw InvalidValue("a secret has 16 bytes");
            std::memcpy(secret_, secret->c_str(), sizeof secret_);
            return;
        }
        std::random_device random;
        for (u64& word : secret_) word = u64{random()} << 32 | random();
    }
    CountingBloom& bloom() { return bloom_; }
    u64 hash(Key key) const { return siphash13(secret_[0], secret_[1], key.data(), key.size()); }
    std::vector<u64> hashes(const Digests& digests) const {
        std::vector<u64> all(digests.shape(0));
        const size_t width = digests.shape(1);
        const nb::gil_scoped_release free;
        for (size_t i = 0; i < all.size(); ++i) all[i] = hash({digests.data() + i * width, width});
        return all;
    }
    std::vector<u64> hashes(nb::handle keys) const {
        const nb::object tuple = nb::steal(PySequence_Tuple(keys.ptr()));
        if (!tuple.is_valid()) throw nb::python_error();
        std::vector<u64> all(static_cast<size_t>(PyTuple_GET_SIZE(tuple.ptr())));
        for (size_t i = 0; i < all.size(); ++i)
            all[i] = hash(key_of(nb::handle(PyTuple_GET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i)))));
        return all;
    }

private:
    static BloomShape checked(u64 capacity, double fp_rate) {
        const BloomShape shape = BloomShape::of(capacity, fp_rate);
        if (shape.bytes() > kMostBytes) throw InvalidValue("a filter takes at most 64 GiB");
        return shape;
    }
    u64 secret_[2];
    BloomShape shape_;
    std::unique_ptr<CountingBloom::Byte[]> bytes_;
    CountingBloom bloom_;
};

template <class Each>
void each(Filter& self, const std::vector<u64>& hashes, Each&& call) {
    constexpr size_t kAhead = 16;
    const nb::gil_scoped_release free;
    for (size_t i = 0; i < hashes.size(); ++i) {
        if (i + kAhead < hashes.size()) self.bloom().prefetch(hashes[i + kAhead]);
        call(hashes[i], i);
    }
}

template <class Keys>
void add_many(Filter& self, const Keys& keys) {
    each(self, self.hashes(keys), [&](u64 hash, size_t) { self.bloom().add(hash); });
}

template <class Keys>
u64 remove_many(Filter& self, const Keys& keys) {
    u64 removed = 0;
    each(self, self.hashes(keys), [&](u64 hash, size_t) {
        if (!self.bloom().contains(hash)) return;
        self.bloom().remove(hash);
        ++removed;
    });
    return removed;
}

template <class Keys>
void contains_many(Filter& self, const Keys& keys, Answers out) {
    const std::vector<u64> hashes = self.hashes(keys);
    if (hashes.size() != out.size()) throw InvalidValue("out has to be as long as keys");
    bool* const to = out.data();
    each(self, hashes, [&](u64 hash, size_t i) { to[i] = self.bloom().contains(hash); });
}

nb::bytes bytes_of(const std::vector<u64>& hashes) {
    return nb::bytes(hashes.data(), hashes.size() * sizeof(u64));
}

std::vector<u64> hashes_in(const nb::bytes& bytes) {
    if (bytes.size() % sizeof(u64)) throw InvalidValue("hashes have 8 bytes each");
    std::vector<u64> hashes(bytes.size() / sizeof(u64));
    std::memcpy(hashes.data(), bytes.c_str(), bytes.size());
    return hashes;
}

// Those of the hashes that are certainly not in there.
nb::bytes absent(Filter& self, const nb::bytes& bytes) {
    std::vector<u64> missing;
    each(self, hashes_in(bytes), [&](u64 hash, size_t) {
        if (!self.bloom().contains(hash)) missing.push_back(hash);
    });
    return bytes_of(missing);
}

// A filter in a buffer, which it holds.
class Mapped {
public:
    explicit Mapped(nb::handle memory) : buffer_(memory, true), bloom_(buffer_.data(), buffer_.size()) {}
    MappedBloom& bloom() { return bloom_; }
    u64 begin(u64 capacity, double fp_rate) {
        std::random_device random;
        const u64 secret[2] = {u64{random()} << 32 | random(), u64{random()} << 32 | random()};
        const nb::gil_scoped_release free;
        return bloom_.begin(capacity, fp_rate, secret);
    }
    void add(const nb::list& names) {
        for (nb::handle name : names) bloom_.add(text_of(name));
    }
    bool lacks(const nb::bytes& name) {
        const bool absent = bloom_.lacks(text_of(name));
        spared_ += absent;
        return absent;
    }
    nb::list positions(const nb::list& names, bool count) {
        nb::list found;
        size_t i = 0;
        for (nb::handle name : names) {
            if (!bloom_.lacks(text_of(name))) found.append(i);
            ++i;
        }
        if (count) spared_ += names.size() - found.size();
        return found;
    }
    u64 spared() const { return spared_; }

private:
    static std::string_view text_of(nb::handle name) {
        if (!PyBytes_Check(name.ptr())) throw InvalidValue("names are bytes");
        return {PyBytes_AS_STRING(name.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(name.ptr()))};
    }
    Buffer buffer_;
    MappedBloom bloom_;
    u64 spared_ = 0;  // changed with the GIL held
};

}  // namespace

void bind_bloom(nb::module_& m) {
    nb::class_<Filter>(m, "BloomFilter")
        .def(nb::init<u64, double, const std::optional<nb::bytes>&>(), nb::arg("capacity"), nb::arg("fp_rate"),
             nb::arg("secret") = nb::none())
        .def("hash_many", [](Filter& self, nb::handle keys) { return bytes_of(self.hashes(keys)); }, nb::arg("keys"))
        .def("add_hashes",
             [](Filter& self, const nb::bytes& hashes) {
                 each(self, hashes_in(hashes), [&](u64 hash, size_t) { self.bloom().add(hash); });
             },
             nb::arg("hashes"))
        .def("absent", &absent, nb::arg("hashes"))
        .def("add_many", &add_many<Digests>, nb::arg("keys").noconvert())
        .def("add_many", &add_many<nb::handle>, nb::arg("keys"))
        .def("remove_many", &remove_many<Digests>, nb::arg("keys").noconvert())
        .def("remove_many", &remove_many<nb::handle>, nb::arg("keys"))
        .def("contains_many", &contains_many<Digests>, nb::arg("keys").noconvert(), nb::arg("out"))
        .def("contains_many", &contains_many<nb::handle>, nb::arg("keys"), nb::arg("out"))
        .def("add", [](Filter& self, nb::handle key) { self.bloom().add(self.hash(key_of(key))); },
             nb::arg("key").none())
        .def("contains", [](Filter& self, nb::handle key) { return self.bloom().contains(self.hash(key_of(key))); },
             nb::arg("key").none())
        .def("clear", [](Filter& self) { self.bloom().clear(); })
        .def("figures", [](Filter& self) {
            const auto figures = self.bloom().figures();
            return nb::make_tuple(figures.fill, figures.fp_rate, figures.keys, figures.stuck);
        })
        .def_prop_ro("nbytes", [](Filter& self) { return self.bloom().shape().bytes(); })
        .def_prop_ro("hashes", [](Filter& self) { return self.bloom().shape().hashes; });
    nb::class_<Mapped>(m, "MappedBloom")
        .def(nb::init<nb::handle>(), nb::arg("memory"))
        .def_static("bytes_for", &MappedBloom::bytes_for, nb::arg("capacity"), nb::arg("fp_rate"))
        .def("begin", &Mapped::begin, nb::arg("capacity"), nb::arg("fp_rate"))
        .def("complete", [](Mapped& self, u64 phase) { return self.bloom().complete(phase); }, nb::arg("phase"))
        .def("add", &Mapped::add, nb::arg("names"))
        .def("lacks", &Mapped::lacks, nb::arg("name"))
        .def("positions", &Mapped::positions, nb::arg("names"), nb::arg("count"))
        .def_prop_ro("is_complete", [](Mapped& self) { return self.bloom().is_complete(); })
        .def_prop_ro("capacity", [](Mapped& self) { return self.bloom().capacity(); })
        .def_prop_ro("count", [](Mapped& self) { return self.bloom().count(); })
        .def_prop_ro("nbytes", [](Mapped& self) { return self.bloom().bytes(); })
        .def_prop_ro("spared", &Mapped::spared);
}

}  // namespace kvstrata
