"""Records on their way from disk into memory, many at a time and checked as they arrive."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstrata.errors import CorruptRecord, FormatError
from kvstrata.record import TAGGED, NamespaceInfo, parse_record, payload_of
from kvstrata.tiers.base import Arrived, Key
from kvstrata.tiers.blockio import SHORT_READ, Read, aligned_buffer
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.counters import Counters, errno_name
from kvstrata.tiers.segments import SegmentSet

if TYPE_CHECKING:
    from kvstrata._core import Pin, Store, Write

__all__ = ["Loaded", "Loader", "key_bytes"]

Loaded = list["Pin | memoryview | None"]

_AT_ONCE = 64  # blocks of memory that are claimed before they are filled


class Loader:
    """Loads records for a disk tier.

    `describe(ns)` returns what the catalog says of a namespace, None when it can't be asked.
    `forget(ns, records)` is given key and number of those that proved to be wrong; returns False if it can't forget.
    """

    def __init__(
        self,
        store: Store,
        segments: SegmentSet,
        counters: Counters,
        breaker: Breaker,
        *,
        describe: Callable[[int], NamespaceInfo | None],
        forget: Callable[[int, list[tuple[bytes, int]]], bool],
    ) -> None:
        self._store = store
        self._segments = segments
        self._counters = counters
        self._breaker = breaker
        self._describe = describe
        self._forget = forget

    def load(self, ns: int, keys: Sequence[Key], arrived: Arrived | None = None) -> Loaded:
        """Return the values: promoted to memory and pinned, or in private memory where the tier has no room.

        None means that a key is not on disk, is in memory already, or could not be read. `arrived(position, value)` is
        called for each value as soon as it is there, from any thread.
        """
        results: Loaded = [None] * len(keys)
        loads = [
            _Load(position, key_bytes(key), *location)
            for position, (key, location) in enumerate(zip(keys, self._store.find_on_disk(ns, keys), strict=True))
            if location is not None
        ]
        for start in range(0, len(loads), _AT_ONCE):
            if not self._breaker.allow():
                self._counters.add("refused_loads", len(loads) - start)
                break
            if self._load_some(ns, loads[start : start + _AT_ONCE], results, arrived):
                self._breaker.success()
        return results

    def _load_some(self, ns: int, loads: list[_Load], results: Loaded, arrived: Arrived | None) -> bool:
        """Load some; returns whether the device did what it should."""
        writes: list[Write | None] = []
        reads: list[Read] = []
        lost: list[tuple[bytes, int]] = []
        faults: dict[int, str] = {}  # errno -> where
        for load in loads:
            write = self._store.begin_load(ns, load.key, load.entry, load.seq, load.length)
            buffer = aligned_buffer(load.length) if write is None else write.view()
            writes.append(write)
            reads.append(Read(load.segment, load.offset, buffer))

        def done(index: int, error: int) -> None:
            load, write = loads[index], writes[index]
            if error:
                if write is not None:
                    write.abort()
                if error in (errno.ENOENT, SHORT_READ):
                    lost.append((load.key, load.seq))
                    self._counters.add("vanished_records")
                else:
                    place = self._segments.path_of(load.segment)
                    faults[error] = f"{place} can't be read: {os.strerror(error)}"
                    self._counters.fault(errno_name(error), faults[error])
                return
            try:
                value = self._checked(ns, load, reads[index].buffer) if write is None else write.commit()
            except CorruptRecord as corrupt:
                if write is not None:
                    write.abort()
                lost.append((load.key, load.seq))
                self._store.count_corrupt()
                self._counters.add("corrupt_records")
                self._counters.fault("corrupt", f"segment {load.segment}, byte {load.offset}: {corrupt}")
                return
            if value is not None:
                results[load.position] = value
                self._counters.add("loaded_records")
                self._counters.add("loaded_bytes", load.length)
                if write is None:
                    self._counters.add("unpromoted_records")
                if arrived is not None:
                    arrived(load.position, value)

        self._segments.read(reads, done)
        if lost and not self._forget(ns, lost):
            return False
        for code, told in faults.items():
            self._breaker.failure(errno_name(code), told)
            break
        return not faults

    def _checked(self, ns: int, load: _Load, data: memoryview) -> memoryview | None:
        """Return the value of a record in private memory if it still counts, as the store would check it.

        Raises CorruptRecord.
        """
        try:
            record = parse_record(data, seed=self._store.seed)
        except FormatError as error:
            raise CorruptRecord(str(error)) from error
        if (record.ns, record.key, record.seq, record.length) != (ns, load.key, load.seq, load.length):
            raise CorruptRecord("another record lies in its place")
        info = self._describe(ns)
        if info is None or (record.version, record.epoch) != (info.version, info.epoch):
            return None
        if record.flags & TAGGED:
            return None  # only the store knows whether its tags still count
        if 0 < record.expires <= time.time_ns() // 1_000_000:
            return None
        return payload_of(data, record).toreadonly()


class _Load(NamedTuple):
    """A record to be loaded, and where it lies; `position` among the keys that were asked for."""

    position: int
    key: bytes
    entry: int
    seq: int
    segment: int
    offset: int
    length: int


def key_bytes(key: Key) -> bytes:
    """Return a key as it is stored."""
    return key.encode() if isinstance(key, str) else bytes(key)
