// The store as Python sees it. kvstrata.cache and kvstrata.tiers are the only ones that use it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "pins.hpp"
#include "tiers.hpp"

namespace kvstrata {
namespace {

nb::dict stats(StoreHandle& self) {
    const StoreStats s = self.live()->stats();
    nb::dict d;
    auto add = [&](const char* name, u64 value) { d[name] = value; };
    add("hits", s.hits);
    add("misses", s.misses);
    add("puts", s.puts);
    add("deletes", s.deletes);
    add("evictions", s.evictions);
    add("expired", s.expired);
    add("demotions", s.demotions);
    add("entries", s.entries);
    add("corrupt", s.corrupt);
    add("loads", s.loads);
    add("load_bytes", s.load_bytes);
    add("dirty_bytes", s.dirty_bytes);
    add("reaped_clients", s.reaped_clients);
    add("reaped_pins", s.reaped_pins);
    add("reaped_blocks", s.reaped_blocks);
    add("rebuilt_shards", s.rebuilt_shards);
    add("rebuilt_policies", s.rebuilt_policies);
    add("rebuilt_allocators", s.rebuilt_allocators);
    add("pins", s.pins);
    add("reservations", s.reservations);
    add("clients", s.clients);
    add("index_bytes", s.index_bytes);
    d["debt_keys"] = s.debts.keys;
    d["debt_fill"] = s.debts.fill;
    d["debt_fp_rate"] = s.debts.fp_rate;
    add("memory_bytes", s.memory.total);
    add("memory_record_bytes", s.record_bytes);
    d["memory_utilisation"] = s.utilisation();
    d["memory_fragmentation"] = s.memory.fragmentation();
    add("memory_used_bytes", s.memory.used);
    add("memory_free_bytes", s.memory.free);
    add("memory_largest_free_bytes", s.memory.largest_free);
    add("memory_free_runs", s.memory.free_runs);
    add("allocator_faults", s.memory.faults);
    add("near_hits", self.near ? self.near->hits() : 0);
    add("near_values", self.near ? self.near->values() : 0);
    add("near_bytes", self.near ? self.near->bytes() : 0);
    return d;
}

std::shared_ptr<Store> seeded(std::shared_ptr<Store> store, std::optional<u32> seed) {
    if (seed) store->set_seed(*seed);
    return store;
}

template <class Open>
std::shared_ptr<StoreHandle> open_without_gil(Open&& open) {
    std::shared_ptr<Store> store;
    {
        const nb::gil_scoped_release free;
        store = open();
    }
    return std::make_shared<StoreHandle>(std::move(store));
}

}  // namespace

void bind_store(nb::module_& m) {
    bind_pins(m);
    bind_space(m);
    m.def("policy_names", [] {
        nb::list names;
        for (u32 i = 0; i < policy_count(); ++i) names.append(policy_by_number(i).name());
        return names;
    });
    m.def("probe", [](const char* file) {
        const RegionProbe p = Region::probe(file);
        return nb::make_tuple(p.exists, p.ready, p.format, p.in_use, p.options.memory, p.options.disk);
    }, nb::arg("file"));

    nb::class_<StoreHandle> store(m, "Store");
    store
        .def_static("open_private", [](u64 memory, u64 disk, std::optional<u32> seed) {
            return open_without_gil([&] { return seeded(Store::open_private({memory, disk}), seed); });
        }, nb::arg("memory"), nb::arg("disk") = 0, nb::arg("seed").none() = nb::none())
        .def_static("create_shared", [](const std::string& file, u64 memory, u64 disk, std::optional<u32> seed) {
            return open_without_gil([&] { return seeded(Store::create_shared(file, {memory, disk}), seed); });
        }, nb::arg("file"), nb::arg("memory"), nb::arg("disk") = 0, nb::arg("seed").none() = nb::none())
        .def_static("attach_shared", [](const std::string& file) {
            return open_without_gil([&] { return Store::attach_shared(file); });
        }, nb::arg("file"))
        .def("mark_ready", [](StoreHandle& self) { self.live()->mark_ready(); })
        .def("leave_to_parent", [](StoreHandle& self) {
            self.leave_to_parent();
        })
        .def("keep_near", [](StoreHandle& self, u64 bytes) {
            self.near.reset();
            if (bytes) self.near.emplace(bytes);
        }, nb::arg("nbytes"))
        .def("attach_again", [](StoreHandle& self) { self.store = self.live()->attach_again(); })
        .def("use_huge_pages", [](StoreHandle& self) {
            const std::shared_ptr<Store> store = self.live();
            const nb::gil_scoped_release free;
            store->use_huge_pages();
        })
        .def("close", [](StoreHandle& self) { self.close(); })
        .def_prop_ro("closed", [](const StoreHandle& self) { return !self.store; })
        .def("open_namespace", [](const std::shared_ptr<StoreHandle>& self, u32 id, const std::string& name, u32 version,
                                  const std::string& policy, u64 quota, u64 guarantee, bool immutable, u32 admission, bool write_back,
                                  bool remote) {
            return SpaceHandle{self, self->live()->open_namespace(id, name, version, {policy, quota, guarantee, immutable, admission, write_back, remote})};
        }, nb::arg("id"), nb::arg("name"), nb::arg("version"), nb::arg("policy"), nb::arg("quota"), nb::arg("guarantee"),
             nb::arg("immutable"), nb::arg("admission") = 1, nb::arg("write_back") = false, nb::arg("remote") = true)
        .def("restore_namespace", [](StoreHandle& self, u32 id, const std::string& name, u32 version, u32 epoch, bool immutable) {
            self.live()->restore_namespace(id, name, version, epoch, immutable);
        }, nb::arg("id"), nb::arg("name"), nb::arg("version"), nb::arg("epoch"), nb::arg("immutable"))
        .def("undurable_epoch", [](StoreHandle& self, u32 ns) { return self.live()->undurable_epoch(ns); }, nb::arg("ns"))
        .def("epoch_is_durable", [](StoreHandle& self, u32 ns, u32 epoch) { self.live()->epoch_is_durable(ns, epoch); },
             nb::arg("ns"), nb::arg("epoch"))
        .def("restore_tag", [](StoreHandle& self, u16 slot, u64 seq) { self.live()->restore_tag({slot, seq}); },
             nb::arg("slot"), nb::arg("seq"))
        .def_prop_ro("shards", [](StoreHandle& self) { return self.live()->shards(); })
        .def("open_holder", [](StoreHandle& self, const std::string& name, u64 limit) {
            return self.live()->open_holder(name, limit);
        }, nb::arg("name"), nb::arg("limit"))
        .def("let_go_of_all", [](StoreHandle& self, u8 holder) { self.live()->let_go_of_all(holder); }, nb::arg("holder"))
        .def("close_holder", [](StoreHandle& self, u8 holder) { self.live()->close_holder(holder); }, nb::arg("holder"))
        .def("holders", [](StoreHandle& self) {
            nb::list list;
            for (const HolderState& h : self.live()->holders()) list.append(nb::make_tuple(h.name, h.limit, h.bytes));
            return list;
        })
        .def("space", [](const std::shared_ptr<StoreHandle>& self, u32 ns) {
            return SpaceHandle{self, self->live()->current_space(ns)};
        }, nb::arg("ns"))
        .def("hottest", [](StoreHandle& self, size_t most) {
            const std::shared_ptr<Store> store = self.live();
            std::vector<Store::Used> used;
            {
                const nb::gil_scoped_release free;
                used = store->hottest(most);
            }
            nb::list list;
            for (const auto& one : used)
                list.append(nb::make_tuple(one.ns, nb::bytes(reinterpret_cast<const char*>(one.key.data()), one.key.size())));
            return list;
        }, nb::arg("most"))
        .def("raise_seq", [](StoreHandle& self, u64 above) { self.live()->raise_seq(above); }, nb::arg("above"))
        .def("next_seq", [](StoreHandle& self) { return self.live()->next_seq(); })
        .def("count_corrupt", [](StoreHandle& self) { self.live()->count_corrupt(); })
        .def_prop_ro("seed", [](StoreHandle& self) { return self.live()->seed(); })
        .def("reap", [](StoreHandle& self) { return self.live()->reap(); })
        .def("alone", [](StoreHandle& self) { return self.live()->alone(); })
        .def("stats", &stats);
    bind_tiers(m, store);
}

}  // namespace kvstrata

