// The simulator as kvstrata.policies sees it.
#include "bindings.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "policy/simulator.hpp"
#include "base/siphash.hpp"

namespace kvstrata {
namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

u64 number_of(const u8* data, size_t size) { return siphash13(0, 0, data, size); }

// An int as it is, of bytes or text a hash.
u64 number_of(nb::handle key) {
    if (PyLong_Check(key.ptr())) {
        const u64 number = PyLong_AsUnsignedLongLongMask(key.ptr());
        if (number == ~u64{0} && PyErr_Occurred()) throw nb::python_error();
        return number;
    }
    const Key bytes = key_of(key);
    return number_of(bytes.data(), bytes.size());
}

bool access(Simulator& self, nb::handle key, u64 size, float cost, nb::handle parent) {
    Simulator::Access access{number_of(key), size, cost, Simulator::Place::first, 0};
    if (!parent.is_none()) {
        access.place = Simulator::Place::inside;
        access.parent = number_of(parent);
    }
    return self.access(access);
}

// `parents` are numbers of keys, and `inside` says where there is one.
void run(Simulator& self, Array<u64> keys, std::optional<Array<u64>> sizes, std::optional<Array<u64>> parents,
         std::optional<Array<bool>> inside, nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu> hits) {
    constexpr size_t kAhead = 8;
    const size_t count = keys.size();
    if (hits.size() != count || (sizes && sizes->size() != count) || (parents && parents->size() != count) ||
        (inside && inside->size() != count) || bool(parents) != bool(inside))
        throw InvalidValue("keys, sizes and parents have to be of one length");
    const u64* const key = keys.data();
    const u64* const size = sizes ? sizes->data() : nullptr;
    const u64* const parent = parents ? parents->data() : nullptr;
    const bool* const has_parent = inside ? inside->data() : nullptr;
    bool* const hit = hits.data();
    const nb::gil_scoped_release free;
    Simulator::Access access;
    for (size_t i = 0; i < count; ++i) {
        if (i + kAhead < count) self.prefetch(key[i + kAhead]);
        access.key = key[i];
        if (size) access.size = size[i];
        if (parent) {
            access.place = has_parent[i] ? Simulator::Place::inside : Simulator::Place::first;
            access.parent = parent[i];
        }
        hit[i] = self.access(access);
    }
}

}  // namespace

void bind_simulator(nb::module_& m) {
    m.def("key_numbers", [](nb::handle keys, nb::ndarray<u64, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        const nb::object tuple = nb::steal(PySequence_Tuple(keys.ptr()));
        if (!tuple.is_valid()) throw nb::python_error();
        if (static_cast<size_t>(PyTuple_GET_SIZE(tuple.ptr())) != out.size()) throw InvalidValue("out has to be as long as keys");
        for (size_t i = 0; i < out.size(); ++i)
            out.data()[i] = number_of(nb::handle(PyTuple_GET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i))));
    }, nb::arg("keys"), nb::arg("out"));

    nb::class_<Simulator>(m, "Simulator")
        .def("__init__", [](Simulator* self, const std::string& policy, u64 capacity, bool by_bytes) {
            new (self) Simulator(policy.c_str(), capacity, by_bytes);
        }, nb::arg("policy"), nb::arg("capacity"), nb::arg("by_bytes"))
        .def("access", &access, nb::arg("key"), nb::arg("size"), nb::arg("cost"), nb::arg("parent").none())
        .def("run", &run, nb::arg("keys"), nb::arg("sizes").none(), nb::arg("parents").none(), nb::arg("inside").none(),
             nb::arg("hits"))
        .def("remove", [](Simulator& self, nb::handle key) { return self.remove(number_of(key)); }, nb::arg("key"))
        .def("__contains__", [](const Simulator& self, nb::handle key) { return self.contains(number_of(key)); }, nb::arg("key"))
        .def("__len__", &Simulator::count)
        .def_prop_ro("size", &Simulator::size);
}

}  // namespace kvstrata
