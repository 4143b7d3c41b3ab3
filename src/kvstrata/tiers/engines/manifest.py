"""Checks a RocksDB MANIFEST before RocksDB reads it, as it can hang at a damaged one.

The format is that of RocksDB's logs (https://github.com/facebook/rocksdb/wiki/Write-Ahead-Log-File-Format): blocks of
32 KiB, in which each record has a masked crc32c of all that follows the length (4 bytes), the length of its payload
(2 bytes) and a type (1 byte); types 5 to 8 have the log's number (4 bytes) before the payload. All is little endian.
"""

from __future__ import annotations

import struct
from pathlib import Path

from kvstrata.errors import CorruptRecord

__all__ = ["check_manifest", "crc32c"]

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_LAST_TYPE = 8
_RECYCLABLE = range(5, 9)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _unmasked(crc: int) -> int:
    rotated = (crc - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def check_manifest(directory: Path) -> None:
    """Raise CorruptRecord unless CURRENT names a MANIFEST all of whose records are whole; OSError if unreadable."""
    current = (directory / "CURRENT").read_bytes()
    name = current.removesuffix(b"\n")
    if not name.startswith(b"MANIFEST-") or not name[9:].isdigit() or len(name) == len(current):
        raise CorruptRecord(f"CURRENT names no MANIFEST: {current[:40]!r}")
    data = (directory / name.decode()).read_bytes()
    records = 0
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        at = 0
        while len(block) - at >= _HEADER.size:
            crc, length, kind = _HEADER.unpack_from(block, at)
            end = at + _HEADER.size + length + (4 if kind in _RECYCLABLE else 0)
            if not 1 <= kind <= _LAST_TYPE or end > len(block) or crc32c(block[at + 6 : end]) != _unmasked(crc):
                raise CorruptRecord(f"{name.decode()} is damaged at byte {start + at:,}")
            at = end
            records += 1
        if any(block[at:]):
            raise CorruptRecord(f"{name.decode()} is damaged at byte {start + at:,}")
    if not records:
        raise CorruptRecord(f"{name.decode()} is empty")
