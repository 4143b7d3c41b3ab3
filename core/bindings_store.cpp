// The store as Python sees it. kvstrata.cache and kvstrata.tiers are the only ones that use it.
//
// Keys are looked up in a snapshot of the caller's sequence, and bytes are copied without the GIL. An object that
// exports memory of the arena keeps the store alive.
#include "bindings.hpp"

#include <cstring>
#include <deque>
#include <random>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "clock.hpp"
#include "crc32c.hpp"
#include "store.hpp"

namespace kvstrata {
namespace {

constexpr size_t kAhead = 16;         // puts whose memory is fetched ahead
constexpr size_t kSmallValue = 4096;  // bytes; up to here a copy costs less than a pin

nb::object* below_marker = nullptr;    // what lookups return for a record that lies below only
nb::object* loading_marker = nullptr;  // what begin_load returns for one that somebody else is bringing up

// ---- Memory of the arena, exported ----------------------------------------------------------------

// Exports a part of the arena, read-only, and keeps it pinned until it is released and nobody has a view any more.
struct PinHandle {
    std::shared_ptr<Store> store;
    Pin pin;
    bool whole_record = false;  // or only the value
    std::shared_ptr<Buffer> local;  // instead of a pin: a value in private memory, for which the arena had no room
    bool released = false;
    int exports = 0;
    nb::object view;            // given out by `with`: a weak reference

    void release_if_unused() {
        if (released && exports == 0) pin = Pin(), store.reset(), local.reset();
    }
    bool holds() const { return !released && (store || local); }
    const u8* data() const { return local ? local->data() : whole_record ? pin.record() : pin.value(); }
    u64 size() const { return local ? local->size() : whole_record ? pin.record_size() : pin.size(); }
};

nb::object view_of(nb::handle object) {
    PyObject* view = PyMemoryView_FromObject(object.ptr());
    if (!view) throw nb::python_error();
    return nb::steal(view);
}

int export_pin(PyObject* self, Py_buffer* buffer, int flags) {
    PinHandle* pin = nb::inst_ptr<PinHandle>(self);
    if (!pin->holds()) {
        PyErr_SetString(PyExc_ValueError, "this pin is released");
        return -1;
    }
    // const_cast: the pages are mapped read-only, and the export says so.
    if (PyBuffer_FillInfo(buffer, self, const_cast<u8*>(pin->data()), static_cast<Py_ssize_t>(pin->size()), 1, flags) != 0)
        return -1;
    ++pin->exports;
    return 0;
}

void unexport_pin(PyObject* self, Py_buffer*) {
    PinHandle* pin = nb::inst_ptr<PinHandle>(self);
    --pin->exports;
    pin->release_if_unused();
}

PyType_Slot pin_slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(export_pin)},
    {Py_bf_releasebuffer, reinterpret_cast<void*>(unexport_pin)},
    {0, nullptr},
};

// Gives out a view of the object, of which the object keeps a weak reference: a strong one would keep both for ever.
nb::object give_view(nb::handle object, nb::object& reference) {
    nb::object view = view_of(object);
    reference = nb::steal(PyWeakref_NewRef(view.ptr(), nullptr));
    if (!reference.is_valid()) throw nb::python_error();
    return view;
}

// Ends the view that was given out; one that others still look through stays valid, and so does what it keeps.
void end_view(nb::object& reference) {
    if (!reference.is_valid()) return;
    const nb::object view = reference();
    reference.reset();
    if (view.is_none()) return;
    PyObject* done = PyObject_CallMethod(view.ptr(), "release", nullptr);
    if (!done) {
        if (!PyErr_ExceptionMatches(PyExc_BufferError)) throw nb::python_error();
        PyErr_Clear();
    }
    Py_XDECREF(done);
}

void release_pin(PinHandle& pin) {
    end_view(pin.view);
    pin.released = true;
    pin.release_if_unused();
}

// A writable part of the arena: the payload of a put, or the record of a load.
struct WriteHandle {
    std::shared_ptr<Store> store;
    std::optional<Reservation> reservation;
    std::optional<Loading> loading;
    Pin kept;  // of the published record, while somebody can still write to it
    bool finished = false;
    int exports = 0;
    nb::object view;  // a weak reference

    // Ends it. A view that somebody still holds keeps the memory that it looks into, until it goes.
    void finish() {
        finished = true;
        if (exports == 0) reservation.reset(), loading.reset(), kept = Pin();
    }
    u8* data() const { return reservation ? reservation->payload() : loading->block.bytes(); }
    u64 size() const {
        return reservation ? reservation->header.stored_len : u64{loading->block.units()} * kUnit;
    }
};

int export_write(PyObject* self, Py_buffer* buffer, int flags) {
    WriteHandle* write = nb::inst_ptr<WriteHandle>(self);
    if (write->finished || write->store->left_to_parent()) {
        PyErr_SetString(PyExc_ValueError, "this reservation is finished, or another process's");
        return -1;
    }
    if (PyBuffer_FillInfo(buffer, self, write->data(), static_cast<Py_ssize_t>(write->size()), 0, flags) != 0) return -1;
    ++write->exports;
    return 0;
}

void unexport_write(PyObject* self, Py_buffer*) {
    WriteHandle* write = nb::inst_ptr<WriteHandle>(self);
    --write->exports;
    if (write->finished) write->finish();
}

PyType_Slot write_slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(export_write)},
    {Py_bf_releasebuffer, reinterpret_cast<void*>(unexport_write)},
    {0, nullptr},
};

void abort_write(WriteHandle& write) {
    end_view(write.view);
    write.finish();
}

nb::object pin_object(const std::shared_ptr<Store>& store, Pin&& pin, bool whole_record = false) {
    PinHandle handle;
    handle.store = store;
    handle.pin = std::move(pin);
    handle.whole_record = whole_record;
    return nb::cast(std::move(handle));
}

// What a put returns: 0, or the number of the new record when the older one is, or may be, on disk.
u64 replaced(Published published, const Reservation& reservation) {
    return published == Published::replaced_on_disk ? reservation.header.seq : 0;
}

