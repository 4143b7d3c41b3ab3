"""Records as Python sees them: names for what the core packs and checks. docs/format.md has the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvstrata import _core
from kvstrata.errors import CorruptRecord, FormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "ENCODED",
    "FORMAT",
    "IMMUTABLE",
    "LARGE_PAYLOAD",
    "NAMESPACE",
    "PAGE",
    "TAGGED",
    "UNIT",
    "NamespaceInfo",
    "Record",
    "build_descriptor",
    "build_record",
    "parse_descriptor",
    "parse_record",
    "payload_of",
    "payload_start",
]

FORMAT = 1
"""The record format that this release writes, and the newest that it reads."""

IMMUTABLE = 1
"""Flag: the key implies the value."""

NAMESPACE = 2
"""Flag: the payload describes a namespace."""

TAGGED = 4
"""Flag: it has tags, which only its row in the catalog tells."""

ENCODED = 8
"""Flag: the payload isn't the value itself, but what a codec made of it, or a seal."""

UNIT = 64
"""Bytes: every record starts at a multiple of this and is a multiple of it long."""

PAGE = 4096
"""Bytes: the same for records with a large payload."""

LARGE_PAYLOAD = 65536
"""Bytes of payload from which on a record and its payload lie on pages."""

_HEADER = 64  # bytes
_NEWER_FORMAT = 2  # RecordCheck::newer_format


class Record(NamedTuple):
    """The header of a record, checked, and its key. Lengths in bytes, `length` with all padding."""

    key: bytes
    ns: int
    version: int
    epoch: int
    seq: int
    expires: int
    flags: int
    codec: int
    value_len: int
    stored_len: int
    payload_offset: int
    length: int


class NamespaceInfo(msgspec.Struct, frozen=True):
    """What is known of a namespace outside memory: what its descriptor record and its catalog row hold."""

    id: int
    name: str
    version: int = 1
    epoch: int = 0
    immutable: bool = False


def build_record(
    key: Buffer,
    payload: Buffer,
    *,
    seed: int,
    ns: int,
    version: int = 0,
    epoch: int = 0,
    seq: int = 0,
    expires: int = 0,
    flags: int = 0,
) -> bytes:
    """Return the bytes of a raw record, padding included."""
    return _core.build_record(
        key, payload, seed=seed, ns=ns, version=version, epoch=epoch, seq=seq, expires=expires, flags=flags
    )


def parse_record(data: Buffer, *, seed: int, with_payload: bool = True, offset: int = 0) -> Record:
    """Check the record at `offset`; with `with_payload` all of it, else header and key only.

    Raises CorruptRecord when it isn't whole and in order, FormatError when its format is newer than FORMAT.
    """
    check, meaning, *fields = _core.parse_record(data, seed, with_payload, offset)
    if check == 0:
        return Record(*fields)
    if check == _NEWER_FORMAT:
        raise FormatError(f"{meaning} than {FORMAT}, the newest that this release reads")
    raise CorruptRecord(f"at byte {offset}: {meaning}")


def payload_of(data: Buffer, record: Record, *, offset: int = 0) -> memoryview:
    """Return the stored payload of the record at `offset` of `data`, without a copy."""
    start = offset + record.payload_offset
    return memoryview(data)[start : start + record.stored_len]


def payload_start(key_len: int, stored_len: int) -> int:
    """Return at which byte of a record with such lengths the payload starts."""
    if stored_len >= LARGE_PAYLOAD:
        return PAGE
    step = UNIT if stored_len >= PAGE else 16
    return -(-(_HEADER + key_len) // step) * step


def build_descriptor(namespace: NamespaceInfo, *, seed: int) -> bytes:
    """Return the record that stands in a segment before the first record of a namespace."""
    return build_record(
        namespace.name.encode() or b"\0",
        msgspec.msgpack.encode(namespace),
        seed=seed,
        ns=namespace.id,
        version=namespace.version,
        epoch=namespace.epoch,
        flags=NAMESPACE,
    )


def parse_descriptor(payload: Buffer) -> NamespaceInfo:
    """Return what a descriptor's payload says; raises CorruptRecord."""
    try:
        return msgspec.msgpack.decode(payload, type=NamespaceInfo)
    except msgspec.MsgspecError as error:
        raise CorruptRecord(f"a namespace descriptor can't be read: {error}") from error
