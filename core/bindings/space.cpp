// A namespace as Python sees it, and its verbs that write. Keys are looked up in a snapshot of the caller's sequence, and
// bytes are copied without the GIL.
#include <deque>

#include <nanobind/stl/optional.h>

#include "arguments.hpp"
#include "pins.hpp"
#include "base/crc32c.hpp"

namespace kvstrata {
namespace {

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

}  // namespace

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

void bind_space(nb::module_& m) {
    nb::class_<SpaceHandle> space(m, "Space");
    bind_reading(m, space);
    space
        .def_prop_ro("id", [](const SpaceHandle& s) { return s.space.id; })
        .def_prop_ro("version", [](const SpaceHandle& s) { return s.space.version; })
        .def_prop_ro("epoch", [](const SpaceHandle& s) { return s.owner->live()->epoch(s.space); })
        .def_prop_ro("usage", [](const SpaceHandle& s) {
            const auto [records, bytes] = s.owner->live()->usage(s.space.id);
            return nb::make_tuple(records, bytes);
        })
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
}

}  // namespace kvstrata