u64 commit_write(WriteHandle& write) {
    if (write.finished || !write.reservation) throw InvalidValue("this reservation is finished");
    end_view(write.view);
    if (write.store->left_to_parent()) throw InvalidValue("this reservation belongs to the process that forked this one");
    Reservation& reservation = *write.reservation;
    const u64 size = reservation.header.stored_len;
    Published published;
    {
        const WithoutGil free(size);
        reservation.header.payload_crc = crc32c(0, reservation.payload(), size);
        published = write.store->publish(reservation, write.exports ? &write.kept : nullptr);
    }
    const u64 result = replaced(published, reservation);
    write.finish();
    return result;
}

nb::object commit_load(WriteHandle& write) {
    if (write.finished || !write.loading) throw InvalidValue("this load is finished");
    end_view(write.view);
    Pin pin;
    {
        const WithoutGil free(write.size());
        pin = write.store->commit_load(*write.loading);
    }
    write.finish();
    return pin ? pin_object(write.store, std::move(pin)) : nb::none();
}

// ---- Arguments ------------------------------------------------------------------------------------

// A snapshot of a sequence of keys, which stays valid without the GIL.
class Keys {
public:
    explicit Keys(nb::handle keys) {
        if (PyUnicode_Check(keys.ptr()) || PyBytes_Check(keys.ptr()))
            throw InvalidKey("this takes a sequence of keys, not one key");
        PyObject* tuple = PySequence_Tuple(keys.ptr());
        if (!tuple) throw nb::python_error();
        objects_ = nb::steal<nb::tuple>(tuple);
        const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
        keys_.reserve(static_cast<size_t>(count));
        for (Py_ssize_t i = 0; i < count; ++i) keys_.push_back(key_of(PyTuple_GET_ITEM(tuple, i)));
    }
    size_t size() const { return keys_.size(); }
    Key operator[](size_t i) const { return keys_[i]; }
    const Key* data() const { return keys_.data(); }
    PyObject* object(size_t i) const { return PyTuple_GET_ITEM(objects_.ptr(), static_cast<Py_ssize_t>(i)); }

private:
    nb::tuple objects_;
    std::vector<Key> keys_;
};

// Whether a buffer of this format holds addresses instead of values. Names of fields stand between colons.
bool holds_addresses(const char* format) {
    bool in_name = false;
    for (; format && *format; ++format) {
        if (*format == ':') in_name = !in_name;
        if (!in_name && std::strchr("OP&", *format)) return true;
    }
    return false;
}

// The bytes of a value: of a buffer, contiguous or made so, or of a tensor on the CPU.
class Value {
public:
    explicit Value(nb::handle object) {
        if (PyObject_CheckBuffer(object.ptr())) {
            if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FULL_RO) != 0) {
                PyErr_Clear();
                throw InvalidValue(std::string("this ") + Py_TYPE(object.ptr())->tp_name +
                                   " has no plain bytes to store; for an array, store array.view('u1')");
            }
            if (holds_addresses(view_.format)) {
                PyBuffer_Release(&view_);
                view_.obj = nullptr;
                throw InvalidValue("an array of objects is no value: what it holds are addresses");
            }
            size_ = static_cast<size_t>(view_.len);
            if (PyBuffer_IsContiguous(&view_, 'C')) {
                data_ = static_cast<const u8*>(view_.buf);
                return;
            }
            copy_.resize(size_);
            const int failed = PyBuffer_ToContiguous(copy_.data(), &view_, view_.len, 'C');
            PyBuffer_Release(&view_);
            view_.obj = nullptr;
            if (failed) throw nb::python_error();
            data_ = copy_.data();
            return;
        }
        if (!nb::hasattr(object, "__dlpack__"))
            throw InvalidValue(std::string("a value is bytes-like, an array or a tensor, not ") +
                               Py_TYPE(object.ptr())->tp_name);
        if (!nb::try_cast(object, tensor_))
            throw InvalidValue("this tensor can't be stored as it is: it has to be contiguous, on the CPU, and without "
                               "gradient; store tensor.detach().cpu().contiguous()");
        data_ = static_cast<const u8*>(tensor_.data());
        size_ = tensor_.nbytes();
    }
    ~Value() {
        if (view_.obj) PyBuffer_Release(&view_);
    }
    Value(const Value&) = delete;
    Value& operator=(const Value&) = delete;
    const u8* data() const { return data_; }
    size_t size() const { return size_; }

private:
    Py_buffer view_{};
    std::vector<u8> copy_;
    nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> tensor_;
    const u8* data_ = nullptr;
    size_t size_ = 0;
};

// A writable buffer to be filled.
class Target {
public:
    Target(nb::handle object, size_t need) {
        const bool given = PyObject_GetBuffer(object.ptr(), &view_, PyBUF_CONTIG | PyBUF_FORMAT) == 0;
        if (given && holds_addresses(view_.format)) PyBuffer_Release(&view_);
        if (!given || !view_.obj) {
            PyErr_Clear();
            throw InvalidValue(std::string("out has to be a writable, contiguous buffer of plain bytes or numbers, not ") +
                               Py_TYPE(object.ptr())->tp_name);
        }
        if (static_cast<size_t>(view_.len) < need) {
            const Py_ssize_t length = view_.len;
            PyBuffer_Release(&view_);
            throw InvalidValue("out has " + std::to_string(length) + " bytes, the value has " + std::to_string(need));
        }
    }
    Target(Target&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    ~Target() {
        if (view_.obj) PyBuffer_Release(&view_);
    }
    u8* data() const { return static_cast<u8*>(view_.buf); }

private:
    Py_buffer view_{};
};

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

// How long records live: `ms` from now, or up to the part `jitter` of that less, drawn anew for each; 0 = for ever.
struct TimeToLive {
    u64 ms;
    float jitter;

    u64 expires() const {
        if (!ms) return 0;
        if (jitter <= 0) return now_ms() + ms;
        thread_local std::minstd_rand random{std::random_device{}()};
        const double part = std::uniform_real_distribution<double>(0, double{jitter})(random);
        return now_ms() + std::max<u64>(1, ms - static_cast<u64>(static_cast<double>(ms) * part));
    }
};

PutOptions put_options(const Store& store, const Space& space, const TimeToLive& ttl, float cost, nb::handle tags) {
    PutOptions options{ttl.expires(), cost, 0, {}};
    if (tags.is_none()) return options;
    const Keys names(tags);
    if (names.size() > kTags) throw InvalidValue("a record has at most " + std::to_string(kTags) + " tags");
    for (size_t i = 0; i < names.size(); ++i) options.tags[i] = store.tag_slot(space.id, names[i]);
    return options;
}

// ---- Verbs ----------------------------------------------------------------------------------------

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
        std::memcpy(target.data(), pin.value(), size);
    }
    return filled_part(out, size);
}

