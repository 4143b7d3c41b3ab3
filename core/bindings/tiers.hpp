// A record on its way to another tier.
#pragma once

#include <cstring>

#include "bindings.hpp"
#include "store/record.hpp"

namespace kvstrata {

// Tags as the catalog has them: one number.
inline std::int64_t pack_tags(const u16 (&tags)[kTags]) {
    std::int64_t packed;
    static_assert(sizeof packed == sizeof tags);
    std::memcpy(&packed, tags, sizeof packed);
    return packed;
}

// Pinned, until it is settled or goes.
struct DirtyHandle {
    std::shared_ptr<Store> store;
    std::optional<Dirty> dirty;
    RecordHeader header;
    nb::bytes key;
    u16 tags[kTags];
    nb::object encoded;  // the record as it goes below, where that isn't what lies in memory

    // Lets it go below with that payload in place of its value.
    void encode(nb::handle payload, u8 codec, u32 seed) {
        if (!dirty) throw InvalidValue("this record is settled");
        PyObject* view = PyMemoryView_FromMemory(reinterpret_cast<char*>(const_cast<u8*>(dirty->pin.record())),
                                                 static_cast<Py_ssize_t>(dirty->pin.record_size()), PyBUF_READ);
        if (!view) throw nb::python_error();
        encoded = encode_record(nb::steal(view), payload, codec, seed, {}, {}, {}, {});
    }
    u64 length() const {
        return encoded.is_valid() ? nb::len(encoded) : record_bytes(header.key_len, header.stored_len);
    }
    u8 flags() const { return static_cast<u8>(header.flags | (encoded.is_valid() ? kRecordEncoded : 0)); }
    std::int64_t packed_tags() const { return pack_tags(tags); }
};

// What the store's own class has for the tiers below and elsewhere.
void bind_tiers(nb::module_& m, nb::class_<StoreHandle>& store);

}  // namespace kvstrata
