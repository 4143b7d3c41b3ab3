// Where things lie in a record, and that no damage passes.
#include "store/record.hpp"

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/crc32c.hpp"
#include "check.hpp"

using namespace kvstrata;

namespace {

constexpr u32 kSeed = 0x5eed5eed;

const u8* bytes_of(const std::string& text) { return reinterpret_cast<const u8*>(text.data()); }

std::vector<u8> build(const std::string& key, const std::vector<u8>& payload, u32 seed = kSeed) {
    RecordHeader header;
    header.ns = 3;
    header.version = 2;
    header.epoch = 1;
    header.seq = 99;
    header.expires = 1234567890123;
    header.value_len = header.stored_len = payload.size();
    header.payload_crc = crc32c(0, payload.data(), payload.size());
    std::vector<u8> record(record_bytes(key.size(), payload.size()), 0xee);
    write_frame(record.data(), header, bytes_of(key), key.size(), seed);
    std::copy(payload.begin(), payload.end(), record.begin() + header.payload_offset);
    return record;
}

std::vector<u8> payload_of(size_t n) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::vector<u8> payload(n);
    for (u8& byte : payload) byte = static_cast<u8>(random());
    return payload;
}

RecordCheck check(const std::vector<u8>& record, u32 seed = kSeed, bool with_payload = true) {
    RecordHeader header;
    return check_record(record.data(), record.size(), seed, with_payload, header);
}

}  // namespace

TEST(the_layout_is_the_documented_one) {
    CHECK(offsetof(RecordHeader, format) == 4 && offsetof(RecordHeader, codec) == 5);
    CHECK(offsetof(RecordHeader, flags) == 6 && offsetof(RecordHeader, key_len) == 8);
    CHECK(offsetof(RecordHeader, payload_offset) == 10 && offsetof(RecordHeader, ns) == 12);
    CHECK(offsetof(RecordHeader, version) == 16 && offsetof(RecordHeader, epoch) == 20);
    CHECK(offsetof(RecordHeader, seq) == 24 && offsetof(RecordHeader, expires) == 32);
    CHECK(offsetof(RecordHeader, value_len) == 40 && offsetof(RecordHeader, stored_len) == 48);
    CHECK(offsetof(RecordHeader, payload_crc) == 56 && offsetof(RecordHeader, header_crc) == 60);
}

TEST(sizes_follow_the_three_classes) {
    CHECK(payload_offset_for(1, 0) == 80 && record_bytes(1, 0) == 128);
    CHECK(payload_offset_for(16, 48) == 80 && record_bytes(16, 48) == 128);
    CHECK(payload_offset_for(16, 49) == 80 && record_bytes(16, 49) == 192);
    CHECK(payload_offset_for(32, 4095) == 96);
    CHECK(payload_offset_for(32, 4096) == 128 && record_bytes(32, 4096) == 4224);
    CHECK(payload_offset_for(1024, 65535) == 1088 && record_bytes(1024, 65535) == 66624);
    CHECK(payload_offset_for(1024, 65536) == 4096 && record_bytes(1024, 65536) == 4096 + 65536);
    CHECK(record_bytes(1, 65537) == 4096 + 65536 + 4096);
    CHECK(record_alignment(65535) == 64 && record_alignment(65536) == 4096);
}

TEST(a_record_is_read_back_as_it_was_written) {
    for (const size_t n : {0, 1, 100, 4095, 4096, 5000, 65535, 65536, 100000}) {
        for (const size_t key_len : {1, 16, 32, 1000, 1024}) {
            const std::string key(key_len, 'k');
            const std::vector<u8> payload = payload_of(n), record = build(key, payload);
            RecordHeader header;
            CHECK(check_record(record.data(), record.size(), kSeed, true, header) == RecordCheck::ok);
            CHECK(header.ns == 3 && header.version == 2 && header.epoch == 1 && header.seq == 99);
            CHECK(header.expires == 1234567890123 && header.value_len == n && header.key_len == key_len);
            CHECK(std::memcmp(record.data() + sizeof header, key.data(), key_len) == 0);
            CHECK(std::equal(payload.begin(), payload.end(), record.begin() + header.payload_offset));
        }
    }
}