nb::object copy_into(nb::handle value, nb::handle out) {
    const Buffer source(value);
    {
        const Target target(out, source.size());
        const WithoutGil free(source.size());
        std::memcpy(target.data(), source.data(), source.size());
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
        for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.size);
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

Reservation reserve_or_wait(Store& store, Space space, Key key, u64 size, const PutOptions& options) {
    auto reservation = store.reserve(space, key, size, options, false);
    if (!reservation) {
        const nb::gil_scoped_release free;  // the writer of the tier below needs it
        reservation = store.reserve(space, key, size, options, true);
    }
    return std::move(*reservation);
}

// A value from Python; with `keep`, its record is pinned as it is published. Returns what a put returns. Where an immutable
// namespace has the key already, nothing is stored or pinned.
u64 put_value(const std::shared_ptr<Store>& store, Space space, nb::handle key_object, nb::handle value_object,
              const TimeToLive& ttl, float cost, nb::handle tags, Pin* keep) {
    const Key key = key_of(key_object);
    const Value value(value_object);
    if (store->present_immutable(space, key)) return 0;
    Reservation reservation = reserve_or_wait(*store, space, key, value.size(), put_options(*store, space, ttl, cost, tags));
    const WithoutGil free(value.size());
    reservation.header.payload_crc = copy_crc32c(reservation.payload(), value.data(), value.size(), 0);
    return replaced(store->publish(reservation, keep), reservation);
}

u64 put(const SpaceHandle& self, nb::handle key, nb::handle value, u64 ttl_ms, float jitter, float cost, nb::handle tags) {
    const std::shared_ptr<Store> store = self.owner->live();  // kept: others may run, and close the cache
    return put_value(store, self.space, key, value, {ttl_ms, jitter}, cost, tags, nullptr);
}

// As put, for who keeps a copy: returns (what a put returns, a pin of the record if it was stored).
nb::tuple put_pinned(const SpaceHandle& self, nb::handle key, nb::handle value, u64 ttl_ms, float jitter, float cost,
                     nb::handle tags) {
    const std::shared_ptr<Store> store = self.owner->live();
    Pin pin;
    const u64 older = put_value(store, self.space, key, value, {ttl_ms, jitter}, cost, tags, &pin);
    return nb::make_tuple(older, pin ? pin_object(store, std::move(pin)) : nb::none());
}

// Appends to `replaced` position and number of those that replaced something that is, or may be, on disk: also when
// it fails, of those before.
void put_many(const SpaceHandle& self, nb::handle keys_object, nb::handle values_object, nb::list replaced_list, u64 ttl_ms,
              float jitter, float cost, nb::handle tags) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Keys keys(keys_object);
    const nb::object values = nb::steal(PySequence_Tuple(values_object.ptr()));
    if (!values.is_valid()) throw nb::python_error();
    if (nb::len(values) != keys.size()) throw InvalidValue("one value for each key is needed");
    std::vector<std::span<const u8>> contents;
    contents.reserve(keys.size());
    std::deque<Value> others;  // than bytes, which `values` keeps
    for (size_t i = 0; i < keys.size(); ++i) {
        PyObject* const value = PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i));
        if (PyBytes_Check(value)) {
            contents.emplace_back(reinterpret_cast<const u8*>(PyBytes_AS_STRING(value)), static_cast<size_t>(PyBytes_GET_SIZE(value)));
        } else {
            const Value& other = others.emplace_back(nb::handle(value));
            contents.emplace_back(other.data(), other.size());
        }
    }
    const TimeToLive ttl{ttl_ms, jitter};
    PutOptions options = put_options(*store, self.space, ttl, cost, tags);
    std::vector<std::pair<size_t, u64>> replacing;
    std::exception_ptr failed;
    {
        const nb::gil_scoped_release free;
        try {
            u32 hashes[kAhead];
            for (size_t i = 0; i < keys.size(); ++i) {
                if (i % kAhead == 0)
                    store->look_ahead(self.space, std::min(kAhead, keys.size() - i), [&](size_t n) { return keys[i + n]; }, hashes, false);
                if (store->present_immutable(self.space, keys[i])) continue;
                options.expires = ttl.expires();
                auto reservation = store->reserve(self.space, keys[i], hashes[i % kAhead], contents[i].size(), options, true);
                reservation->header.payload_crc = copy_crc32c(reservation->payload(), contents[i].data(), contents[i].size(), 0);
                if (const u64 seq = replaced(store->publish(*reservation), *reservation)) replacing.emplace_back(i, seq);
            }
        } catch (...) {
            failed = std::current_exception();
        }
    }
    for (const auto& [i, seq] : replacing) replaced_list.append(nb::make_tuple(i, seq));
    if (failed) std::rethrow_exception(failed);
}

// How many were there, and the positions of those whose row, if any, has to be deleted below.
nb::tuple remove_many(const SpaceHandle& self, nb::handle keys_object) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Keys keys(keys_object);
    store->require_current(self.space);
    size_t present = 0;
    std::vector<size_t> on_disk;
    {
        const nb::gil_scoped_release free;
        for (size_t i = 0; i < keys.size(); ++i) {
            const auto removed = store->remove(self.space, keys[i]);
            present += removed.present;
            if (removed.on_disk) on_disk.push_back(i);
        }
    }
    nb::list listed;
    for (const size_t i : on_disk) listed.append(i);
    return nb::make_tuple(present, listed);
}

nb::list keys_of(const SpaceHandle& self, u32 shard, nb::handle prefix_object) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Buffer prefix(prefix_object);
    std::vector<std::vector<u8>> found;
    {
        const nb::gil_scoped_release free;
        found = store->keys_of(self.space, shard, {prefix.data(), prefix.size()});
    }
    nb::list keys;
    for (const auto& key : found) keys.append(nb::bytes(reinterpret_cast<const char*>(key.data()), key.size()));
    return keys;
}

