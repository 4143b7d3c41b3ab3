// What types share that are written against CPython's own interface, because they have to be quick.
#pragma once

#include "bindings.hpp"

namespace kvstrata {

// The destructor of a type with garbage collection; `clear` lets go of what an object refers to.
template <int (*clear)(PyObject*)>
void deallocate(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

// A method as its table wants it, whatever its calling convention.
template <class Function>
PyCFunction method(Function function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace kvstrata
