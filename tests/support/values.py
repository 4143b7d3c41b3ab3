"""Values that tell which key they belong to and which put they come from, so that a wrong one is seen."""

from __future__ import annotations

import hashlib
import struct

_HEAD = struct.Struct("<QQ16s")
SMALLEST = _HEAD.size  # bytes


def make_value(key: bytes, serial: int, size: int) -> bytes:
    """The value of put number `serial` to `key`: `size` bytes, at least SMALLEST, no two of them alike."""
    digest = hashlib.blake2b(key + struct.pack("<QQ", serial, size), digest_size=64).digest()
    body = size - SMALLEST
    return _HEAD.pack(serial, size, digest[:16]) + (digest * (body // 64 + 1))[:body]


def serial_of(key: bytes, value: bytes) -> int:
    """The number of the put that the value comes from; AssertionError if it isn't one of this key."""
    assert len(value) >= SMALLEST, f"{key!r} has a value of {len(value)} bytes"
    serial, size, _ = _HEAD.unpack_from(value)
    assert size == len(value), f"{key!r} has {len(value)} bytes of a value of {size}"
    assert value == make_value(key, serial, size), f"{key!r} has a value that nobody put (serial {serial})"
    return int(serial)
