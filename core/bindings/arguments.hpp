// What Python gives to the verbs: keys, values, buffers to be filled, and options of a put.
#pragma once

#include <cstring>
#include <random>

#include "bindings.hpp"
#include "base/clock.hpp"

namespace kvstrata {

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
inline bool holds_addresses(const char* format) {
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

inline PutOptions put_options(const Store& store, const Space& space, const TimeToLive& ttl, float cost, nb::handle tags) {
    PutOptions options{ttl.expires(), cost, 0, {}};
    if (tags.is_none()) return options;
    const Keys names(tags);
    if (names.size() > kTags) throw InvalidValue("a record has at most " + std::to_string(kTags) + " tags");
    for (size_t i = 0; i < names.size(); ++i) options.tags[i] = store.tag_slot(space.id, names[i]);
    return options;
}

}  // namespace kvstrata
