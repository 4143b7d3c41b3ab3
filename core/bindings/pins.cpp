#include "pins.hpp"

#include <nanobind/stl/optional.h>

#include "base/crc32c.hpp"

namespace kvstrata {

nb::object view_of(nb::handle object) {
    PyObject* view = PyMemoryView_FromObject(object.ptr());
    if (!view) throw nb::python_error();
    return nb::steal(view);
}

nb::object pin_object(const std::shared_ptr<Store>& store, Pin&& pin, bool whole_record) {
    PinHandle handle;
    handle.store = store;
    handle.pin = std::move(pin);
    handle.whole_record = whole_record;
    return nb::cast(std::move(handle));
}

u64 replaced(Published published, const Reservation& reservation) {
    return published == Published::replaced_on_disk ? reservation.header.seq : 0;
}

namespace {

const char* const kNothingHeld = "this pin is released, or another process's";

int export_pin(PyObject* self, Py_buffer* buffer, int flags) {
    PinHandle* pin = nb::inst_ptr<PinHandle>(self);
    if (!pin->holds()) {
        PyErr_SetString(PyExc_ValueError, kNothingHeld);
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

nb::object commit_load(WriteHandle& write, std::optional<u32> payload_crc) {
    if (write.finished || !write.loading) throw InvalidValue("this load is finished");
    end_view(write.view);
    Pin pin;
    {
        const WithoutGil free(payload_crc ? 0 : write.size());
        pin = write.store->commit_load(*write.loading, payload_crc);
    }
    write.finish();
    return pin ? pin_object(write.store, std::move(pin)) : nb::none();
}

}  // namespace

std::optional<Identity> identity_of(nb::handle object) {
    const PinHandle& handle = nb::cast<PinHandle&>(object);
    if (!handle.pin || !handle.holds()) return std::nullopt;
    return handle.store->identify(handle.pin);
}

void bind_pins(nb::module_& m) {
    nb::class_<PinHandle>(m, "Pin", nb::type_slots(pin_slots))
        .def("__enter__", [](nb::handle self) {
            return give_view(self, nb::cast<PinHandle&>(self).view);
        })
        .def("__exit__", [](PinHandle& self, nb::handle, nb::handle, nb::handle) { release_pin(self); },
             nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("release", &release_pin)
        .def("__len__", [](const PinHandle& self) -> size_t {
            if (!self.holds()) throw InvalidValue(kNothingHeld);
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
        .def("commit", &commit_load, nb::arg("payload_crc") = nb::none())
        .def("abort", &abort_write);
}

}  // namespace kvstrata
