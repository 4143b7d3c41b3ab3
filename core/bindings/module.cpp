// kvstrata._core: the module, its exceptions, records and checksums. Only this folder knows Python.
#include "bindings.hpp"

#include <cstring>

#include <nanobind/stl/optional.h>

#include "base/clock.hpp"
#include "base/crc32c.hpp"
#include "base/errors.hpp"
#include "store/record.hpp"

using namespace kvstrata;

namespace {

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

// The record's bytes up to its payload, as they are under another address. The payload is not looked at.
nb::bytes readdressed_frame(nb::handle record, u32 seed, u32 ns, u32 version, u32 epoch, u64 seq) {
    const Buffer bytes(record);
    RecordHeader header;
    if (bytes.size() < sizeof header) throw InvalidValue("this is no record");
    std::memcpy(&header, bytes.data(), sizeof header);
    if (header.payload_offset < sizeof header + header.key_len || header.payload_offset > bytes.size())
        throw InvalidValue("this is no record");
    header.ns = ns;
    header.version = version;
    header.epoch = epoch;
    header.seq = seq;
    nb::bytes frame = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, header.payload_offset));
    if (!frame.is_valid()) throw nb::python_error();
    u8* const at = reinterpret_cast<u8*>(PyBytes_AsString(frame.ptr()));
    seal(header, bytes.data() + sizeof header, seed);
    std::memcpy(at, bytes.data(), header.payload_offset);
    std::memcpy(at, &header, sizeof header);
    return frame;
}

// Checks each record against what was asked for: key, namespace, version, epoch, and that it is a plain one, none of
// `not_flags`. For each (where the value starts, its length, expires, seq), or what is wrong with it; None stays None.
nb::list check_records(nb::handle records, nb::handle keys, u32 seed, u32 ns, u32 version, u32 epoch, u8 not_flags) {
    const nb::object all = nb::steal(PySequence_Tuple(records.ptr())), names = nb::steal(PySequence_Tuple(keys.ptr()));
    if (!all.is_valid() || !names.is_valid()) throw nb::python_error();
    const Py_ssize_t count = PyTuple_GET_SIZE(all.ptr());
    if (count != PyTuple_GET_SIZE(names.ptr())) throw InvalidValue("one key for each record is needed");
    const u64 now = now_ms();
    nb::list found;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* const object = PyTuple_GET_ITEM(all.ptr(), i);
        if (object == Py_None) {
            found.append(nb::none());
            continue;
        }
        const Buffer bytes{nb::handle(object)};
        const Key key = key_of(PyTuple_GET_ITEM(names.ptr(), i));
        RecordHeader h;
        RecordCheck check;
        {
            const WithoutGil free(bytes.size());
            check = check_record(bytes.data(), bytes.size(), seed, true, h);
        }
        if (check != RecordCheck::ok || h.ns != ns || h.version != version || h.epoch != epoch || (h.flags & not_flags) ||
            h.key_len != key.size() ||
            std::memcmp(bytes.data() + sizeof h, key.data(), key.size()) != 0)
            found.append("rejected_records");
        else if (h.expires && h.expires <= now)
            found.append("expired_records");
        else
            found.append(nb::make_tuple(u32{h.payload_offset}, h.stored_len, h.expires, h.seq, h.codec, h.value_len));
    }
    return found;
}

RecordHeader header_in(const Buffer& record) {
    RecordHeader header;
    if (record.size() < sizeof header) throw InvalidValue("too short for a record");
    std::memcpy(static_cast<void*>(&header), record.data(), sizeof header);
    if (header.key_len == 0 || header.key_len > kMaxKey || record.size() < sizeof header + header.key_len)
        throw InvalidValue("not a record");
    return header;
}

}  // namespace

nb::bytes kvstrata::encode_record(nb::handle raw, nb::handle payload, u8 codec, u32 seed, std::optional<u32> ns,
                                  std::optional<u32> version, std::optional<u32> epoch, std::optional<u64> seq) {
    const Buffer from(raw), content(payload);
    RecordHeader header = header_in(from);
    const Key key{from.data() + sizeof header, header.key_len};
    header.codec = codec;
    if (codec) header.flags |= kRecordEncoded;
    header.ns = ns.value_or(header.ns);
    header.version = version.value_or(header.version);
    header.epoch = epoch.value_or(header.epoch);
    header.seq = seq.value_or(header.seq);
    header.stored_len = content.size();
    const u64 length = record_bytes(key.size(), content.size());
    nb::bytes record = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(length)));
    if (!record.is_valid()) throw nb::python_error();
    u8* const at = reinterpret_cast<u8*>(PyBytes_AsString(record.ptr()));
    const WithoutGil free(length);
    header.payload_crc = copy_crc32c(at + payload_offset_for(key.size(), content.size()), content.data(), content.size(), 0);
    write_frame(at, header, key.data(), key.size(), seed);
    return record;
}

