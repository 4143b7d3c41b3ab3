"""Records as they lie under a name in a store, and what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstrata import _core
from kvstrata.tiers.base import NamedRecord
from kvstrata.tiers.keyed_space import GENERATION_NUMBER, KeyedSpace

if TYPE_CHECKING:
    from kvstrata._core import DirtyRecord

__all__ = ["addressed", "decode"]


def _identity(name: bytes, written: int) -> bytes:
    """What a sealed payload belongs to."""
    return name + GENERATION_NUMBER.pack(written)


def addressed(name: bytes, record: DirtyRecord, space: KeyedSpace, generation: int, now: int) -> NamedRecord:
    """Return a record under its name there; unless it is encoded, its payload is sent from where it lies.

    Raises InvalidValue for one that can't be encoded.
    """
    view = record.view
    epoch = generation & 0xFFFFFFFF
    if not space.encoding.plain:
        start = record.payload_offset
        number, payload = space.encoding.encode(
            view[start : start + record.stored_len], _identity(name, now), record.key
        )
        if number:
            whole = _core.encode_record(
                view, payload, codec=number, seed=space.seed, ns=0, version=space.version, epoch=epoch, seq=now
            )
            return NamedRecord(name, (whole,), record.expires)
    frame = _core.readdressed_frame(view, seed=space.seed, ns=0, version=space.version, epoch=epoch, seq=now)
    return NamedRecord(name, (frame, view[len(frame) :]), record.expires)


def decode(space: KeyedSpace, name: bytes, written: int, number: int, payload: memoryview, length: int) -> memoryview:
    """Return the value of an encoded record; raises CorruptRecord, and WrongKey."""
    return memoryview(space.encoding.decode(number, payload, _identity(name, written), length)).toreadonly()
