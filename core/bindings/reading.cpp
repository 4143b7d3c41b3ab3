// The verbs of a namespace that read. Keys are looked up in a snapshot of the caller's sequence, and bytes are copied without
// the GIL.
#include <nanobind/stl/optional.h>

#include "arguments.hpp"
#include "pins.hpp"
#include "tiers.hpp"
#include "base/copying.hpp"

namespace kvstrata {
namespace {

constexpr size_t kSmallValue = 4096;  // bytes; up to here a copy costs less than a pin

nb::object* below_marker = nullptr;  // what lookups return for a record that lies below only

// The first `size` bytes of the object as a memoryview.
nb::object filled_part(nb::handle object, size_t size) {
    nb::object view = view_of(object);
    const Py_buffer* buffer = PyMemoryView_GET_BUFFER(view.ptr());
    const bool flat = buffer->ndim == 1 && buffer->itemsize == 1 && (!buffer->format || std::strcmp(buffer->format, "B") == 0);
    if (!flat) view = view.attr("cast")("B");
    if (static_cast<size_t>(PyMemoryView_GET_BUFFER(view.ptr())->len) == size) return view;
    return view[nb::slice(nb::int_(0), nb::int_(size), nb::none())];
}

nb::object new_bytes(size_t size) {
    PyObject* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
    if (!bytes) throw nb::python_error();
    return nb::steal(bytes);
}
u8* start_of(const nb::object& bytes) { return reinterpret_cast<u8*>(PyBytes_AS_STRING(bytes.ptr())); }

Lookup acquire_one(Store& store, Space space, nb::handle key, Pin& pin, Small* small = nullptr) {
    Uses uses(store, space);
    return store.acquire(space, key_of(key), pin, small, &uses);
}

nb::object get(const SpaceHandle& self, nb::handle key) {
    nb::object value;
    switch (read_value(self, key, value)) {
        case Lookup::miss: return nb::none();
        case Lookup::below: return *below_marker;
        case Lookup::hit: break;
    }
    return value;
}

nb::object get_into(const SpaceHandle& self, nb::handle key, nb::handle out) {
    const std::shared_ptr<Store> store = self.owner->live();
    Pin pin;
    switch (acquire_one(*store, self.space, key, pin)) {
        case Lookup::miss: return nb::none();
        case Lookup::below: return *below_marker;
        case Lookup::hit: break;
    }
    const size_t size = pin.size();
    {
        const Target target(out, size);
        const WithoutGil free(size);
        copy_bytes(target.data(), pin.value(), size);
    }
    return filled_part(out, size);
}

nb::object copy_into(nb::handle value, nb::handle out) {
    const Buffer source(value);
    {
        const Target target(out, source.size());
        const WithoutGil free(source.size());
        copy_bytes(target.data(), source.data(), source.size());
    }
    return filled_part(out, source.size());
}

// Pins what lies in memory; lists what lies below.
std::pair<std::vector<Pin>, nb::list> acquire_all(Store& store, Space space, const Keys& keys, bool uses = true) {
    std::vector<Pin> pins(keys.size());
    std::vector<size_t> below;
    {
        const nb::gil_scoped_release free;
        for (size_t first = 0; first < keys.size(); first += Uses::kMost) {
            Uses counted(store, space);
            const size_t count = std::min<size_t>(keys.size() - first, Uses::kMost);
            u32 hashes[Uses::kMost];
            store.look_ahead(space, count, [&](size_t i) { return keys[first + i]; }, hashes, true);
            for (size_t i = first; i < first + count; ++i)
                if (store.acquire(space, keys[i], hashes[i - first], pins[i], nullptr, uses ? &counted : nullptr) == Lookup::below) below.push_back(i);
        }
    }
    nb::list listed;
    for (const size_t i : below) listed.append(i);
    return {std::move(pins), std::move(listed)};
}

// The values of all keys, copied, and which of them lie below.
std::pair<nb::list, nb::list> read_many(const SpaceHandle& self, nb::handle keys_object, nb::handle outs) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Keys keys(keys_object);
    nb::list values, below;
    const bool kept = outs.is_none() && self.owner->near;
    struct Copy {
        u8* to;
        const u8* from;
        size_t size;
    };
    constexpr size_t kBatch = 1024;  // pins held at once
    if (!outs.is_none() && nb::len(outs) != keys.size()) throw InvalidValue("out needs one buffer per key");
    size_t room_size = 0;
    std::unique_ptr<u8[]> room;  // for the small values of a batch, one after the other
    for (size_t start = 0; start < keys.size(); start += kBatch) {
        const size_t count = std::min(kBatch, keys.size() - start);
        std::vector<Pin> pins(count);
        std::vector<Lookup> found(count);
        std::vector<std::pair<size_t, size_t>> small(count);  // where in `room`, and how much
        std::vector<Identity> identities(kept ? count : 0);
        {
            const nb::gil_scoped_release free;
            if (count * 1536 + kSmallValue > room_size) {
                room_size = count * 1536 + kSmallValue;
                room.reset(new u8[room_size]);
            }
            size_t used = 0;
            for (size_t first = 0; first < count; first += Uses::kMost) {
                Uses uses(*store, self.space);
                const size_t ahead = std::min<size_t>(count - first, Uses::kMost);
                u32 hashes[Uses::kMost];
                store->look_ahead(self.space, ahead, [&](size_t i) { return keys[start + first + i]; }, hashes, true);
                for (size_t i = first; i < first + ahead; ++i) {
                    Small target{room.get() + used, std::min(kSmallValue, room_size - used), 0, kept ? &identities[i] : nullptr};
                    found[i] = store->acquire(self.space, keys[start + i], hashes[i - first], pins[i], &target, &uses);
                    small[i] = {used, target.size};
                    used += target.size;
                }
            }
        }
        std::vector<Copy> copies;
        std::vector<Target> targets;
        size_t bytes_to_copy = 0;
        for (size_t i = 0; i < count; ++i) {
            if (found[i] == Lookup::below) below.append(start + i);
            if (found[i] != Lookup::hit) {
                values.append(nb::none());
                continue;
            }
            const size_t size = pins[i] ? pins[i].size() : small[i].second;
            const u8* const from = pins[i] ? pins[i].value() : room.get() + small[i].first;
            if (!outs.is_none()) {
                const nb::object out = outs[start + i];
                targets.emplace_back(out, size);
                copies.push_back({targets.back().data(), from, size});
                values.append(filled_part(out, size));
            } else if (!pins[i]) {
                const nb::object bytes = nb::steal(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(from), static_cast<Py_ssize_t>(size)));
                values.append(bytes);
                if (kept && identities[i].seq && self.owner->near)
                    self.owner->near->offer(self.space, keys.object(start + i), bytes.ptr(), identities[i]);
                continue;
            } else {
                nb::object bytes = new_bytes(size);
                copies.push_back({start_of(bytes), from, size});
                values.append(std::move(bytes));
            }
            bytes_to_copy += size;
        }
        const WithoutGil free(bytes_to_copy);
        for (const Copy& copy : copies) copy_bytes(copy.to, copy.from, copy.size);
        pins.clear();
    }
    return {std::move(values), std::move(below)};
}

