"""What is in a segment file: its first page, then records one after the other. See docs/format.md."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvstrata import _core
from kvstrata.errors import CorruptRecord, FormatError
from kvstrata.record import NAMESPACE, PAGE, Record, parse_record, payload_of
from kvstrata.tiers.blockio import page_ceil
from kvstrata.tiers.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMAT", "MAX_NUMBER", "NAME", "pack_header", "read_header", "scan", "stored_seed"]

FORMAT = 1
MAX_NUMBER = 99_999_999
NAME = re.compile(r"seg-(\d{8})\.kvs")
_HEADER = struct.Struct("<4sB3xII44xI")  # magic, format, number, seed, checksum of the 60 bytes before
_MAGIC = b"KVSS"
_NEAR = 8 << 10  # bytes that are read at a time where records are large; more than any header with its key
_FAR = 256 << 10  # and where they are small


def pack_header(number: int, seed: int) -> bytes:
    """Return the first page of a segment."""
    data = _HEADER.pack(_MAGIC, FORMAT, number, seed, 0)[:-4]
    return (data + _core.crc32c(data).to_bytes(4, "little")).ljust(PAGE, b"\0")


def read_header(path: Path) -> tuple[int, int] | None:
    """Return (number, seed) from the first page of a segment, None when it is damaged or gone.

    Raises FormatError when a newer release wrote it.
    """
    try:
        with path.open("rb", buffering=0) as file:
            data = file.read(_HEADER.size)
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    magic, version, number, seed, checksum = _HEADER.unpack(data)
    if magic != _MAGIC or _core.crc32c(data[:-4]) != checksum:
        return None
    if version > FORMAT:
        raise FormatError(f"{path} has format {version}; this release reads up to {FORMAT}")
    return number, seed


def stored_seed(directory: Path) -> int | None:
    """Return the checksum seed of the cache that has records in `directory`, None when there is none.

    Raises FormatError when a newer release wrote them.
    """
    if not directory.is_dir():
        return None
    ledger = Ledger(directory)
    try:
        if ledger.path.exists():
            with ledger.hold():
                mark = ledger.read()
            if mark is not None:
                return mark.seed
    finally:
        ledger.close()
    for name in sorted((entry.name for entry in directory.iterdir() if NAME.fullmatch(entry.name)), reverse=True):
        header = read_header(directory / name)
        if header is not None:
            return header[1]
    return None


def scan(fd: int, seed: int) -> Iterator[tuple[int, Record, memoryview | None]]:
    """Yield (offset, record, payload of a namespace descriptor) for every record, in order.

    Payloads of other records are neither read nor checked. Ends at the first thing that isn't a record.
    """
    size = os.fstat(fd).st_size
    position, start = PAGE, 0
    window = memoryview(b"")
    while position < size:
        if position - start + _NEAR > len(window) and start + len(window) < size:
            is_far = position > start + len(window) + _NEAR
            start, window = position, memoryview(os.pread(fd, _NEAR if is_far else _FAR, position))
        at = position - start
        try:
            record = parse_record(window, seed=seed, with_payload=False, offset=at)
        except (CorruptRecord, FormatError):
            # Between batches there are zeros up to the next page, and nothing else.
            boundary = page_ceil(position)
            if boundary == position or any(window[at : boundary - start]):
                return
            position = boundary
            continue
        if position + record.length > size:
            return
        payload = None
        if record.flags & NAMESPACE:
            whole = os.pread(fd, record.length, position)
            try:
                parse_record(whole, seed=seed)
            except CorruptRecord:
                return
            payload = payload_of(whole, record)
        yield position, record, payload
        position += record.length
