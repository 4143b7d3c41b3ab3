#include "record.hpp"

#include <cstring>

#include "base/crc32c.hpp"

namespace kvstrata {
namespace {

constexpr size_t kSummed = offsetof(RecordHeader, header_crc);

u32 header_sum(const RecordHeader& header, const u8* key, u32 seed) {
    return crc32c(crc32c(seed, &header, kSummed), key, header.key_len);
}

}  // namespace

void seal(RecordHeader& header, const u8* key, u32 seed) { header.header_crc = header_sum(header, key, seed); }

void write_frame(u8* record, RecordHeader& header, const u8* key, size_t key_len, u32 seed) {
    begin_frame(record, header, {key, key_len}, header.stored_len);
    seal(header, key, seed);
    std::memcpy(record, &header, sizeof header);
}

void finish_frame(u8* record, RecordHeader& header, Key key, u32 seed) {
    begin_frame(record, header, key, header.stored_len);
    header.payload_crc = crc32c(0, record + header.payload_offset, header.stored_len);
    seal(header, key.data(), seed);
    std::memcpy(record, &header, sizeof header);
}

void begin_frame(u8* record, RecordHeader& header, Key key, u64 stored_len) {
    std::memcpy(header.magic, kRecordMagic, sizeof kRecordMagic);
    header.format = kRecordFormat;
    header.key_len = static_cast<u16>(key.size());
    header.stored_len = stored_len;
    header.payload_offset = static_cast<u16>(payload_offset_for(key.size(), stored_len));
    const u64 key_end = sizeof header + key.size();
    const u64 payload_end = header.payload_offset + stored_len;
    std::memcpy(record + sizeof header, key.data(), key.size());
    std::memset(record + key_end, 0, header.payload_offset - key_end);
    std::memset(record + payload_end, 0, record_bytes(key.size(), stored_len) - payload_end);
}

const char* describe(RecordCheck check) {
    switch (check) {
        case RecordCheck::ok: return "ok";
        case RecordCheck::not_a_record: return "not a record";
        case RecordCheck::newer_format: return "a record of a newer format";
        case RecordCheck::bad_header: return "damaged header or key";
        case RecordCheck::bad_payload: return "damaged payload";
        case RecordCheck::truncated: return "truncated";
    }
    return "unknown";
}

RecordCheck check_record(const u8* p, size_t n, u32 seed, bool with_payload, RecordHeader& out) {
    RecordHeader header;
    std::memset(static_cast<void*>(&out), 0, sizeof out);
    if (n < sizeof header) return RecordCheck::truncated;
    std::memcpy(static_cast<void*>(&header), p, sizeof header);
    if (std::memcmp(header.magic, kRecordMagic, sizeof kRecordMagic) != 0) return RecordCheck::not_a_record;
    if (header.format > kRecordFormat) return RecordCheck::newer_format;
    if (header.format == 0 || header.key_len == 0 || header.key_len > kMaxKey || header.stored_len > kMaxPayload ||
        header.payload_offset != payload_offset_for(header.key_len, header.stored_len))
        return RecordCheck::bad_header;
    if (n < sizeof header + header.key_len) return RecordCheck::truncated;
    if (header.header_crc != header_sum(header, p + sizeof header, seed)) return RecordCheck::bad_header;
    if (header.codec == 0 && header.value_len != header.stored_len) return RecordCheck::bad_header;
    out = header;
    if (!with_payload) return RecordCheck::ok;
    if (n < record_bytes(header.key_len, header.stored_len)) return RecordCheck::truncated;
    if (header.payload_crc != crc32c(0, p + header.payload_offset, header.stored_len)) return RecordCheck::bad_payload;
    return RecordCheck::ok;
}

}  // namespace kvstrata
