// A record: a value with its header, the same bytes in every tier. docs/format.md describes them.
#pragma once

#include <type_traits>

#include "base/types.hpp"

namespace kvstrata {

inline constexpr u8 kRecordMagic[4] = {'K', 'V', 'S', 'R'};
inline constexpr u8 kRecordFormat = 1;
inline constexpr u64 kLargePayload = 65536;          // from here on, record and payload lie on pages
inline constexpr u64 kMaxPayload = u64{1} << 46;     // a bound that keeps sums of lengths from overflowing

enum RecordFlags : u8 {
    kRecordImmutable = 1,
    kRecordNamespace = 2,  // the payload describes a namespace
    kRecordTagged = 4,     // only an intact catalog can tell whether one of its tags has been removed
    kRecordEncoded = 8,    // the payload isn't the value itself
};

// Little endian, as it lies in memory and in files. The key follows, then the payload at payload_offset.
struct RecordHeader {
    u8 magic[4] = {'K', 'V', 'S', 'R'};
    u8 format = kRecordFormat;
    u8 codec = 0;             // 0 = raw
    u8 flags = 0;             // RecordFlags
    u8 tag_check = 0;         // xor of the bytes of its tags' slots
    u16 key_len = 0;          // 1..kMaxKey
    u16 payload_offset = 0;   // bytes from the start of the record
    u32 ns = 0;
    u32 version = 0;          // of the namespace
    u32 epoch = 0;            // of the namespace: how often it was cleared
    u64 seq = 0;              // cache-wide, higher is newer
    u64 expires = 0;          // ms since the Unix epoch, 0 = never
    u64 value_len = 0;        // bytes after decoding
    u64 stored_len = 0;       // bytes of payload
    u32 payload_crc = 0;      // CRC32C of the payload
    u32 header_crc = 0;       // CRC32C of the 60 bytes above and the key, continued from the cache's seed
};
static_assert(sizeof(RecordHeader) == 64 && alignof(RecordHeader) == 8);
static_assert(std::is_trivially_copyable_v<RecordHeader> && std::is_standard_layout_v<RecordHeader>);

// Where the payload starts, in bytes from the start of the record. key_len <= kMaxKey.
constexpr u32 payload_offset_for(size_t key_len, u64 stored_len) {
    if (stored_len >= kLargePayload) return kPage;
    return static_cast<u32>(align_up(sizeof(RecordHeader) + key_len, stored_len >= 4096 ? 64 : 16));
}

// What the start of a record has to be a multiple of.
constexpr u64 record_alignment(u64 stored_len) { return stored_len >= kLargePayload ? kPage : kUnit; }

// Bytes of the whole record, padding included: a multiple of its alignment.
constexpr u64 record_bytes(size_t key_len, u64 stored_len) {
    return align_up(payload_offset_for(key_len, stored_len) + stored_len, record_alignment(stored_len));
}

// Sets header_crc. Everything else in the header must be final.
void seal(RecordHeader& header, const u8* key, u32 seed);

// Sets what follows from the lengths, and writes key and the zeros before and after the payload to `record`, which has
// record_bytes(key.size(), stored_len) bytes. The payload, and the header in the end, are the caller's.
void begin_frame(u8* record, RecordHeader& header, Key key, u64 stored_len);

// Completes the frame around a payload that is in its place already: sums it, seals, and writes the header.
void finish_frame(u8* record, RecordHeader& header, Key key, u32 seed);

// As begin_frame for header.stored_len, then seals, and writes header, key and the zeros before and after the payload
// to `record`, which has record_bytes(key_len, header.stored_len) bytes. The payload itself is the caller's.
void write_frame(u8* record, RecordHeader& header, const u8* key, size_t key_len, u32 seed);

enum class RecordCheck : u8 {
    ok,
    not_a_record,  // another magic
    newer_format,
    bad_header,    // its checksum, or a field that can't be
    bad_payload,   // its checksum
    truncated,     // n bytes are not enough for what was to be checked
};
const char* describe(RecordCheck check);

// Checks the record at p, of which n bytes are there; p needs no alignment. With `with_payload` the whole record has
// to be there and the payload's checksum is compared; without, header and key suffice. `out` is valid when the
// result is ok or bad_payload, and when it is truncated with out.key_len != 0; otherwise it is all zero.
RecordCheck check_record(const u8* p, size_t n, u32 seed, bool with_payload, RecordHeader& out);

}  // namespace kvstrata
