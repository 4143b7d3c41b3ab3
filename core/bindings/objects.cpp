// A cache of Python objects over records: the part of kvstrata.objects that has to be quick.
//
// Written against CPython's own interface: a call through nanobind costs about as much as all that is done here. The
// objects lie in a cachebox, each in a slot that says which record it was made from; one is handed out only after the
// store was asked, without a lock, whether that record is still what the key has. Everything here holds the GIL.
#include "heap_types.hpp"

#include <cstddef>

namespace kvstrata {
namespace {

// ---- Slots ----------------------------------------------------------------------------------------

struct Slot {
    PyObject_HEAD
    PyObject* value;
    Identity identity;
    u32 stamp;  // when the record was last told of a use
};

PyTypeObject* slot_type = nullptr;

int traverse_slot(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(reinterpret_cast<Slot*>(self)->value);
    return 0;
}

int clear_slot(PyObject* self) {
    Py_CLEAR(reinterpret_cast<Slot*>(self)->value);
    return 0;
}

PyType_Slot slot_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse_slot)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_slot)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate<clear_slot>)},
    {0, nullptr},
};
PyType_Spec slot_spec = {"kvstrata._core.ObjectSlot", sizeof(Slot), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, slot_slots};

// ---- The layer ------------------------------------------------------------------------------------

struct Layer {
    PyObject_HEAD
    PyObject* cache;  // a mapping, of cachebox: key -> Slot
    PyObject* space;  // the kvstrata._core.Space, which keeps `handle`
    const SpaceHandle* handle;
    unsigned long long hits;
};

PyObject* name_of_fetch = nullptr;

Layer* layer(PyObject* self) { return reinterpret_cast<Layer*>(self); }

int traverse_layer(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(layer(self)->cache);
    Py_VISIT(layer(self)->space);
    return 0;
}

int clear_layer(PyObject* self) {
    layer(self)->handle = nullptr;
    Py_CLEAR(layer(self)->cache);
    Py_CLEAR(layer(self)->space);
    return 0;
}

bool bind_to(PyObject* self, PyObject* space) {
    const SpaceHandle* handle = nullptr;
    if (!nb::try_cast<const SpaceHandle*>(nb::handle(space), handle) || !handle) {
        PyErr_Format(PyExc_TypeError, "a namespace's native part is needed, not %s", Py_TYPE(space)->tp_name);
        return false;
    }
    Py_INCREF(space);
    layer(self)->handle = handle;
    Py_XSETREF(layer(self)->space, space);
    return true;
}

int init_layer(PyObject* self, PyObject* args, PyObject* kwargs) {
    static const char* names[] = {"cache", "space", nullptr};
    PyObject *cache, *space;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", const_cast<char**>(names), &cache, &space)) return -1;
    if (!bind_to(self, space)) return -1;
    Py_INCREF(cache);
    Py_XSETREF(layer(self)->cache, cache);
    return 0;
}

// What is kept under the key, if it is still true; a new reference. Null without an exception when there is nothing.
PyObject* find(Layer* self, PyObject* key) {
    if (!self->cache) return nullptr;
    PyObject* const kept = PyObject_GetItem(self->cache, key);
    if (!kept) {
        // A key that can't be hashed isn't there either; what else is wrong with it the namespace says.
        if (PyErr_ExceptionMatches(PyExc_KeyError) || PyErr_ExceptionMatches(PyExc_TypeError)) PyErr_Clear();
        return nullptr;
    }
    PyObject* value = nullptr;
    Store* const store = self->handle ? self->handle->owner->store.get() : nullptr;
    if (Py_IS_TYPE(kept, slot_type) && store && !store->left_to_parent()) {
        Slot* const slot = reinterpret_cast<Slot*>(kept);
        if (slot->value && store->holds(self->handle->space, slot->identity)) {
            value = Py_NewRef(slot->value);
            ++self->hits;
            if (store->fades(self->handle->space, slot->stamp)) {
                try {
                    slot->stamp = store->refresh(self->handle->space, slot->identity);
                } catch (const std::exception&) {
                    // A lock that can't be had: this use doesn't count.
                }
            }
        }
    }
    Py_DECREF(kept);
    return value;
}

