#include "near.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace kvstrata {
namespace {

constexpr u64 kUsualValue = 512;  // bytes; a table has a place for each as many
constexpr u64 kFewestSets = 16;

// About the bytes that an object of type bytes or str takes. Of a str that isn't ASCII Python keeps the UTF-8 beside it, once
// it was asked for: up to four bytes for each character.
u64 size_of(PyObject* object) {
    constexpr Py_ssize_t kHead = 48, kUtf8 = 4;
    if (PyBytes_CheckExact(object)) return static_cast<u64>(kHead + PyBytes_GET_SIZE(object));
    const Py_ssize_t each = PyUnicode_IS_ASCII(object) ? 1 : static_cast<Py_ssize_t>(PyUnicode_KIND(object)) + kUtf8;
    return static_cast<u64>(kHead + PyUnicode_GET_LENGTH(object) * each);
}

}  // namespace

NearCache::Place NearCache::place_of(Space space, PyObject* key) const {
    const auto kept = static_cast<u64>(PyObject_Hash(key));  // by Python, in the object
    const u64 hash = (kept ^ u64{space.id} << 17) * 0x9E3779B97F4A7C15u;
    return {(hash >> 32) & mask_, static_cast<u32>(hash) | 1, space.id};
}

u32 NearCache::way_of(const Place& place, PyObject* key) const {
    const Set& set = sets_[place.set];
    u32 way = 0;
    while (way < kWays && !(set.tags[way] == place.tag && set.spaces[way] == place.space && same(ways_[place.set * kWays + way].key, key)))
        ++way;
    return way;
}

bool NearCache::same(PyObject* one, PyObject* other) {
    if (one == other) return true;
    if (Py_TYPE(one) != Py_TYPE(other)) return false;
    if (PyUnicode_CheckExact(one)) return PyUnicode_Compare(one, other) == 0;
    const Py_ssize_t size = PyBytes_GET_SIZE(one);
    return size == PyBytes_GET_SIZE(other) &&
           std::memcmp(PyBytes_AS_STRING(one), PyBytes_AS_STRING(other), static_cast<size_t>(size)) == 0;
}

void NearCache::prefetch(Space space, PyObject* key) const {
    if (!sets_ || !may_be_key(key)) return;
    const u64 set = place_of(space, key).set;
    __builtin_prefetch(&sets_[set]);
    for (u32 way = 0; way < kWays; ++way) __builtin_prefetch(&ways_[set * kWays + way]);
}

PyObject* NearCache::find(const Store& store, Space space, PyObject* key, const Identity*& identity) {
    if (!sets_ || !may_be_key(key)) return nullptr;
    const Place place = place_of(space, key);
    const u32 i = way_of(place, key);
    if (i == kWays) return nullptr;
    const Way& way = ways_[place.set * kWays + i];
    if (!store.holds(space, way.identity)) {
        drop(place.set, i);
        return nullptr;
    }
    Set& set = sets_[place.set];
    if (!(set.used & 1u << i)) set.used |= 1u << i;
    identity = &way.identity;
    ++hits_;
    return way.value;
}

bool NearCache::make_table() {
    constexpr u64 kSetBytes = sizeof(Set) + kWays * sizeof(Way);
    const u64 sets = std::bit_floor(std::max(kFewestSets, limit_ / (kWays * kUsualValue + kSetBytes)));
    if (sets * kSetBytes >= limit_) limit_ = 0;  // too little to be of use
    if (!limit_) return false;
    sets_.reset(new (std::nothrow) Set[sets]);
    ways_.reset(new (std::nothrow) Way[sets * kWays]);
    if (!sets_ || !ways_) {
        sets_.reset();
        limit_ = 0;
        return false;
    }
    mask_ = sets - 1;
    bytes_ = sets * kSetBytes;
    return true;
}

void NearCache::offer(Space space, PyObject* key, PyObject* value, const Identity& identity) {
    if (!limit_ || !may_be_key(key) || PyBytes_GET_SIZE(value) > static_cast<Py_ssize_t>(kLargest)) return;
    if (!sets_ && !make_table()) return;
    const Place place = place_of(space, key);
    Set& set = sets_[place.set];
    const u64 size = size_of(key) + size_of(value);
    u32 i = way_of(place, key);
    if (i == kWays) {
        i = static_cast<u32>(std::find(set.tags, set.tags + kWays, 0u) - set.tags);
        if ((i == kWays || bytes_ + size > limit_) && set.candidate != place.tag) {
            set.candidate = place.tag;
            return;
        }
    }
    if (i == kWays) {
        for (i = set.next; set.used & 1u << i; i = (i + 1) % kWays) set.used &= ~(1u << i);
        set.next = (i + 1) % kWays;
    }
    if (set.tags[i]) drop(place.set, i);
    for (u64 looked_at = 0; bytes_ + size > limit_ && looked_at <= 2 * mask_; ++looked_at, hand_ = (hand_ + 1) & mask_) {
        for (u32 way = 0; way < kWays; ++way)
            if (sets_[hand_].tags[way] && !(sets_[hand_].used & 1u << way)) drop(hand_, way);
        sets_[hand_].used = 0;
    }
    if (bytes_ + size > limit_) return;
    Way& way = ways_[place.set * kWays + i];
    way.key = Py_NewRef(key);
    way.value = Py_NewRef(value);
    way.identity = identity;
    set.tags[i] = place.tag;
    set.spaces[i] = space.id;
    bytes_ += size;
    ++values_;
}

void NearCache::drop(u64 set, u32 way) {
    Way& old = ways_[set * kWays + way];
    bytes_ -= size_of(old.key) + size_of(old.value);
    --values_;
    sets_[set].tags[way] = 0;
    sets_[set].used &= ~(1u << way);
    Py_DECREF(old.key);  // of exact types: nothing else runs
    Py_DECREF(old.value);
    old.key = old.value = nullptr;
}

void NearCache::clear() {
    for (u64 set = 0; sets_ && set <= mask_; ++set)
        for (u32 way = 0; way < kWays; ++way)
            if (sets_[set].tags[way]) drop(set, way);
    sets_.reset();
    ways_.reset();
    bytes_ = values_ = 0;
}

}  // namespace kvstrata