nb::object reserve(const SpaceHandle& self, nb::handle key_object, u64 size, u64 ttl_ms, float jitter, float cost,
                   nb::handle tags, u32 depth) {
    const std::shared_ptr<Store> store = self.owner->live();
    PutOptions options = put_options(*store, self.space, {ttl_ms, jitter}, cost, tags);
    options.depth = depth;
    WriteHandle write;
    write.store = store;
    write.reservation = reserve_or_wait(*store, self.space, key_of(key_object), size, options);
    return nb::cast(std::move(write));
}

// ---- Tiers elsewhere ------------------------------------------------------------------------------

// Stores what was found there. Returns (what became of it, what a put returns, a pin of it): 0 = stored, 1 = the key is
// there, 2 = it may be older than a change made here, 3 = it counts, but there is no room in memory.
nb::tuple promote(const SpaceHandle& self, nb::handle key_object, nb::handle value, u64 expires, u64 written, u64 low, u32 epoch) {
    const std::shared_ptr<Store> store = self.owner->live();
    const Key key = key_of(key_object);
    const Buffer content(value);
    const Promotion promotion{written, low, epoch};
    std::optional<Reservation> reservation;
    try {
        reservation = store->reserve(self.space, key, content.size(), {expires, 1, 0, {}}, false);
    } catch (const TierFull&) {
        // Too large for memory, or for the quota.
    }
    if (!reservation) return nb::make_tuple(store->trusts(self.space, key, promotion) ? 3 : 2, 0, nb::none());
    Pin pin;
    Published published;
    {
        const WithoutGil free(content.size());
        reservation->header.payload_crc = copy_crc32c(reservation->payload(), content.data(), content.size(), 0);
        published = store->publish(*reservation, &pin, &promotion);
    }
    if (published == Published::present || published == Published::refused)
        return nb::make_tuple(published == Published::present ? 1 : 2, 0, nb::none());
    return nb::make_tuple(0, replaced(published, *reservation), pin_object(store, std::move(pin)));
}

// ---- The tier below -------------------------------------------------------------------------------

struct DirtyHandle {
    std::shared_ptr<Store> store;
    std::optional<Dirty> dirty;
    RecordHeader header;
    nb::bytes key;
    u16 tags[kTags];
    nb::object encoded;  // the record as it goes below, where that isn't what lies in memory

    // Lets it go below with that payload in place of its value.
    void encode(nb::handle payload, u8 codec, u32 seed) {
        if (!dirty) throw InvalidValue("this record is settled");
        PyObject* view = PyMemoryView_FromMemory(reinterpret_cast<char*>(const_cast<u8*>(dirty->pin.record())),
                                                 static_cast<Py_ssize_t>(dirty->pin.record_size()), PyBUF_READ);
        if (!view) throw nb::python_error();
        encoded = encode_record(nb::steal(view), payload, codec, seed, {}, {}, {}, {});
    }
    u64 length() const {
        return encoded.is_valid() ? nb::len(encoded) : record_bytes(header.key_len, header.stored_len);
    }
    u8 flags() const { return static_cast<u8>(header.flags | (encoded.is_valid() ? kRecordEncoded : 0)); }
    std::int64_t packed_tags() const {
        std::int64_t packed;
        static_assert(sizeof packed == sizeof tags);
        std::memcpy(&packed, tags, sizeof packed);
        return packed;
    }
};

