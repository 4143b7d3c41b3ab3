"""Payloads have the bytes of docs/format.md: those that were once written stay readable."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from kvstrata import _core
from kvstrata.codecs import AXES, TensorInfo, codec, decoder

VALUE = np.array([[1, 2, 3, 4.5], [0, -1, 0.5, 8]], np.float32)
TENSOR = TensorInfo("float32", (1, 2, 1, 1, 4), AXES)
REPEATED = np.repeat(VALUE, 16)

# Written by version 1 of the payloads; never to be changed.
PAYLOADS = {
    "lz4": (
        "010100000100000000020000000000000000080077e75c8f330000004f0000803f04002b2f004004002b1f4004002c1f"
        "9004002c0f02002d2f80bf04002b2f003f04002c1f41040024504100000041"
    ),
    "zstd": (
        "0201040001000000000200000000000000000800063ea129000000002900000028b52ffd600001fd0000680000803f00"
        "40409080bf003f410804270182006f87054170046ca06d9705"
    ),
    "planes:width=4": (
        "030104000100000000020000000000000000080072d00f18040000006e0000001600000011000000180000001f000000"
        "28b52ffd20806d000020000001000310008d7477512c28b52ffd208045000010000001003b055828b52ffd20807d0000"
        "28000080200004100094a4bb8e896d28b52ffd2080b50000407f7f8081007f7e820710009d74d7b14eba6b98dc06"
    ),
    "int8:4,keys=token": (
        "04011800010000002000000000000000000008000acf682e010102000400000001000000040000000100000002020000"
        "100000000723003c004992ff852800bc1c002aff"
    ),
    "int4:2,scales=f8": (
        "0501180001000000200000000000000000000800552ce631010204010200000001000000040000000100000002040000"
        "1600000000000000003c0040004280440000597000bc00380ef0"
    ),
    "fp8-e4m3": (
        "06011800010000002000000000000000000008005f0c193c010301000100000001000000040000000100000002010000"
        "100000000000803c687074790000003d00e05878"
    ),
}


@pytest.mark.parametrize("spec", PAYLOADS)
def test_a_payload_of_version_1_is_read(spec: str) -> None:
    payload = bytes.fromhex(PAYLOADS[spec])
    made = codec(spec)
    found = np.frombuffer(decoder(made.id).decode(payload), np.float32)
    if made.lossy:
        assert np.abs(found - VALUE.ravel()).max() <= {"int8": 0.018, "int4": 0.016, "fp8-e4m3": 0}[made.name]
        assert bytes(made.encode(VALUE, TENSOR)) == payload
    else:
        assert found.tolist() == REPEATED.tolist()


@pytest.mark.parametrize("spec", PAYLOADS)
def test_the_header_is_the_one_of_the_manual(spec: str) -> None:
    payload = bytes.fromhex(PAYLOADS[spec])
    number, version, options, chunks, value_len, chunk, crc = struct.unpack_from("<BBHIQII", payload)
    made = codec(spec)
    assert (number, version, chunks) == (made.id, 1, 1)
    assert value_len == (VALUE if made.lossy else REPEATED).nbytes
    assert chunk >= value_len
    assert crc == _core.crc32c(payload[:20] + payload[24 : 24 + options + 4 * chunks])
    (length,) = struct.unpack_from("<I", payload, 24 + options)
    assert 24 + options + 4 + length == len(payload)


def test_the_options_of_a_quantized_payload_are_those_of_the_manual() -> None:
    payload = codec("int4:8,scales=bf16/f32,keys=token,hadamard=k").encode(
        np.zeros((3, 2, 5, 7, 16), np.uint16), TensorInfo("float16", (3, 2, 5, 7, 16), AXES)
    )
    fields = struct.unpack_from("<BBBBIIIIBB", memoryview(payload), 24)
    assert fields == (2, 2, 3, 2, 8, 7, 16, 5, 2, 1)


def test_a_newer_version_of_a_payload_is_refused() -> None:
    payload = bytearray(codec("lz4").encode(bytes(1000)))
    payload[1] = 2
    payload[20:24] = struct.pack("<I", _core.crc32c(bytes(payload[:20]) + bytes(payload[24:28])))
    with pytest.raises(Exception, match="version 2; this release reads 1"):
        codec("lz4").decode(payload)
