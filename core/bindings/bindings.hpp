// Shared by all files here; module.cpp has records, errors and the module.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <optional>

#include "near.hpp"
#include "base/errors.hpp"
#include "store/store.hpp"

namespace kvstrata {

namespace nb = nanobind;

inline constexpr size_t kAhead = 16;            // records whose memory is fetched ahead
inline constexpr size_t kWorthASwitch = 65536;  // bytes worked on, from which letting other threads run pays

// The bytes of any object with a contiguous buffer. Released with the GIL held.
class Buffer {
public:
    explicit Buffer(nb::handle object, bool writable = false) {
        if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
            throw nb::python_error();
    }
    ~Buffer() { PyBuffer_Release(&view_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    u8* data() const { return static_cast<u8*>(view_.buf); }
    size_t size() const { return static_cast<size_t>(view_.len); }

private:
    Py_buffer view_;
};

// Lets other threads run while more bytes are worked on than a switch is worth.
class WithoutGil {
public:
    explicit WithoutGil(size_t bytes) {
        if (bytes >= kWorthASwitch) released_.emplace();
    }

private:
    std::optional<nb::gil_scoped_release> released_;
};

// The bytes of a key: bytes, or the UTF-8 of a str. Valid while the object lives.
Key key_of(nb::handle object);

// The record that a raw one becomes with that payload in place of its value, and with other numbers where some are given.
nb::bytes encode_record(nb::handle raw, nb::handle payload, u8 codec, u32 seed, std::optional<u32> ns, std::optional<u32> version,
                        std::optional<u32> epoch, std::optional<u64> seq);

// What Python holds; empty once it is closed.
struct StoreHandle {
    explicit StoreHandle(std::shared_ptr<Store> opened) : store(std::move(opened)) {}
    std::shared_ptr<Store> store;
    std::optional<NearCache> near;  // nothing: values are always copied

    // For all but single gets: what these have gathered is told first, so that nobody here sees that it was gathered.
    const std::shared_ptr<Store>& live() {
        if (!store) throw CacheClosed("this cache is closed");
        gathered_.reset();
        return store;
    }
    // The policy is told of single gets when there are a few: to lock it, and to wait for what a record's neighbours in
    // the order are, takes as long as the get.
    Uses& gather(Space space) {
        if (!gathered_ || gathered_->count() >= kGathered || !gathered_->of(space)) gathered_.emplace(*store, space);
        return *gathered_;
    }
    void leave_to_parent() {
        if (gathered_) gathered_->forget();
        if (store) store->leave_to_parent();
    }
    void close() {
        gathered_.reset();
        near.reset();
        store.reset();
    }

private:
    static constexpr u32 kGathered = Uses::kMost;
    std::optional<Uses> gathered_;  // guarded by the GIL; goes before the store
};

struct SpaceHandle {
    std::shared_ptr<StoreHandle> owner;
    Space space;
};

// A lookup whose value, on a hit, is copied into new bytes.
Lookup read_value(const SpaceHandle& space, nb::handle key, nb::object& value);
// A put without options, and what it returns; nothing where it would have to wait, which it doesn't.
std::optional<u64> put_at_once(const SpaceHandle& space, nb::handle key, const u8* value, size_t size);

// Which record a kvstrata._core.Pin holds; nothing when it is released, or of a value in private memory.
std::optional<Identity> identity_of(nb::handle pin);

void bind_bloom(nb::module_& m);
void bind_codecs(nb::module_& m);
void bind_io(nb::module_& m);
void bind_layers(nb::module_& m);
void bind_objects(nb::module_& m);
void bind_quick(nb::module_& m);
void bind_reading(nb::module_& m, nb::class_<SpaceHandle>& space);
void bind_space(nb::module_& m);
void bind_store(nb::module_& m);
void bind_simulator(nb::module_& m);

}  // namespace kvstrata
