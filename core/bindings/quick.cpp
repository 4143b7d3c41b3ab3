// Namespace.get and Namespace.put for the plain case: a value that is in memory, or bytes to be put there, without options.
//
// Written against CPython's own interface: a call through nanobind, and one more in Python, take as long as all that is done
// here. Everything else, and whatever goes wrong, is left to the subclass's `_get` and `_put`, which begin anew.
#include "heap_types.hpp"

namespace kvstrata {
namespace {

struct Verbs {
    PyObject_HEAD
    PyObject* space;            // the kvstrata._core.Space, which keeps `handle`, or what stands for one
    const SpaceHandle* handle;  // null where something else stands for it
    char gets, puts;            // whether the plain case is all there is
};

PyObject *name_of_get = nullptr, *name_of_put = nullptr, *name_of_replaced = nullptr;

Verbs* verbs(PyObject* self) { return reinterpret_cast<Verbs*>(self); }

int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(verbs(self)->space);
    return 0;
}

int clear(PyObject* self) {
    verbs(self)->handle = nullptr;
    Py_CLEAR(verbs(self)->space);
    return 0;
}

PyObject* space(PyObject* self, void*) {
    if (verbs(self)->space) return Py_NewRef(verbs(self)->space);
    PyErr_SetString(PyExc_AttributeError, "_space");
    return nullptr;
}

int set_space(PyObject* self, PyObject* space, void*) {
    const SpaceHandle* handle = nullptr;
    if (space && !nb::try_cast<const SpaceHandle*>(nb::handle(space), handle)) handle = nullptr;
    verbs(self)->handle = handle;
    Py_XINCREF(space);
    Py_XSETREF(verbs(self)->space, space);
    return 0;
}

// The store that may be asked at once; null where there is none, or it is the parent's.
Store* store_of(const Verbs* self) {
    Store* const store = self->handle ? self->handle->owner->store.get() : nullptr;
    return store && !store->left_to_parent() ? store : nullptr;
}

// Calls the subclass's own method with the same arguments.
PyObject* otherwise(PyObject* self, PyObject* name, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    PyObject* const method = PyObject_GetAttr(self, name);
    if (!method) return nullptr;
    PyObject* const result = PyObject_Vectorcall(method, args, static_cast<size_t>(count), names);
    Py_DECREF(method);
    return result;
}

PyObject* get(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    if (verbs(self)->gets && !names && (count == 1 || count == 2) && store_of(verbs(self))) {
        try {
            StoreHandle& owner = *verbs(self)->handle->owner;
            const Space space = verbs(self)->handle->space;
            const Identity* identity;
            if (PyObject* const kept = owner.near ? owner.near->find(*owner.store, space, args[0], identity) : nullptr) {
                owner.gather(space).count(*identity);
                return Py_NewRef(kept);
            }
            nb::object value;
            const Lookup found = read_value(*verbs(self)->handle, args[0], value);
            if (found == Lookup::hit) return value.release().ptr();
            if (found == Lookup::miss) return Py_NewRef(count == 2 ? args[1] : Py_None);
        } catch (...) {
            PyErr_Clear();
        }
    }
    return otherwise(self, name_of_get, args, count, names);
}

// Has the older record deleted below.
PyObject* replaced(PyObject* self, PyObject* key, u64 seq) {
    PyObject* const number = PyLong_FromUnsignedLongLong(seq);
    if (!number) return nullptr;
    PyObject* const result = PyObject_CallMethodObjArgs(self, name_of_replaced, key, number, nullptr);
    Py_DECREF(number);
    return result;
}

PyObject* put(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    if (verbs(self)->puts && !names && count == 2 && PyBytes_Check(args[1]) && store_of(verbs(self))) {
        try {
            const u8* const value = reinterpret_cast<const u8*>(PyBytes_AS_STRING(args[1]));
            const auto done = put_at_once(*verbs(self)->handle, args[0], value, static_cast<size_t>(PyBytes_GET_SIZE(args[1])));
            if (done) return *done ? replaced(self, args[0], *done) : Py_NewRef(Py_None);
        } catch (...) {
            PyErr_Clear();
        }
    }
    return otherwise(self, name_of_put, args, count, names);
}

PyObject* set_plain(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "_set_plain() takes two booleans");
        return nullptr;
    }
    verbs(self)->gets = static_cast<char>(PyObject_IsTrue(args[0]) == 1);
    verbs(self)->puts = static_cast<char>(PyObject_IsTrue(args[1]) == 1);
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"get", method(get), METH_FASTCALL | METH_KEYWORDS,
     "get($self, key, default=None, *, out=None)\n--\n\n"
     "Return the value as bytes, or `default`; with `out`, a writable buffer, a memoryview of its filled part."},
    {"put", method(put), METH_FASTCALL | METH_KEYWORDS,
     "put($self, key, value, *, ttl=None, cost=None, tags=None)\n--\n\n"
     "Store a value: bytes-like, an array or a tensor on the CPU; its bytes are copied once.\n\n"
     "`ttl` is in seconds and overrides the namespace's; `cost` says how much it takes to compute the value again,\n"
     "in any unit. `tags`, four at most, are for `delete_tag`. In an immutable namespace a key that is there already\n"
     "stays as it is. Raises TierFull when the value can't be stored."},
    {"_set_plain", method(set_plain), METH_FASTCALL,
     "_set_plain($self, gets, puts, /)\n--\n\nSay whether a get, and a put without options, concern the memory tier only."},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef properties[] = {
    {"_space", space, set_space, "The native part, or what stands for it.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("The verbs of a namespace that have to be quick.\n\n"
                                  "A subclass has `_get` and `_put` with the same arguments, for all but the plain case, and\n"
                                  "`_replaced(key, seq)`, for when an older record may lie below.")},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate<clear>)},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, nullptr},
};
PyType_Spec spec = {"kvstrata._core.QuickVerbs", sizeof(Verbs), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

void bind_quick(nb::module_& m) {
    name_of_get = PyUnicode_InternFromString("_get");
    name_of_put = PyUnicode_InternFromString("_put");
    name_of_replaced = PyUnicode_InternFromString("_replaced");
    if (!name_of_get || !name_of_put || !name_of_replaced) throw nb::python_error();
    nb::object type = nb::steal(PyType_FromSpec(&spec));
    if (!type.is_valid()) throw nb::python_error();
    m.attr("QuickVerbs") = type;
}

}  // namespace kvstrata
