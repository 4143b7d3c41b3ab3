// Small values that were read before, as the bytes objects that were made of them: in front of the memory tier, for one
// process. A get of one of them copies nothing.
//
// A table of sets of four, found by the hash that Python keeps in a key. Each value goes with the record that it is of, and
// is handed out only after the store was asked, without a lock, whether that record is still what the key has: so whoever
// overwrites, deletes, clears, bumps the version or evicts, in any process, takes it from everybody, as does its expiry. Once
// its set or the table is full, a value has to be read twice, before another key of the set is, to take the place of another;
// so what is read once passes by, and does no more than it did without the table. Everything here holds the GIL.
#pragma once

#include <Python.h>

#include <memory>

#include "store/store.hpp"

namespace kvstrata {

class NearCache {
public:
    static constexpr size_t kLargest = 4096;  // bytes of a value

    explicit NearCache(u64 limit) : limit_(limit) {}  // bytes, what the table takes included; 0: keep nothing
    ~NearCache() { clear(); }
    NearCache(const NearCache&) = delete;
    NearCache& operator=(const NearCache&) = delete;

    // The value under the key if it is still true, as a borrowed reference, and of which record it is; null else.
    PyObject* find(const Store& store, Space space, PyObject* key, const Identity*& identity);
    // Asks for what find() will touch.
    void prefetch(Space space, PyObject* key) const;
    // Offers the value of a record, an object of type bytes, that was just read under the key.
    void offer(Space space, PyObject* key, PyObject* value, const Identity& identity);
    void clear();

    u64 bytes() const { return bytes_; }
    u64 values() const { return values_; }
    u64 hits() const { return hits_; }

private:
    static constexpr u32 kWays = 4;
    struct Way {
        PyObject *key = nullptr, *value = nullptr;
        Identity identity;
    };
    struct alignas(64) Set {
        u32 tags[kWays] = {};
        u32 candidate = 0;  // the tag of the last that was offered and found no place
        u32 next = 0;       // the way whose turn it is to go
        u32 spaces[kWays] = {};
        u32 used = 0;       // a bit for each way that was found since its turn
    };
    struct Place {
        u64 set;
        u32 tag, space;
    };
    Place place_of(Space space, PyObject* key) const;
    u32 way_of(const Place& place, PyObject* key) const;  // kWays where it isn't there
    static bool may_be_key(PyObject* key) { return PyBytes_CheckExact(key) || PyUnicode_CheckExact(key); }
    static bool same(PyObject* one, PyObject* other);
    bool make_table();
    void drop(u64 set, u32 way);

    u64 limit_, bytes_ = 0, values_ = 0, hits_ = 0;
    u64 mask_ = 0;   // sets less one
    u64 hand_ = 0;   // the set from which values leave next, where they are too many bytes
    std::unique_ptr<Set[]> sets_;
    std::unique_ptr<Way[]> ways_;
};

}  // namespace kvstrata