nb::list take_dirty(StoreHandle& self, size_t most, u64 most_bytes, double timeout) {
    const std::shared_ptr<Store> store = self.live();
    std::vector<Dirty> taken;
    {
        const nb::gil_scoped_release free;
        taken = store->take_dirty(most, most_bytes, timeout);
    }
    nb::list list;
    for (Dirty& dirty : taken) {
        const RecordHeader header = dirty.pin.header();
        nb::bytes key(reinterpret_cast<const char*>(dirty.pin.record()) + sizeof header, header.key_len);
        DirtyHandle handle{store, std::move(dirty), header, std::move(key), {}, {}};
        store->tags_of(handle.dirty->pin, handle.tags);
        list.append(nb::cast(std::move(handle)));
    }
    return list;
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

nb::object view_dirty(DirtyHandle& self) {
    if (!self.dirty) throw InvalidValue("this record is settled");
    if (self.encoded.is_valid()) return view_of(self.encoded);
    const Pin& pin = self.dirty->pin;
    PyObject* view = PyMemoryView_FromMemory(reinterpret_cast<char*>(const_cast<u8*>(pin.record())),
                                             static_cast<Py_ssize_t>(pin.record_size()), PyBUF_READ);
    if (!view) throw nb::python_error();
    return nb::steal(view);
}

void settle(DirtyHandle& handle, u32 segment, u64 offset) {
    if (!handle.dirty) return;
    handle.store->settle(*handle.dirty, segment, offset, handle.encoded.is_valid() ? handle.length() : 0);
    handle.dirty.reset();
}

nb::list find_on_disk(StoreHandle& self, u32 ns, nb::handle keys_object) {
    const std::shared_ptr<Store> store = self.live();
    const Keys keys(keys_object);
    std::vector<std::optional<Location>> found(keys.size());
    {
        const nb::gil_scoped_release free;
        const Space space = store->current_space(ns);
        for (size_t i = 0; i < keys.size(); ++i) found[i] = store->locate(space, keys[i]);
    }
    nb::list list;
    for (const auto& at : found)
        list.append(at ? nb::object(nb::make_tuple(at->entry, at->seq, at->segment, at->offset, at->length, at->encoded)) : nb::none());
    return list;
}

// That this process brings a record up, before it is known how much memory that takes.
struct ClaimHandle {
    std::shared_ptr<Store> store;
    LoadClaim claim;
};

// LOADING when somebody else is at it.
nb::object claim_load(StoreHandle& self, u32 entry, u64 seq, bool take_over) {
    ClaimHandle handle{self.live(), {}};
    if (!handle.store->claim_load({entry, seq, 0, 0, 0}, take_over, handle.claim)) return *loading_marker;
    return nb::cast(std::move(handle));
}

// The same, unless the caller has a claim already.
nb::object begin_load(StoreHandle& self, u32 ns, nb::handle key, u32 entry, u64 seq, u64 length, bool take_over,
                      nb::handle claimed) {
    const std::shared_ptr<Store> store = self.live();
    const Location location{entry, seq, 0, 0, length};
    LoadClaim claim;
    if (!claimed.is_none())
        claim = std::move(nb::cast<ClaimHandle&>(claimed).claim);
    else if (!store->claim_load(location, take_over, claim))
        return *loading_marker;
    auto loading = store->begin_load(store->current_space(ns), key_of(key), location, std::move(claim));
    if (!loading) return nb::none();
    WriteHandle write;
    write.store = store;
    write.loading = std::move(loading);
    return nb::cast(std::move(write));
}

u64 insert_disk(StoreHandle& self, nb::handle rows) {
    const std::shared_ptr<Store> store = self.live();
    u64 inserted = 0;
    for (nb::handle row : nb::iter(rows)) {
        const nb::tuple fields = nb::cast<nb::tuple>(row);
        DiskRow disk_row{nb::cast<u32>(fields[0]), key_of(fields[1]), nb::cast<u64>(fields[2]), nb::cast<u32>(fields[3]),
                         nb::cast<u64>(fields[4]), nb::cast<u64>(fields[5]), nb::cast<u64>(fields[6]),
                         nb::cast<u32>(fields[7]), nb::cast<u32>(fields[8]), nb::cast<u8>(fields[9]), {}};
        const auto packed_tags = nb::cast<std::int64_t>(fields[10]);
        std::memcpy(disk_row.tags, &packed_tags, sizeof disk_row.tags);
        inserted += store->insert_disk(disk_row);
    }
    return inserted;
}

nb::dict stats(StoreHandle& self) {
    const StoreStats s = self.live()->stats();
    nb::dict d;
    auto add = [&](const char* name, u64 value) { d[name] = value; };
    add("hits", s.hits);
    add("misses", s.misses);
    add("puts", s.puts);
    add("deletes", s.deletes);
    add("evictions", s.evictions);
    add("expired", s.expired);
    add("demotions", s.demotions);
    add("entries", s.entries);
    add("corrupt", s.corrupt);
    add("loads", s.loads);
    add("load_bytes", s.load_bytes);
    add("dirty_bytes", s.dirty_bytes);
    add("reaped_clients", s.reaped_clients);
    add("reaped_pins", s.reaped_pins);
    add("reaped_blocks", s.reaped_blocks);
    add("rebuilt_shards", s.rebuilt_shards);
    add("rebuilt_policies", s.rebuilt_policies);
    add("rebuilt_allocators", s.rebuilt_allocators);
    add("pins", s.pins);
    add("reservations", s.reservations);
    add("clients", s.clients);
    add("index_bytes", s.index_bytes);
    d["debt_keys"] = s.debts.keys;
    d["debt_fill"] = s.debts.fill;
    d["debt_fp_rate"] = s.debts.fp_rate;
    add("memory_bytes", s.memory.total);
    add("memory_record_bytes", s.record_bytes);
    d["memory_utilisation"] = s.utilisation();
    d["memory_fragmentation"] = s.memory.fragmentation();
    add("memory_used_bytes", s.memory.used);
    add("memory_free_bytes", s.memory.free);
    add("memory_largest_free_bytes", s.memory.largest_free);
    add("memory_free_runs", s.memory.free_runs);
    add("allocator_faults", s.memory.faults);
    add("near_hits", self.near ? self.near->hits() : 0);
    add("near_values", self.near ? self.near->values() : 0);
    add("near_bytes", self.near ? self.near->bytes() : 0);
    return d;
}

std::shared_ptr<Store> seeded(std::shared_ptr<Store> store, std::optional<u32> seed) {
    if (seed) store->set_seed(*seed);
    return store;
}

template <class Open>
std::shared_ptr<StoreHandle> open_without_gil(Open&& open) {
    std::shared_ptr<Store> store;
    {
        const nb::gil_scoped_release free;
        store = open();
    }
    return std::make_shared<StoreHandle>(std::move(store));
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
        std::memcpy(start_of(value), pin.value(), size);
    } else {
        const std::shared_ptr<Store> kept = store;
        const nb::gil_scoped_release free;
        std::memcpy(start_of(value), pin.value(), size);
        pin = Pin();
    }
    return found;
}

std::optional<u64> put_at_once(const SpaceHandle& self, nb::handle key_object, const u8* value, size_t size) {
    const std::shared_ptr<Store> store = self.owner->live();  // kept: others may run, and close the cache
    const Key key = key_of(key_object);
    if (store->present_immutable(self.space, key)) return 0;
    auto reservation = store->reserve(self.space, key, size, {}, false);
    if (!reservation) return std::nullopt;
    const WithoutGil free(size);
    reservation->header.payload_crc = copy_crc32c(reservation->payload(), value, size, 0);
    return replaced(store->publish(*reservation), *reservation);
}

std::optional<Identity> identity_of(nb::handle object) {
    const PinHandle& handle = nb::cast<PinHandle&>(object);
    if (!handle.pin) return std::nullopt;
    return handle.store->identify(handle.pin);
}