// As read_many, with references to what is kept near.
nb::tuple get_many(const SpaceHandle& self, nb::handle keys_object, nb::handle outs) {
    const std::shared_ptr<Store> store = self.owner->live();
    constexpr Py_ssize_t kAhead = 8;
    const bool listed = PyList_CheckExact(keys_object.ptr()) || PyTuple_CheckExact(keys_object.ptr());
    if (!self.owner->near || !outs.is_none() || !listed) {
        auto [values, below] = read_many(self, keys_object, outs);
        return nb::make_tuple(values, below);
    }
    NearCache& near = *self.owner->near;
    PyObject** const keys = PySequence_Fast_ITEMS(keys_object.ptr());
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(keys_object.ptr());
    nb::list values = nb::steal<nb::list>(PyList_New(count)), below;
    nb::list rest;
    std::vector<Py_ssize_t> places;
    for (Py_ssize_t i = 0; i < std::min(kAhead, count); ++i) near.prefetch(self.space, keys[i]);
    for (Py_ssize_t first = 0; first < count; first += Uses::kMost) {
        Uses uses(*store, self.space);
        for (Py_ssize_t i = first; i < std::min(count, first + Py_ssize_t{Uses::kMost}); ++i) {
            if (i + kAhead < count) near.prefetch(self.space, keys[i + kAhead]);
            const Identity* identity;
            PyObject* const kept = near.find(*store, self.space, keys[i], identity);
            if (kept) {
                uses.count(*identity);
            } else {
                places.push_back(i);
                rest.append(nb::handle(keys[i]));
            }
            PyList_SET_ITEM(values.ptr(), i, Py_NewRef(kept ? kept : Py_None));
        }
    }
    if (!places.empty()) {
        const auto [read, lower] = read_many(self, rest, outs);
        for (size_t n = 0; n < places.size(); ++n) {
            PyObject* const value = PyList_GET_ITEM(read.ptr(), static_cast<Py_ssize_t>(n));
            if (value != Py_None) PyList_SetItem(values.ptr(), places[n], Py_NewRef(value));
        }
        for (const nb::handle n : lower) below.append(places[nb::cast<size_t>(n)]);
    }
    return nb::make_tuple(values, below);
}

