"""Records built and read back, and what damage to them is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata import _core
from kvstrata.errors import CorruptRecord, FormatError, InvalidKey
from kvstrata.record import (
    IMMUTABLE,
    LARGE_PAYLOAD,
    NAMESPACE,
    NamespaceInfo,
    build_descriptor,
    build_record,
    parse_descriptor,
    parse_record,
    payload_of,
)

SEED = 0xDEADBEEF


def test_crc32c_is_the_castagnoli_sum_and_can_be_continued() -> None:
    assert _core.crc32c(b"123456789") == 0xE3069283
    assert _core.crc32c(b"6789", _core.crc32c(b"12345")) == 0xE3069283
    assert _core.crc32c(b"") == 0
    assert _core.crc32c(memoryview(bytearray(100_000))[7:]) == _core.crc32c(bytes(99_993))


@given(
    key=st.binary(min_size=1, max_size=1024),
    payload=st.binary(max_size=5000),
    numbers=st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
    seq=st.integers(0, 2**64 - 1),
)
def test_a_record_is_read_back_as_it_was_built(
    key: bytes, payload: bytes, numbers: tuple[int, int, int], seq: int
) -> None:
    ns, version, epoch = numbers
    data = build_record(
        key, payload, seed=SEED, ns=ns, version=version, epoch=epoch, seq=seq, expires=seq, flags=IMMUTABLE
    )
    record = parse_record(data, seed=SEED)
    assert record[:7] == (key, ns, version, epoch, seq, seq, IMMUTABLE)
    assert payload_of(data, record) == payload
    assert len(data) == record.length == _core.record_bytes(len(key), len(payload))
    assert len(data) % 64 == 0


@pytest.mark.parametrize("size", [LARGE_PAYLOAD - 1, LARGE_PAYLOAD, 200_000])
def test_large_payloads_lie_on_pages(size: int) -> None:
    data = build_record(b"key", bytes(size), seed=SEED, ns=1)
    record = parse_record(data, seed=SEED)
    on_pages = record.payload_offset == 4096 and record.length % 4096 == 0
    assert on_pages == (size >= LARGE_PAYLOAD)


def test_a_record_is_found_at_an_offset_of_a_larger_buffer() -> None:
    data = bytes(192) + build_record(b"key", b"value", seed=SEED, ns=1)
    record = parse_record(data, seed=SEED, offset=192)
    assert payload_of(data, record, offset=192) == b"value"


def test_the_bytes_are_those_of_format_1() -> None:
    data = build_record(b"key", b"value", seed=0x01020304, ns=5, version=6, epoch=7, seq=8, expires=9, flags=1)
    assert data[:64].hex() == (
        "4b565352" "01000100" "03005000" "05000000" "06000000" "07000000" "0800000000000000" "0900000000000000"
        "0500000000000000" "0500000000000000" "6303e0e1" "501c9c1e"
    )  # fmt: skip
    assert data[64:] == b"key" + bytes(13) + b"value" + bytes(43)


def test_every_flipped_byte_that_counts_is_noticed() -> None:
    data = bytearray(build_record(b"some key", b"some value" * 10, seed=SEED, ns=1))
    record = parse_record(data, seed=SEED)
    padding = {*range(64 + 8, record.payload_offset), *range(record.payload_offset + 100, len(data))}
    for i in range(len(data)):
        data[i] ^= 0x55
        if i in padding:
            assert parse_record(data, seed=SEED) == record
        else:
            with pytest.raises((CorruptRecord, FormatError)):
                parse_record(data, seed=SEED)
        data[i] ^= 0x55


def test_a_damaged_payload_is_noticed_only_when_it_is_looked_at() -> None:
    data = bytearray(build_record(b"key", b"value", seed=SEED, ns=1))
    data[80] ^= 1
    assert parse_record(data, seed=SEED, with_payload=False).key == b"key"
    with pytest.raises(CorruptRecord, match="payload"):
        parse_record(data, seed=SEED)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 66, 127])
def test_a_truncated_record_is_corrupt(length: int) -> None:
    data = build_record(b"key", b"value", seed=SEED, ns=1)
    with pytest.raises(CorruptRecord, match="truncated"):
        parse_record(data[:length], seed=SEED)


def test_a_record_of_another_cache_is_corrupt() -> None:
    with pytest.raises(CorruptRecord, match="header"):
        parse_record(build_record(b"key", b"value", seed=SEED, ns=1), seed=SEED + 1)


def test_a_newer_format_is_a_format_error_that_names_ours() -> None:
    data = bytearray(build_record(b"key", b"value", seed=SEED, ns=1))
    data[4] = 2
    with pytest.raises(FormatError, match="newer format than 1"):
        parse_record(data, seed=SEED)


@pytest.mark.parametrize("key", [b"", bytes(1025)])
def test_a_key_of_the_wrong_length_is_refused(key: bytes) -> None:
    with pytest.raises(InvalidKey):
        build_record(key, b"", seed=SEED, ns=1)


@given(name=st.text(min_size=0, max_size=40), number=st.integers(1, 2**32 - 1), immutable=st.booleans())
def test_a_descriptor_says_what_a_namespace_is(name: str, number: int, immutable: bool) -> None:
    namespace = NamespaceInfo(number, name, 3, 4, immutable)
    data = build_descriptor(namespace, seed=SEED)
    record = parse_record(data, seed=SEED)
    assert record.flags == NAMESPACE
    assert (record.ns, record.version, record.epoch) == (number, 3, 4)
    assert parse_descriptor(payload_of(data, record)) == namespace


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", b"\x81\xa2id\xa1x"])
def test_a_descriptor_that_makes_no_sense_is_corrupt(payload: bytes) -> None:
    with pytest.raises(CorruptRecord):
        parse_descriptor(payload)