TEST(everything_between_the_parts_is_zero) {
    const std::vector<u8> record = build("key", payload_of(70000));
    for (size_t i = 64 + 3; i < 4096; ++i) CHECK(record[i] == 0);
    for (size_t i = 4096 + 70000; i < record.size(); ++i) CHECK(record[i] == 0);
}

TEST(every_flipped_bit_of_header_key_and_payload_is_found) {
    std::vector<u8> record = build("some key", payload_of(200));
    RecordHeader header;
    check_record(record.data(), record.size(), kSeed, true, header);
    for (size_t i = 0; i < header.payload_offset + 200u; ++i) {
        if (i >= 64 + 8 && i < header.payload_offset) continue;
        for (int bit = 0; bit < 8; ++bit) {
            record[i] ^= static_cast<u8>(1 << bit);
            const RecordCheck found = check(record);
            if (i < 4) CHECK(found == RecordCheck::not_a_record);
            else if (i == 4) CHECK(found == RecordCheck::newer_format || found == RecordCheck::bad_header);
            else if (i >= header.payload_offset) CHECK(found == RecordCheck::bad_payload);
            else CHECK(found == RecordCheck::bad_header || found == RecordCheck::truncated);
            record[i] ^= static_cast<u8>(1 << bit);
        }
    }
    CHECK(check(record) == RecordCheck::ok);
}

// The vector has exactly the bytes that are there, so that a sanitizer sees a read beyond them.
TEST(no_truncation_is_accepted_or_read_beyond) {
    for (const size_t n : {0, 10, 5000}) {
        const std::vector<u8> record = build("key", payload_of(n));
        for (size_t there = 0; there < record.size(); there += (there < 300 ? 1 : 97)) {
            const std::vector<u8> part(record.begin(), record.begin() + static_cast<std::ptrdiff_t>(there));
            CHECK(check(part) == RecordCheck::truncated);
            CHECK(check(part, kSeed, false) == (there < 67 ? RecordCheck::truncated : RecordCheck::ok));
        }
    }
}

TEST(a_record_of_another_cache_is_not_accepted) {
    CHECK(check(build("key", payload_of(10), kSeed + 1)) == RecordCheck::bad_header);
}

TEST(a_newer_format_is_told_apart_from_damage) {
    std::vector<u8> record = build("key", payload_of(10));
    record[4] = 2;
    CHECK(check(record) == RecordCheck::newer_format);
}

TEST(lengths_that_cannot_be_are_refused_even_with_a_right_checksum) {
    for (const u64 stored : {kMaxPayload + 1, ~u64{0}, ~u64{0} - 4096}) {
        RecordHeader header;
        header.key_len = 3;
        header.payload_offset = static_cast<u16>(payload_offset_for(3, stored));
        header.value_len = header.stored_len = stored;
        seal(header, bytes_of("key"), kSeed);
        std::vector<u8> record(128);
        std::memcpy(record.data(), &header, sizeof header);
        std::memcpy(record.data() + sizeof header, "key", 3);
        CHECK(check(record) == RecordCheck::bad_header);
    }
}

TEST(noise_is_never_a_record) {
    std::mt19937_64 random(5);
    for (int round = 0; round < 20000; ++round) {
        std::vector<u8> noise(64 + random() % 300);
        for (u8& byte : noise) byte = static_cast<u8>(random());
        std::memcpy(noise.data(), kRecordMagic, 4);
        noise[4] = 1;
        noise[8] = static_cast<u8>(random() % 64);
        noise[9] = 0;
        CHECK(check(noise) != RecordCheck::ok);
    }
}
