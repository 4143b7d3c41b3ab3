"""Records on their way from disk into memory, many at a time and checked as they arrive."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstrata import _core
from kvstrata.errors import CorruptRecord, FormatError, WrongKey
from kvstrata.record import TAGGED, NamespaceInfo, Record, parse_record, payload_of, payload_start
from kvstrata.tiers.base import Arrived, Key
from kvstrata.tiers.blockio import SHORT_READ, Read, aligned_buffer
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.counters import Counters, errno_name
from kvstrata.tiers.encodings import Encodings
from kvstrata.tiers.segments import SegmentSet

if TYPE_CHECKING:
    from kvstrata._core import LoadClaim, Pin, Store, Write

__all__ = ["Load", "Loaded", "Loader", "key_bytes"]

Loaded = list["Pin | memoryview | None"]

_AT_ONCE = 64  # blocks of memory that are claimed before they are filled
_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.01
_PATIENCE_S = 5.0  # with somebody else who is loading the same, before it is loaded a second time


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
        encodings: Encodings,
        *,
        describe: Callable[[int], NamespaceInfo | None],
        forget: Callable[[int, list[tuple[bytes, int]]], bool],
    ) -> None:
        self._store = store
        self._segments = segments
        self._counters = counters
        self._breaker = breaker
        self._encodings = encodings
        self._describe = describe
        self._forget = forget

    def load(self, ns: int, keys: Sequence[Key], arrived: Arrived | None = None) -> Loaded:
        """Return the values: promoted to memory and pinned, or in private memory where the tier has no room.

        None means that a key is not on disk, is in memory already, or could not be read. `arrived(position, value)` is
        called for each value as soon as it is there, from any thread. What somebody else is loading, in whichever
        process, is waited for and not read again: then it is in memory.
        """
        results: Loaded = [None] * len(keys)
        others = self._load_all(ns, self.located(ns, list(enumerate(map(key_bytes, keys)))), results, arrived)
        if others:
            self._counters.add("shared_loads", len(others))
        pause = _FIRST_PAUSE_S
        patient_until = time.monotonic() + _PATIENCE_S
        while others:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            there = self.located(ns, [(load.position, load.key) for load in others])  # still
            others = self._load_all(ns, there, results, arrived, take_over=time.monotonic() >= patient_until)
        return results

    def located(self, ns: int, keys: list[tuple[int, bytes]]) -> list[Load]:
        """Return those that lie on disk only; `keys` are position and key."""
        locations = self._store.find_on_disk(ns, [key for _, key in keys])
        return [Load(place, key, *at) for (place, key), at in zip(keys, locations, strict=True) if at is not None]

    def _load_all(
        self, ns: int, loads: list[Load], results: Loaded, arrived: Arrived | None, *, take_over: bool = False
    ) -> list[Load]:
        """Load what nobody else is loading, or with `take_over` all; returns the others."""
        others: list[Load] = []
        for start in range(0, len(loads), _AT_ONCE):
            if not self._breaker.allow():
                self._counters.add("refused_loads", len(loads) - start)
                break
            mine: list[tuple[Load, Write | LoadClaim | None]] = []
            for load in loads[start : start + _AT_ONCE]:
                claim = self._claim(ns, load, take_over)
                if claim is _core.LOADING:
                    others.append(load)
                else:
                    mine.append((load, claim))
            if self._load_some(ns, mine, results, arrived):
                self._breaker.success()
        return others

    def _claim(self, ns: int, load: Load, take_over: bool) -> Any:
        """Return where to read it to, None for private memory, or a claim of what has to be decoded first."""
        if load.encoded:
            return self._store.claim_load(load.entry, load.seq, take_over)
        return self._store.begin_load(ns, load.key, load.entry, load.seq, load.length, take_over)

    def _load_some(
        self, ns: int, loads: list[tuple[Load, Write | LoadClaim | None]], results: Loaded, arrived: Arrived | None
    ) -> bool:
        """Load some; returns whether the device did what it should."""
        reads: list[Read] = []
        lost: list[Load] = []
        sealed: list[Load] = []
        faults: list[tuple[Load, int]] = []
        for load, place in loads:
            buffer = place.view() if isinstance(place, _core.Write) else aligned_buffer(load.length)
            reads.append(Read(load.segment, load.offset, buffer))

        def done(index: int, error: int) -> None:
            load, place = loads[index]
            if error:
                if isinstance(place, _core.Write):
                    place.abort()
                if self.unread(load, error):
                    lost.append(load)
                else:
                    faults.append((load, error))
                return
            try:
                if isinstance(place, _core.Write):
                    value: Pin | memoryview | None = place.commit()
                else:
                    value = self._decoded(ns, load, reads[index].buffer, place)
            except CorruptRecord as corrupt:
                if isinstance(place, _core.Write):
                    place.abort()
                lost.append(load)
                self.damaged(load, corrupt)
                return
            except WrongKey as wrong:  # somebody may have the right one
                self._counters.add("sealed_records")
                self._counters.fault("key", wrong)
                sealed.append(load)
                return
            if value is not None:
                results[load.position] = value
                if arrived is not None:
                    arrived(load.position, value)

        try:
            self._segments.read(reads, done)
        finally:
            there = [load for load, _ in loads if results[load.position] is not None]
            self._counters.add("loaded_records", len(there))
            self._counters.add("loaded_bytes", sum(load.length for load in there))
            private = sum(isinstance(results[load.position], memoryview) for load in there)
            self._counters.add("unpromoted_records", private)
        if sealed and self._can_be_put_again(ns):
            lost += sealed
        if lost and not self.forget(ns, lost):
            return False
        if faults:
            self.failed(*faults[0])
        return not faults

    def allowed(self) -> bool:
        """Say whether the device is asked at all."""
        return self._breaker.allow()

    def succeeded(self) -> None:
        """Note that the device did what it should."""
        self._breaker.success()

    def failed(self, load: Load, error: int) -> None:
        """Note that the device failed."""
        self._breaker.failure(errno_name(error), self._told(load, error))

    def unread(self, load: Load, error: int) -> bool:
        """Count that a record could not be read; returns whether that is because it isn't there."""
        if error in (errno.ENOENT, SHORT_READ):
            self._counters.add("vanished_records")
            return True
        self._counters.fault(errno_name(error), self._told(load, error))
        return False

    def _told(self, load: Load, error: int) -> str:
        return f"{self._segments.path_of(load.segment)} can't be read: {os.strerror(error)}"

    def damaged(self, load: Load, corrupt: CorruptRecord) -> None:
        """Count a record that isn't what was stored."""
        self._store.count_corrupt()
        self._counters.add("corrupt_records")
        self._counters.fault("corrupt", f"segment {load.segment}, byte {load.offset}: {corrupt}")

    def forget(self, ns: int, lost: list[Load]) -> bool:
        """Drop records that proved to be wrong, unless they have been moved meanwhile; False if that can't be done."""
        now = self._store.find_on_disk(ns, [load.key for load in lost])
        lost = [load for load, at in zip(lost, now, strict=True) if at and at[2:4] == (load.segment, load.offset)]
        return not lost or self._forget(ns, [(load.key, load.seq) for load in lost])

    def _can_be_put_again(self, ns: int) -> bool:
        """Say whether a key implies its value: who needs it computes it then, but can't put it while it is there."""
        info = self._describe(ns)
        return info is not None and info.immutable

    def checked(self, ns: int, load: Load, data: memoryview) -> bool:
        """Say whether a raw record in private memory still counts; raises CorruptRecord."""
        return self._counts(self._parsed(ns, load, data))

    def _decoded(self, ns: int, load: Load, data: memoryview, claim: LoadClaim | None) -> Pin | memoryview | None:
        """Return the value of a record that was read to private memory; promoted where it had to be decoded.

        None where it doesn't count any more. Raises CorruptRecord, and WrongKey where it was encrypted under a key that
        isn't known.
        """
        record = self._parsed(ns, load, data)
        payload = payload_of(data, record)
        write: Write | None = None
        if claim is not None:
            length = _core.record_bytes(len(record.key), record.value_len)
            write = self._store.begin_load(ns, load.key, load.entry, load.seq, length, claim=claim)
        if write is None:
            if not self._counts(record):
                return None
            if not load.encoded:
                return payload.toreadonly()
            value = memoryview(bytearray(record.value_len))
            self._encodings.decode_into(record, payload, value)
            return value.toreadonly()
        try:
            view = write.view()
            start = payload_start(len(record.key), record.value_len)
            self._encodings.decode_into(record, payload, view[start : start + record.value_len])
            _core.decode_record(data, view, seed=self._store.seed)
            return write.commit()
        except BaseException:
            write.abort()
            raise

    def _parsed(self, ns: int, load: Load, data: memoryview) -> Record:
        """Check that it is the record that should be there; raises CorruptRecord."""
        try:
            record = parse_record(data, seed=self._store.seed)
        except FormatError as error:
            raise CorruptRecord(str(error)) from error
        if (record.ns, record.key, record.seq, record.length) != (ns, load.key, load.seq, load.length):
            raise CorruptRecord("another record lies in its place")
        return record

    def _counts(self, record: Record) -> bool:
        """Say whether it counts still, as the store would."""
        info = self._describe(record.ns)
        if info is None or (record.version, record.epoch) != (info.version, info.epoch):
            return False
        if record.flags & TAGGED:
            return False  # only the store knows whether its tags still count
        return not 0 < record.expires <= time.time_ns() // 1_000_000


class Load(NamedTuple):
    """A record to be loaded, and where it lies; `position` among the keys that were asked for."""

    position: int
    key: bytes
    entry: int
    seq: int
    segment: int
    offset: int
    length: int
    encoded: bool


def key_bytes(key: Key) -> bytes:
    """Return a key as it is stored."""
    return key.encode() if isinstance(key, str) else bytes(key)