nb::object pin(const SpaceHandle& self, nb::handle key) {
    const std::shared_ptr<Store>& store = self.owner->live();
    Pin pin;
    switch (acquire_one(*store, self.space, key, pin)) {
        case Lookup::miss: return nb::none();
        case Lookup::below: return *below_marker;
        case Lookup::hit: break;
    }
    return pin_object(store, std::move(pin));
}

nb::tuple pin_many(const SpaceHandle& self, nb::handle keys_object, bool uses) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Keys keys(keys_object);
    auto [pins, below] = acquire_all(*store, self.space, keys, uses);
    nb::list objects;
    for (Pin& pin : pins) objects.append(pin ? pin_object(store, std::move(pin)) : nb::none());
    return nb::make_tuple(objects, below);
}

size_t contains_prefix(const SpaceHandle& self, nb::handle keys_object) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Keys keys(keys_object);
    const nb::gil_scoped_release free;
    return store->contains_prefix(self.space, keys.size(), [&](size_t i) { return keys[i]; });
}

// The records of keys, pinned whole, for who copies them elsewhere; None for what isn't in memory.
nb::list records(const SpaceHandle& self, nb::handle keys_object) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Keys keys(keys_object);
    auto [pins, below] = acquire_all(*store, self.space, keys, false);
    nb::list list;
    for (size_t i = 0; i < pins.size(); ++i) {
        if (!pins[i]) {
            list.append(nb::none());
            continue;
        }
        const RecordHeader header = pins[i].header();
        DirtyHandle handle{store, Dirty{std::move(pins[i]), header.seq}, header, nb::bytes(reinterpret_cast<const char*>(keys[i].data()), keys[i].size()), {}, {}};
        store->tags_of(handle.dirty->pin, handle.tags);
        list.append(nb::cast(std::move(handle)));
    }
    return list;
}

}  // namespace

Lookup read_value(const SpaceHandle& self, nb::handle key, nb::object& value) {
    const std::shared_ptr<Store>& store = self.owner->store;
    if (!store) throw CacheClosed("this cache is closed");
    Pin pin;
    u8 room[kSmallValue];
    Identity identity;
    Small small{room, sizeof room, 0, self.owner->near ? &identity : nullptr};
    const Lookup found = store->acquire(self.space, key_of(key), pin, &small, &self.owner->gather(self.space));
    if (found != Lookup::hit) return found;
    if (!pin) {
        value = new_bytes(small.size);
        std::memcpy(start_of(value), room, small.size);
        if (identity.seq) self.owner->near->offer(self.space, key.ptr(), value.ptr(), identity);
        return found;
    }
    const size_t size = pin.size();
    value = new_bytes(size);
    if (size < kWorthASwitch) {
        copy_bytes(start_of(value), pin.value(), size);
    } else {
        const std::shared_ptr<Store> kept = store;
        const nb::gil_scoped_release free;
        copy_bytes(start_of(value), pin.value(), size);
        pin = Pin();
    }
    return found;
}

void bind_reading(nb::module_& m, nb::class_<SpaceHandle>& space) {
    below_marker = new nb::object(nb::module_::import_("builtins").attr("object")());
    m.attr("BELOW") = *below_marker;
    m.def("copy_into", &copy_into, nb::arg("value"), nb::arg("out"));
    m.def("value_bytes", [](nb::handle object) {
        const Value value(object);
        return nb::bytes(value.data(), value.size());
    }, nb::arg("value").none());

    space
        .def("get", &get, nb::arg("key").none())
        .def("get_into", &get_into, nb::arg("key").none(), nb::arg("out").none())
        .def("get_many", &get_many, nb::arg("keys").none(), nb::arg("out").none() = nb::none())
        .def("pin", &pin, nb::arg("key").none())
        .def("pin_many", &pin_many, nb::arg("keys").none(), nb::arg("uses") = true)
        .def("contains", [](const SpaceHandle& s, nb::handle key) { return s.owner->live()->contains(s.space, key_of(key)); },
             nb::arg("key").none())
        .def("contains_prefix", &contains_prefix, nb::arg("keys").none())
        .def("records", &records, nb::arg("keys").none());
}

}  // namespace kvstrata
