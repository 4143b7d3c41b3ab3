// kvstrata._core: the only file of the core that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "crc32c.hpp"
#include "errors.hpp"
#include "record.hpp"

namespace nb = nanobind;
using namespace kvstrata;

namespace {

// The bytes of any object with a contiguous buffer. Released with the GIL held.
class Buffer {
public:
    explicit Buffer(nb::handle object, bool writable = false) {
        if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
            throw nb::python_error();
    }
    ~Buffer() { PyBuffer_Release(&view_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    u8* data() const { return static_cast<u8*>(view_.buf); }
    size_t size() const { return static_cast<size_t>(view_.len); }

private:
    Py_buffer view_;
};

// Lets other threads run while more bytes are worked on than a switch is worth.
class WithoutGil {
public:
    explicit WithoutGil(size_t bytes) {
        if (bytes >= 65536) released_.emplace();
    }

private:
    std::optional<nb::gil_scoped_release> released_;
};

// ---- Records and checksums ---------------------------------------------------------------------

u32 py_crc32c(nb::handle data, u32 crc) {
    const Buffer bytes(data);
    const WithoutGil free(bytes.size());
    return crc32c(crc, bytes.data(), bytes.size());
}

nb::bytes build_record(nb::handle key, nb::handle payload, u32 seed, u32 ns, u32 version, u32 epoch, u64 seq,
                       u64 expires, u8 flags, u8 codec, std::optional<u64> value_len) {
    const Buffer name(key), content(payload);
    if (name.size() == 0 || name.size() > kMaxKey) throw InvalidKey("a key has 1 to 1024 bytes");
    RecordHeader header;
    header.codec = codec;
    header.flags = flags;
    header.ns = ns;
    header.version = version;
    header.epoch = epoch;
    header.seq = seq;
    header.expires = expires;
    header.stored_len = content.size();
    header.value_len = value_len.value_or(content.size());
    const u64 length = record_bytes(name.size(), content.size());
    nb::bytes record = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(length)));
    if (!record.is_valid()) throw nb::python_error();
    u8* at = reinterpret_cast<u8*>(PyBytes_AsString(record.ptr()));
    const WithoutGil free(length);
    header.payload_crc = copy_crc32c(at + payload_offset_for(name.size(), content.size()), content.data(), content.size(), 0);
    write_frame(at, header, name.data(), name.size(), seed);
    return record;
}

nb::tuple parse_record(nb::handle data, u32 seed, bool with_payload, size_t offset) {
    const Buffer bytes(data);
    const size_t there = offset < bytes.size() ? bytes.size() - offset : 0;
    const u8* at = bytes.data() + (there != 0 ? offset : 0);
    RecordHeader h;
    RecordCheck check;
    {
        const WithoutGil free(with_payload ? there : 0);
        check = check_record(at, there, seed, with_payload, h);
    }
    if (h.key_len == 0) return nb::make_tuple(static_cast<int>(check), describe(check));
    return nb::make_tuple(static_cast<int>(check), describe(check),
                          nb::bytes(reinterpret_cast<const char*>(at) + sizeof h, h.key_len), h.ns, h.version, h.epoch,
                          h.seq, h.expires, h.flags, h.codec, h.value_len, h.stored_len, u32{h.payload_offset},
                          record_bytes(h.key_len, h.stored_len));
}

void bind_record(nb::module_& m) {
    m.def("crc32c", &py_crc32c, nb::arg("data"), nb::arg("crc") = 0,
          nb::sig("def crc32c(data: collections.abc.Buffer, crc: int = 0) -> int"),
          "CRC32C of the bytes of a buffer, continued from `crc`.");
    m.def("crc32c_method", [] { return crc32c_methods().front().name; },
          "The instructions that crc32c uses on this processor.");
    m.def("record_bytes", [](size_t key_len, u64 stored_len) {
              if (key_len == 0 || key_len > kMaxKey || stored_len > kMaxPayload) throw InvalidValue("lengths out of range");
              return record_bytes(key_len, stored_len);
          }, nb::arg("key_len"), nb::arg("stored_len"),
          "Bytes of a record with a key and a payload of these lengths, padding included.");
    m.def("build_record", &build_record, nb::arg("key"), nb::arg("payload"), nb::kw_only(), nb::arg("seed"),
          nb::arg("ns"), nb::arg("version") = 0, nb::arg("epoch") = 0, nb::arg("seq") = 0, nb::arg("expires") = 0,
          nb::arg("flags") = 0, nb::arg("codec") = 0, nb::arg("value_len") = nb::none(),
          "The bytes of a record, padding included.");
    m.def("parse_record", &parse_record, nb::arg("data"), nb::arg("seed"), nb::arg("with_payload") = true,
          nb::arg("offset") = 0,
          "Check the record at `offset`. The result starts with (check, what it means), 0 meaning that it is in order;\n"
          "where the header is in order, (key, ns, version, epoch, seq, expires, flags, codec, value_len, stored_len,\n"
          "payload_offset, length) follow.");
}

}  // namespace

NB_MODULE(_core, m) {
    m.doc() = "The native core of kvstrata.";
    bind_record(m);
}
