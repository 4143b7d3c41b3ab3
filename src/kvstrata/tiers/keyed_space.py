"""Where the records of a namespace are in a store that several hosts use: its names, and its generation."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import blake3

from kvstrata.errors import CorruptRecord
from kvstrata.record import NAMESPACE, parse_record, payload_of
from kvstrata.tiers.base import Key
from kvstrata.tiers.encodings import Encoding

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstrata.tiers.presence import NameFilter, Roll

__all__ = ["GENERATION", "GENERATION_NUMBER", "MAX_PREFIX", "KeyedSpace"]

MAX_PREFIX = 64
"""Bytes that a prefix of names can have."""

GENERATION = b"generation"
"""The key of the record that holds it."""
GENERATION_NUMBER = struct.Struct("<Q")

_CONTEXT = "kvstrata 2026-11 remote namespace"
_LONGEST_KEY = 64  # bytes that stand in a name as they are; of longer keys their digest does


class KeyedSpace:
    """A namespace in such a tier: what its names start with, and a copy of its generation."""

    def __init__(self, prefix: bytes, name: str, version: int, encoding: Encoding) -> None:
        identity = struct.pack("<I", len(name.encode())) + name.encode() + struct.pack("<I", version)
        digest = blake3.blake3(identity, derive_key_context=_CONTEXT).digest(length=20)
        self.start = prefix + b":" + digest[:16]
        self.seed = int.from_bytes(digest[16:], "little")
        self.version = version
        self.encoding = encoding
        self.generation: int | None = None  # None: there is none, or nobody has looked yet
        self.known_at = float("-inf")  # when it was looked at, monotonic
        self.known_in: object = None  # and in which state of this host
        self.uncleared = False  # a clear() could not be made there: nothing counts until it is
        self.roll: Roll | None = None  # where it says that it writes without publishing, if it does
        self.filter: NameFilter | None = None  # which keys may be there, if somebody keeps that

    @property
    def generation_name(self) -> bytes:
        """Where the generation stands."""
        return self.start + b"g"

    def names(self, keys: Sequence[Key], generation: int) -> list[bytes]:
        """Return the names of keys' records."""
        start = self.start + b"r" + GENERATION_NUMBER.pack(generation)
        named = []
        for key in keys:
            data = key.encode() if isinstance(key, str) else bytes(key)
            named.append(start + (b"k" + data if len(data) <= _LONGEST_KEY else b"d" + blake3.blake3(data).digest()))
        return named

    def generation_in(self, data: Buffer | None) -> int | None:
        """Return the generation that a record holds, None where there is none; raises CorruptRecord, FormatError."""
        if data is None:
            return None
        record = parse_record(data, seed=self.seed)
        if record.key != GENERATION or not record.flags & NAMESPACE or record.stored_len != GENERATION_NUMBER.size:
            raise CorruptRecord("this is no generation")
        number: int = GENERATION_NUMBER.unpack(payload_of(data, record))[0]
        return number