void bind_store(nb::module_& m) {
    below_marker = new nb::object(nb::module_::import_("builtins").attr("object")());
    m.attr("BELOW") = *below_marker;
    loading_marker = new nb::object(nb::module_::import_("builtins").attr("object")());
    m.attr("LOADING") = *loading_marker;
    m.def("policy_names", [] {
        nb::list names;
        for (u32 i = 0; i < policy_count(); ++i) names.append(policy_by_number(i).name());
        return names;
    });
    m.def("copy_into", &copy_into, nb::arg("value"), nb::arg("out"));
    m.def("probe", [](const char* file) {
        const RegionProbe p = Region::probe(file);
        return nb::make_tuple(p.exists, p.ready, p.format, p.in_use, p.options.memory, p.options.disk);
    }, nb::arg("file"));

    nb::class_<PinHandle>(m, "Pin", nb::type_slots(pin_slots))
        .def("__enter__", [](nb::handle self) {
            return give_view(self, nb::cast<PinHandle&>(self).view);
        })
        .def("__exit__", [](PinHandle& self, nb::handle, nb::handle, nb::handle) { release_pin(self); },
             nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("release", &release_pin)
        .def("__len__", [](const PinHandle& self) -> size_t {
            if (!self.holds()) throw InvalidValue("this pin is released");
            return self.size();
        });
    m.def("local_pin", [](nb::handle value) {
        PinHandle handle;
        handle.local = std::make_shared<Buffer>(value);
        return nb::cast(std::move(handle));
    }, nb::arg("value"));

    nb::class_<WriteHandle>(m, "Write", nb::type_slots(write_slots))
        .def("view", [](nb::handle self) {
            return give_view(self, nb::cast<WriteHandle&>(self).view);
        })
        .def("publish", &commit_write)
        .def("commit", &commit_load)
        .def("abort", &abort_write);

    nb::class_<ClaimHandle>(m, "LoadClaim");

    nb::class_<DirtyHandle>(m, "DirtyRecord")
        .def_prop_ro("ns", [](const DirtyHandle& d) { return d.header.ns; })
        .def_prop_ro("key", [](const DirtyHandle& d) { return d.key; })
        .def_prop_ro("seq", [](const DirtyHandle& d) { return d.header.seq; })
        .def_prop_ro("expires", [](const DirtyHandle& d) { return d.header.expires; })
        .def_prop_ro("version", [](const DirtyHandle& d) { return d.header.version; })
        .def_prop_ro("epoch", [](const DirtyHandle& d) { return d.header.epoch; })
        .def_prop_ro("flags", &DirtyHandle::flags)
        .def_prop_ro("tags", &DirtyHandle::packed_tags)
        .def_prop_ro("stored_len", [](const DirtyHandle& d) { return d.header.stored_len; })
        .def_prop_ro("payload_offset", [](const DirtyHandle& d) { return u32{d.header.payload_offset}; })
        .def_prop_ro("length", &DirtyHandle::length)
        .def("encode", &DirtyHandle::encode, nb::arg("payload"), nb::kw_only(), nb::arg("codec"), nb::arg("seed"))
        .def_prop_ro("view", &view_dirty);

    nb::class_<SpaceHandle>(m, "Space")
        .def_prop_ro("id", [](const SpaceHandle& s) { return s.space.id; })
        .def_prop_ro("version", [](const SpaceHandle& s) { return s.space.version; })
        .def_prop_ro("epoch", [](const SpaceHandle& s) { return s.owner->live()->epoch(s.space); })
        .def_prop_ro("usage", [](const SpaceHandle& s) {
            const auto [records, bytes] = s.owner->live()->usage(s.space.id);
            return nb::make_tuple(records, bytes);
        })
        .def("get", &get, nb::arg("key").none())
        .def("get_into", &get_into, nb::arg("key").none(), nb::arg("out").none())
        .def("get_many", &get_many, nb::arg("keys").none(), nb::arg("out").none() = nb::none())
        .def("pin", &pin, nb::arg("key").none())
        .def("pin_many", &pin_many, nb::arg("keys").none(), nb::arg("uses") = true)
        .def("contains", [](const SpaceHandle& s, nb::handle key) { return s.owner->live()->contains(s.space, key_of(key)); },
             nb::arg("key").none())
        .def("contains_prefix", &contains_prefix, nb::arg("keys").none())
        .def("put", &put, nb::arg("key").none(), nb::arg("value").none(), nb::arg("ttl_ms") = 0, nb::arg("jitter") = 0.0f,
             nb::arg("cost") = 1.0f, nb::arg("tags").none() = nb::none())
        .def("put_pinned", &put_pinned, nb::arg("key").none(), nb::arg("value").none(), nb::arg("ttl_ms") = 0,
             nb::arg("jitter") = 0.0f, nb::arg("cost") = 1.0f, nb::arg("tags").none() = nb::none())
        .def("put_many", &put_many, nb::arg("keys").none(), nb::arg("values").none(), nb::arg("replaced"),
             nb::arg("ttl_ms") = 0, nb::arg("jitter") = 0.0f, nb::arg("cost") = 1.0f, nb::arg("tags").none() = nb::none())
        .def("reserve", &reserve, nb::arg("key").none(), nb::arg("nbytes"), nb::arg("ttl_ms") = 0, nb::arg("jitter") = 0.0f,
             nb::arg("cost") = 1.0f, nb::arg("tags").none() = nb::none(), nb::arg("depth") = 0)
        .def("present_immutable", [](const SpaceHandle& s, nb::handle key) {
            return s.owner->live()->present_immutable(s.space, key_of(key));
        }, nb::arg("key").none())
        .def("remove", [](const SpaceHandle& s, nb::handle key) {
            const auto removed = s.owner->live()->remove(s.space, key_of(key));
            return nb::make_tuple(removed.present, removed.on_disk);
        }, nb::arg("key").none())
        .def("remove_many", &remove_many, nb::arg("keys"))
        .def("remove_tag", [](const SpaceHandle& s, nb::handle tag) {
            const std::shared_ptr<Store> store = s.owner->live();
            const TagState state = store->remove_tag(s.space, key_of(tag));
            return nb::make_tuple(state.slot, state.seq);
        }, nb::arg("tag").none())
        .def("keys_of", &keys_of, nb::arg("shard"), nb::arg("prefix"))
        .def("hold", [](const SpaceHandle& s, nb::handle keys_object, u8 holder) {
            const std::shared_ptr<Store> store = s.owner->live();
            const Keys keys(keys_object);
            size_t held = 0;
            for (size_t i = 0; i < keys.size(); ++i) held += store->hold(s.space, keys[i], holder);
            return held;
        }, nb::arg("keys").none(), nb::arg("holder"))
        .def("let_go", [](const SpaceHandle& s, nb::handle keys_object, u8 holder) {
            const std::shared_ptr<Store> store = s.owner->live();
            const Keys keys(keys_object);
            size_t let_go = 0;
            for (size_t i = 0; i < keys.size(); ++i) let_go += store->let_go(s.space, keys[i], holder);
            return let_go;
        }, nb::arg("keys").none(), nb::arg("holder"))
        .def("records", &records, nb::arg("keys").none())
        .def("promote", &promote, nb::arg("key").none(), nb::arg("value"), nb::arg("expires"), nb::arg("written"), nb::arg("low"),
             nb::arg("epoch"))
        .def("last_changes", [](const SpaceHandle& s, nb::handle keys_object) {
            const std::shared_ptr<Store> store = s.owner->live();
            const Keys keys(keys_object);
            nb::list list;
            for (size_t i = 0; i < keys.size(); ++i) list.append(store->last_change(s.space, keys[i]));
            return list;
        }, nb::arg("keys").none())
        .def_prop_ro("moved_on", [](const SpaceHandle& s) {
            const std::shared_ptr<Store> store = s.owner->live();
            return store->current_space(s.space.id).version != s.space.version;
        })
        .def("change_all", [](const SpaceHandle& s) { s.owner->live()->change_all(s.space); })
        .def_prop_ro("last_change_of_all", [](const SpaceHandle& s) { return s.owner->live()->last_change_of_all(s.space); })
        .def("clear", [](const SpaceHandle& s) { return s.owner->live()->clear(s.space); })
        .def("promise", [](const SpaceHandle& s, nb::handle key, u64 ms, bool fetch) {
            return s.owner->live()->promise(s.space, key_of(key), ms, fetch ? Store::Promised::fetch : Store::Promised::compute);
        }, nb::arg("key").none(), nb::arg("ms"), nb::arg("fetch") = false)
        .def("withdraw", [](const SpaceHandle& s, nb::handle key, u64 token, bool fetch) {
            s.owner->live()->withdraw(s.space, key_of(key), token, fetch ? Store::Promised::fetch : Store::Promised::compute);
        }, nb::arg("key").none(), nb::arg("token"), nb::arg("fetch") = false)
        .def("wait_until_durable", [](const SpaceHandle& s, nb::handle keys_object, double timeout) {
            const std::shared_ptr<Store> store = s.owner->live();
            const Keys keys(keys_object);
            const nb::gil_scoped_release free;
            return store->wait_until_durable(s.space, keys.size(), keys.data(), timeout);
        }, nb::arg("keys").none(), nb::arg("timeout_s"));

    nb::class_<StoreHandle>(m, "Store")
        .def_static("open_private", [](u64 memory, u64 disk, std::optional<u32> seed) {
            return open_without_gil([&] { return seeded(Store::open_private({memory, disk}), seed); });
        }, nb::arg("memory"), nb::arg("disk") = 0, nb::arg("seed").none() = nb::none())
        .def_static("create_shared", [](const std::string& file, u64 memory, u64 disk, std::optional<u32> seed) {
            return open_without_gil([&] { return seeded(Store::create_shared(file, {memory, disk}), seed); });
        }, nb::arg("file"), nb::arg("memory"), nb::arg("disk") = 0, nb::arg("seed").none() = nb::none())
        .def_static("attach_shared", [](const std::string& file) {
            return open_without_gil([&] { return Store::attach_shared(file); });
        }, nb::arg("file"))
        .def("mark_ready", [](StoreHandle& self) { self.live()->mark_ready(); })
        .def("leave_to_parent", [](StoreHandle& self) {
            self.leave_to_parent();
        })
        .def("keep_near", [](StoreHandle& self, u64 bytes) {
            self.near.reset();
            if (bytes) self.near.emplace(bytes);
        }, nb::arg("nbytes"))
        .def("attach_again", [](StoreHandle& self) { self.store = self.live()->attach_again(); })
        .def("use_huge_pages", [](StoreHandle& self) {
            const std::shared_ptr<Store> store = self.live();
            const nb::gil_scoped_release free;
            store->use_huge_pages();
        })
        .def("close", [](StoreHandle& self) { self.close(); })
        .def_prop_ro("closed", [](const StoreHandle& self) { return !self.store; })
        .def("open_namespace", [](const std::shared_ptr<StoreHandle>& self, u32 id, const std::string& name, u32 version,
                                  const std::string& policy, u64 quota, u64 guarantee, bool immutable, u32 admission, bool write_back) {
            return SpaceHandle{self, self->live()->open_namespace(id, name, version, {policy, quota, guarantee, immutable, admission, write_back})};
        }, nb::arg("id"), nb::arg("name"), nb::arg("version"), nb::arg("policy"), nb::arg("quota"), nb::arg("guarantee"),
             nb::arg("immutable"), nb::arg("admission") = 1, nb::arg("write_back") = false)
        .def("restore_namespace", [](StoreHandle& self, u32 id, const std::string& name, u32 version, u32 epoch, bool immutable) {
            self.live()->restore_namespace(id, name, version, epoch, immutable);
        }, nb::arg("id"), nb::arg("name"), nb::arg("version"), nb::arg("epoch"), nb::arg("immutable"))
        .def("undurable_epoch", [](StoreHandle& self, u32 ns) { return self.live()->undurable_epoch(ns); }, nb::arg("ns"))
        .def("epoch_is_durable", [](StoreHandle& self, u32 ns, u32 epoch) { self.live()->epoch_is_durable(ns, epoch); },
             nb::arg("ns"), nb::arg("epoch"))
        .def("restore_tag", [](StoreHandle& self, u16 slot, u64 seq) { self.live()->restore_tag({slot, seq}); },
             nb::arg("slot"), nb::arg("seq"))
        .def_prop_ro("shards", [](StoreHandle& self) { return self.live()->shards(); })
        .def("open_holder", [](StoreHandle& self, const std::string& name, u64 limit) {
            return self.live()->open_holder(name, limit);
        }, nb::arg("name"), nb::arg("limit"))
        .def("let_go_of_all", [](StoreHandle& self, u8 holder) { self.live()->let_go_of_all(holder); }, nb::arg("holder"))
        .def("close_holder", [](StoreHandle& self, u8 holder) { self.live()->close_holder(holder); }, nb::arg("holder"))
        .def("holders", [](StoreHandle& self) {
            nb::list list;
            for (const HolderState& h : self.live()->holders()) list.append(nb::make_tuple(h.name, h.limit, h.bytes));
            return list;
        })
        .def("take_dirty", &take_dirty, nb::arg("max_records"), nb::arg("max_bytes"), nb::arg("timeout_s"))
        .def("wake_writer", [](StoreHandle& self) { self.live()->wake_writer(); })
        .def("still_live", [](StoreHandle& self, nb::list dirty) {
            nb::list live;
            for (nb::handle d : dirty) {
                const DirtyHandle& handle = nb::cast<DirtyHandle&>(d);
                live.append(handle.dirty && self.live()->still_live(*handle.dirty));
            }
            return live;
        }, nb::arg("records"))
        .def("mark_durable", [](StoreHandle&, nb::list dirty, u32 segment, nb::list offsets) {
            for (size_t i = 0; i < dirty.size(); ++i)
                settle(nb::cast<DirtyHandle&>(dirty[i]), segment, nb::cast<u64>(offsets[i]));
        }, nb::arg("records"), nb::arg("segment"), nb::arg("offsets"))
        .def("mark_failed", [](StoreHandle&, nb::list dirty) {
            for (nb::handle d : dirty) settle(nb::cast<DirtyHandle&>(d), 0, 0);
        }, nb::arg("records"))
        .def("wait_until_settled", [](StoreHandle& self, double timeout) {
            const std::shared_ptr<Store> store = self.live();
            const nb::gil_scoped_release free;
            return store->wait_until_settled(timeout);
        }, nb::arg("timeout_s"))
        .def("space", [](const std::shared_ptr<StoreHandle>& self, u32 ns) {
            return SpaceHandle{self, self->live()->current_space(ns)};
        }, nb::arg("ns"))
        .def("write_lazy", [](StoreHandle& self) { self.live()->write_lazy(); })
        .def("hottest", [](StoreHandle& self, size_t most) {
            const std::shared_ptr<Store> store = self.live();
            std::vector<Store::Used> used;
            {
                const nb::gil_scoped_release free;
                used = store->hottest(most);
            }
            nb::list list;
            for (const auto& one : used)
                list.append(nb::make_tuple(one.ns, nb::bytes(reinterpret_cast<const char*>(one.key.data()), one.key.size())));
            return list;
        }, nb::arg("most"))
        .def("demote_all", [](StoreHandle& self) { return self.live()->demote_all(); })
        .def("insert_disk", &insert_disk, nb::arg("rows"))
        .def("find_on_disk", &find_on_disk, nb::arg("ns"), nb::arg("keys"))
        .def("begin_load", &begin_load, nb::arg("ns"), nb::arg("key"), nb::arg("entry"), nb::arg("seq"), nb::arg("length"),
             nb::arg("take_over") = false, nb::arg("claim").none() = nb::none())
        .def("claim_load", &claim_load, nb::arg("entry"), nb::arg("seq"), nb::arg("take_over") = false)
        .def("forget_disk", [](StoreHandle& self, u32 ns, nb::handle key, u64 seq) {
            return self.live()->forget_disk(ns, key_of(key), seq);
        }, nb::arg("ns"), nb::arg("key"), nb::arg("seq"))
        .def("drop_segment", [](StoreHandle& self, u32 segment) { return self.live()->drop_segment(segment); },
             nb::arg("segment"))
        .def("segments_in_use", [](StoreHandle& self) {
            const std::shared_ptr<Store> store = self.live();
            std::vector<SegmentUse> found;
            {
                const nb::gil_scoped_release free;
                found = store->segments_in_use();
            }
            nb::list list;
            for (const auto& use : found)
                list.append(nb::make_tuple(use.segment, use.records, use.bytes, use.used_bytes, use.last_expiry));
            return list;
        })
        .def("rows_of", [](StoreHandle& self, u32 segment, bool used_only) {
            const std::shared_ptr<Store> store = self.live();
            std::vector<KeptRow> found;
            {
                const nb::gil_scoped_release free;
                found = store->rows_of(segment, used_only);
            }
            nb::list list;
            for (const auto& row : found)
                list.append(nb::make_tuple(row.ns, nb::bytes(reinterpret_cast<const char*>(row.key.data()), row.key.size()),
                                           row.seq, row.offset, row.length, row.version, row.epoch));
            return list;
        }, nb::arg("segment"), nb::arg("used_only"))
        .def("move_on_disk", [](StoreHandle& self, u32 ns, nb::handle key_object, u64 seq, u32 from, u64 from_offset, u32 to,
                                u64 offset) {
            const Key key = key_of(key_object);
            KeptRow row;
            row.ns = ns;
            row.key.assign(key.begin(), key.end());
            row.seq = seq;
            row.offset = from_offset;
            return self.live()->move_on_disk(row, from, to, offset);
        }, nb::arg("ns"), nb::arg("key"), nb::arg("seq"), nb::arg("from_segment"), nb::arg("from_offset"),
             nb::arg("to_segment"), nb::arg("to_offset"))
        .def("pay", [](StoreHandle& self, u32 ns, nb::handle keys_object) {
            const Keys keys(keys_object);
            for (size_t i = 0; i < keys.size(); ++i) self.live()->pay(ns, keys[i]);
        }, nb::arg("ns"), nb::arg("keys"))
        .def("raise_seq", [](StoreHandle& self, u64 above) { self.live()->raise_seq(above); }, nb::arg("above"))
        .def("next_seq", [](StoreHandle& self) { return self.live()->next_seq(); })
        .def("watch", [](StoreHandle& self) { self.live()->watch(); })
        .def("next_number", [](StoreHandle& self) { return self.live()->next_number(); })
        .def("set_unsent", [](StoreHandle& self, u64 from) { self.live()->set_unsent(from); }, nb::arg("number"))
        .def("low", [](StoreHandle& self) { return self.live()->low(); })
        .def("distrust", [](StoreHandle& self, u64 before) { self.live()->distrust(before); }, nb::arg("written_before"))
        .def("distrusted", [](StoreHandle& self) { return self.live()->distrusted(); })
        .def("count_corrupt", [](StoreHandle& self) { self.live()->count_corrupt(); })
        .def_prop_ro("seed", [](StoreHandle& self) { return self.live()->seed(); })
        .def("reap", [](StoreHandle& self) { return self.live()->reap(); })
        .def("alone", [](StoreHandle& self) { return self.live()->alone(); })
        .def("stats", &stats);
}

}  // namespace kvstrata
