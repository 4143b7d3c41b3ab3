#include "tiers.hpp"

#include <nanobind/stl/optional.h>

#include "arguments.hpp"
#include "pins.hpp"

namespace kvstrata {
namespace {

nb::object* loading_marker = nullptr;  // what begin_load returns for a record that somebody else is bringing up

// That this process brings a record up, before it is known how much memory that takes.
struct ClaimHandle {
    std::shared_ptr<Store> store;
    LoadClaim claim;
};

nb::list take_dirty(StoreHandle& self, size_t most, u64 most_bytes, double timeout, double gather) {
    const std::shared_ptr<Store> store = self.live();
    std::vector<Dirty> taken;
    {
        const nb::gil_scoped_release free;
        taken = store->take_dirty(most, most_bytes, timeout, gather);
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

nb::object view_dirty(DirtyHandle& self) {
    if (!self.dirty) throw InvalidValue("this record is settled");
    if (self.encoded.is_valid()) return view_of(self.encoded);
    const Pin& pin = self.dirty->pin;
    PyObject* view = PyMemoryView_FromMemory(reinterpret_cast<char*>(const_cast<u8*>(pin.record())),
                                             static_cast<Py_ssize_t>(pin.record_size()), PyBUF_READ);
    if (!view) throw nb::python_error();
    return nb::steal(view);
}

// Settles those that aren't yet; with offsets, as durable. Others may run while it waits for a lock. When it can't be had, those
// that are left stay as they are.
void settle(nb::list records, u32 segment = 0, const nb::list* offsets = nullptr, bool postponed = false) {
    struct Settling {
        nb::object record;
        DirtyHandle* handle;
        Dirty dirty;  // nobody else can settle it meanwhile
        u64 offset, encoded;
    };
    std::vector<Settling> all;
    for (size_t i = 0; i < records.size(); ++i) {
        DirtyHandle& handle = nb::cast<DirtyHandle&>(records[i]);
        if (!handle.dirty) continue;
        const u64 offset = offsets ? nb::cast<u64>((*offsets)[i]) : 0, encoded = handle.encoded.is_valid() ? handle.length() : 0;
        all.push_back({nb::borrow(records[i]), &handle, std::move(*handle.dirty), offset, encoded});
        handle.dirty.reset();
    }
    size_t done = 0;
    try {
        const nb::gil_scoped_release free;
        for (; done < all.size(); ++done)
            all[done].handle->store->settle(all[done].dirty, segment, all[done].offset, all[done].encoded, postponed);
    } catch (...) {
        for (; done < all.size(); ++done) all[done].handle->dirty = std::move(all[done].dirty);
        throw;
    }
}

nb::list still_live(StoreHandle& self, nb::list records) {
    const std::shared_ptr<Store> store = self.live();
    std::vector<std::pair<u32, u64>> asked;  // entries and numbers
    for (nb::handle record : records) {
        const auto& dirty = nb::cast<DirtyHandle&>(record).dirty;
        asked.emplace_back(dirty ? dirty->pin.entry() : kNone, dirty ? dirty->seq : 0);
    }
    std::vector<bool> live;
    {
        const nb::gil_scoped_release free;
        for (const auto& [entry, seq] : asked) live.push_back(entry && store->still_live(entry, seq));
    }
    nb::list list;
    for (const bool lives : live) list.append(lives);
    return list;
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

}  // namespace

void bind_tiers(nb::module_& m, nb::class_<StoreHandle>& store) {
    loading_marker = new nb::object(nb::module_::import_("builtins").attr("object")());
    m.attr("LOADING") = *loading_marker;
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

    store
        .def("take_dirty", &take_dirty, nb::arg("max_records"), nb::arg("max_bytes"), nb::arg("timeout_s"), nb::arg("gather_s"))
        .def("wake_writer", [](StoreHandle& self) { self.live()->wake_writer(); })
        .def("still_live", &still_live, nb::arg("records"))
        .def("mark_durable", [](StoreHandle&, nb::list records, u32 segment, nb::list offsets) {
            settle(records, segment, &offsets);
        }, nb::arg("records"), nb::arg("segment"), nb::arg("offsets"))
        .def("mark_failed", [](StoreHandle&, nb::list records) { settle(records); }, nb::arg("records"))
        .def("doubt", [](StoreHandle&, nb::list records) {
            for (nb::handle record : records)
                if (const DirtyHandle& handle = nb::cast<DirtyHandle&>(record); handle.dirty) handle.store->doubt(*handle.dirty);
        }, nb::arg("records"))
        .def("wait_until_settled", [](StoreHandle& self, double timeout) {
            const std::shared_ptr<Store> store = self.live();
            const nb::gil_scoped_release free;
            return store->wait_until_settled(timeout);
        }, nb::arg("timeout_s"))
        .def("postpone", [](StoreHandle&, nb::list records) { settle(records, 0, nullptr, true); }, nb::arg("records"))
        .def("write_postponed", [](StoreHandle& self, u64 most_bytes) {
            const std::shared_ptr<Store> store = self.live();
            const nb::gil_scoped_release free;
            return store->write_postponed(most_bytes);
        }, nb::arg("max_bytes"))
        .def("write_lazy", [](StoreHandle& self) { self.live()->write_lazy(); })
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
                                           row.seq, row.offset, row.length, row.version, row.epoch, pack_tags(row.tags)));
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
        .def("watch", [](StoreHandle& self) { self.live()->watch(); })
        .def("next_number", [](StoreHandle& self) { return self.live()->next_number(); })
        .def("set_unsent", [](StoreHandle& self, u64 from) { self.live()->set_unsent(from); }, nb::arg("number"))
        .def("low", [](StoreHandle& self) { return self.live()->low(); })
        .def("distrust", [](StoreHandle& self, u64 before) { self.live()->distrust(before); }, nb::arg("written_before"))
        .def("distrusted", [](StoreHandle& self) { return self.live()->distrusted(); });
}

}  // namespace kvstrata