PyObject* get(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    PyObject* fallback = Py_None;
    const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    if (count == 2 && !named) {
        fallback = args[1];
    } else if (count == 1 && named == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "default") == 0) {
        fallback = args[1];
    } else if (count != 1 || named) {
        PyErr_SetString(PyExc_TypeError, "get() takes a key and a default");
        return nullptr;
    }
    PyObject* const value = find(layer(self), args[0]);
    if (value || PyErr_Occurred()) return value;
    return PyObject_CallMethodObjArgs(self, name_of_fetch, args[0], fallback, nullptr);
}

PyObject* find_method(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "find() takes a key and a default");
        return nullptr;
    }
    PyObject* const value = find(layer(self), args[0]);
    return value || PyErr_Occurred() ? value : Py_NewRef(args[1]);
}

PyObject* keep(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "keep() takes a key, a value and a pin");
        return nullptr;
    }
    std::optional<Identity> identity;
    try {
        identity = identity_of(args[2]);
    } catch (const std::exception&) {
        PyErr_SetString(PyExc_TypeError, "keep() needs a pin");
        return nullptr;
    }
    Store* const store = layer(self)->handle ? layer(self)->handle->owner->store.get() : nullptr;
    if (!identity || !layer(self)->cache || !store) Py_RETURN_FALSE;
    PyObject* const made = slot_type->tp_alloc(slot_type, 0);
    if (!made) return nullptr;
    Slot* const slot = reinterpret_cast<Slot*>(made);
    slot->value = Py_NewRef(args[1]);
    slot->identity = *identity;
    slot->stamp = store->tick();
    const int failed = PyObject_SetItem(layer(self)->cache, args[0], made);
    Py_DECREF(made);
    if (failed) return nullptr;
    Py_RETURN_TRUE;
}

PyObject* bind(PyObject* self, PyObject* space) {
    if (!bind_to(self, space)) return nullptr;
    Py_RETURN_NONE;
}

PyObject* hits(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(layer(self)->hits); }

PyMethodDef layer_methods[] = {
    {"get", method(get), METH_FASTCALL | METH_KEYWORDS,
     "get($self, key, default=None)\n--\n\nReturn the object, or `default`. It is shared: it must not be changed."},
    {"find", method(find_method), METH_FASTCALL,
     "find($self, key, default, /)\n--\n\nReturn the object if this process has it already and it is still true, or `default`."},
    {"keep", method(keep), METH_FASTCALL,
     "keep($self, key, value, pin, /)\n--\n\nKeep an object that was made from the record that `pin` holds; returns whether it is."},
    {"bind", method(bind), METH_O, "bind($self, space, /)\n--\n\nAsk this native namespace from now on, after a fork."},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef layer_properties[] = {
    {"hits", hits, nullptr, "How many objects were handed out as they were.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot layer_slots[] = {
    {Py_tp_doc, const_cast<char*>("Objects made from records, each handed out only while its record is what its key has.\n\n"
                                  "A subclass has `_fetch(key, default)`, for what isn't here.")},
    {Py_tp_init, reinterpret_cast<void*>(init_layer)},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse_layer)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_layer)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate<clear_layer>)},
    {Py_tp_methods, layer_methods},
    {Py_tp_getset, layer_properties},
    {0, nullptr},
};
PyType_Spec layer_spec = {"kvstrata._core.ObjectLayer", sizeof(Layer), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, layer_slots};

}  // namespace

void bind_objects(nb::module_& m) {
    PyObject* const slots = PyType_FromSpec(&slot_spec);
    if (!slots) throw nb::python_error();
    slot_type = reinterpret_cast<PyTypeObject*>(slots);
    name_of_fetch = PyUnicode_InternFromString("_fetch");
    if (!name_of_fetch) throw nb::python_error();
    nb::object layers = nb::steal(PyType_FromSpec(&layer_spec));
    if (!layers.is_valid()) throw nb::python_error();
    m.attr("ObjectLayer") = layers;
}

}  // namespace kvstrata