namespace {

// Completes the raw record that an encoded one was made of, around the value, which is in its place already.
void decode_record(nb::handle encoded, nb::handle raw, u32 seed) {
    const Buffer from(encoded), to(raw, true);
    RecordHeader header = header_in(from);
    const Key key{from.data() + sizeof header, header.key_len};
    if (header.value_len > kMaxPayload || to.size() != record_bytes(key.size(), header.value_len))
        throw InvalidValue("a record of another length");
    header.codec = 0;
    header.flags &= static_cast<u8>(~kRecordEncoded);
    header.stored_len = header.value_len;
    const WithoutGil free(to.size());
    finish_frame(to.data(), header, key, seed);
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

u32 py_crc32c_of_parts(nb::handle sums_object, u64 part_bytes) {
    const Buffer bytes(sums_object);
    if (bytes.size() % sizeof(u32) != 0) throw InvalidValue("sums of 32 bits are needed");
    std::vector<u32> sums(bytes.size() / sizeof(u32));
    std::memcpy(sums.data(), bytes.data(), bytes.size());
    return crc32c_of_parts(sums.data(), sums.size(), part_bytes);
}

void bind_record(nb::module_& m) {
    m.def("crc32c", &py_crc32c, nb::arg("data"), nb::arg("crc") = 0,
          nb::sig("def crc32c(data: collections.abc.Buffer, crc: int = 0) -> int"),
          "CRC32C of the bytes of a buffer, continued from `crc`.");
    m.def("crc32c_of_parts", &py_crc32c_of_parts, nb::arg("sums"), nb::arg("part_bytes"),
          nb::sig("def crc32c_of_parts(sums: collections.abc.Buffer, part_bytes: int) -> int"),
          "CRC32C of parts that lie one after the other, all of so many bytes, from that of each, 32-bit numbers.");
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
    m.def("readdressed_frame", &readdressed_frame, nb::arg("record"), nb::kw_only(), nb::arg("seed"), nb::arg("ns"),
          nb::arg("version"), nb::arg("epoch"), nb::arg("seq"),
          "The bytes of a record up to its payload, with another namespace, version, epoch and number, under another seed.");
    m.def("check_records", &check_records, nb::arg("records"), nb::arg("keys"), nb::arg("seed"), nb::arg("ns"),
          nb::arg("version"), nb::arg("epoch"), nb::arg("not_flags"),
          "Check each record against what was asked for. For each (start of the payload, its length, expires, seq, codec,\n"
          "length of the value), or what\n"
          "is wrong with it: \"rejected_records\" or \"expired_records\"; None for None.");
    m.def("encode_record", &encode_record, nb::arg("raw"), nb::arg("payload"), nb::kw_only(), nb::arg("codec"),
          nb::arg("seed"), nb::arg("ns") = nb::none(), nb::arg("version") = nb::none(), nb::arg("epoch") = nb::none(),
          nb::arg("seq") = nb::none(),
          "The record that a raw one becomes with that payload in place of its value, and with other numbers where given.");
    m.def("decode_record", &decode_record, nb::arg("encoded"), nb::arg("raw"), nb::kw_only(), nb::arg("seed"),
          "Complete the raw record that an encoded one was made of, around the value, which is in its place already.");
    m.def("parse_record", &parse_record, nb::arg("data"), nb::arg("seed"), nb::arg("with_payload") = true,
          nb::arg("offset") = 0,
          "Check the record at `offset`. The result starts with (check, what it means), 0 meaning that it is in order;\n"
          "where the header is in order, (key, ns, version, epoch, seq, expires, flags, codec, value_len, stored_len,\n"
          "payload_offset, length) follow.");
}

// ---- Errors -------------------------------------------------------------------------------------

// Raises the exception of that name from kvstrata.errors.
template <class... Arguments>
void raise(const char* name, Arguments&&... arguments) {
    try {
        const nb::object type = nb::module_::import_("kvstrata.errors").attr(name);
        const nb::object error = type(std::forward<Arguments>(arguments)...);
        PyErr_SetObject(type.ptr(), error.ptr());
    } catch (nb::python_error& failed) {
        failed.restore();
    }
}

void translate(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const TierFull& error) {
        raise("TierFull", error.tier.c_str(), error.need, error.free);
    } catch (const TierUnavailable& error) {
        raise("TierUnavailable", error.what());
    } catch (const FormatError& error) {
        raise("FormatError", error.what());
    } catch (const ConfigError& error) {
        raise("ConfigError", error.what());
    } catch (const ConfigMismatch& error) {
        raise("ConfigMismatch", error.what());
    } catch (const VersionConflict& error) {
        raise("VersionConflict", error.what());
    } catch (const CorruptRecord& error) {
        raise("CorruptRecord", error.what());
    } catch (const CacheClosed& error) {
        raise("CacheClosed", error.what());
    } catch (const InvalidKey& error) {
        raise("InvalidKey", error.what());
    } catch (const InvalidValue& error) {
        raise("InvalidValue", error.what());
    } catch (const OsError& error) {
        PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code, error.what()).ptr());
    }
}

}  // namespace

Key kvstrata::key_of(nb::handle object) {
    const char* data;
    Py_ssize_t size;
    if (PyBytes_Check(object.ptr())) {
        data = PyBytes_AS_STRING(object.ptr());
        size = PyBytes_GET_SIZE(object.ptr());
    } else if (PyUnicode_Check(object.ptr())) {
        data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
        if (!data) {
            PyErr_Clear();
            throw InvalidKey("a key that is a str must have a UTF-8 encoding; this one has a lone surrogate");
        }
    } else {
        throw InvalidKey(std::string("a key is str or bytes, not ") + Py_TYPE(object.ptr())->tp_name);
    }
    if (size < 1 || size > static_cast<Py_ssize_t>(kMaxKey))
        throw InvalidKey("a key has 1 to " + std::to_string(kMaxKey) + " bytes, not " + std::to_string(size));
    return {reinterpret_cast<const u8*>(data), static_cast<size_t>(size)};
}

NB_MODULE(_core, m) {
    m.doc() = "The native core of kvstrata.";
    nb::register_exception_translator(translate);
    bind_record(m);
    bind_io(m);
    bind_layers(m);
    bind_bloom(m);
    bind_codecs(m);
    bind_store(m);
    bind_objects(m);
    bind_quick(m);
    bind_simulator(m);
}
