"""Records on their way from disk into memory piece by piece, so that one piece can be used while others are read.

A record's checksum is of all of it. Who uses a piece before has to know by other means that it is in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstrata import _core
from kvstrata.errors import CorruptRecord, FormatError, TierUnavailable
from kvstrata.forking import after_fork
from kvstrata.record import PAGE, Record, parse_record
from kvstrata.tiers.base import Key
from kvstrata.tiers.blockio import OpenSegments, Read, aligned_buffer, is_aligned
from kvstrata.tiers.counters import Counters
from kvstrata.tiers.loading import Load, Loader, key_bytes
from kvstrata.tiers.segments import SegmentSet

if TYPE_CHECKING:
    from kvstrata._core import Store, Write

__all__ = ["Part", "PartLoader"]

_MOST_ARRIVALS = 512
"""Blocks of memory that are claimed at once for records that come in pieces; a client can claim 960 in all."""
_MOST_PRIVATE_BYTES = 256 << 20


class Part:
    """A record of which pieces are there. `buffer` is as long as all of it, on pages, in the arena or private."""

    def __init__(self, ns: int, load: Load, write: Write | None) -> None:
        self.ns = ns
        self.load = load
        self.position = load.position
        self.write = write
        self.buffer = aligned_buffer(load.length) if write is None else write.view()

    @property
    def segment(self) -> int:
        """In which file it lies."""
        return self.load.segment

    def piece(self, start: int, stop: int) -> Read:
        """Return what reads it from byte `start` to `stop`, both whole pages."""
        return Read(self.segment, self.load.offset + start, self.buffer[start:stop])


class PartLoader:
    """Loads records of a disk tier piece by piece. Threads may share one.

    Each part that `begin` returns has to be ended by one of `finish`, `unread`, `damaged` and `abort`.
    """

    name = "disk"

    def __init__(self, store: Store, segments: SegmentSet, counters: Counters, loader: Loader, *, depth: int) -> None:
        self._store = store
        self._segments = segments
        self._counters = counters
        self._loader = loader
        self.depth = depth
        self._lock = threading.Lock()
        self._arrivals = 0
        self._private_bytes = 0
        after_fork(self)

    def begin(self, ns: int, keys: Sequence[Key], length: int) -> list[Part]:
        """Claim records of `length` bytes that lie on disk only, as many as there is room for, from the first on.

        Left out are those that lie elsewhere, are of another length, don't lie on pages, or that somebody else is
        bringing up.
        """
        parts: list[Part] = []
        try:
            for load in self._loader.located(ns, [(i, key_bytes(key)) for i, key in enumerate(keys)]):
                if load.encoded or load.length != length or length % PAGE or load.offset % PAGE:
                    continue
                with self._lock:
                    if self._arrivals >= _MOST_ARRIVALS:
                        break
                    self._arrivals += 1
                try:
                    write = self._store.begin_load(ns, load.key, load.entry, load.seq, load.length)
                except BaseException:
                    self._leave(arrivals=1)
                    raise
                if write is _core.LOADING:
                    self._leave(arrivals=1)
                    continue
                if write is None:
                    self._leave(arrivals=1)
                    with self._lock:
                        if self._private_bytes + load.length > _MOST_PRIVATE_BYTES:
                            break
                        self._private_bytes += load.length
                parts.append(Part(ns, load, write))
                if not is_aligned(parts[-1].buffer):
                    self.abort(parts.pop())
                # Whoever is allowed to find out whether the device works again has to read from it.
                elif len(parts) == 1 and not self._loader.allowed():
                    self.abort(parts.pop())
                    break
        except TierUnavailable:
            pass  # somebody holds as much as there may be: what is left out is loaded in another way
        except BaseException:
            for part in parts:
                self.abort(part)
            raise
        return parts

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run jobs that read, as many at a time as there are transfers; each begins in its turn."""
        self._segments.run(jobs)

    def opened(self) -> OpenSegments:
        """Return what reads pieces; close it when all are read."""
        return self._segments.opened()

    def header(self, part: Part) -> Record:
        """Return a part's header, whose pages are there; raises CorruptRecord unless it is the right record's."""
        try:
            record = parse_record(part.buffer, seed=self._store.seed, with_payload=False)
        except FormatError as error:
            raise CorruptRecord(str(error)) from error
        load = part.load
        if (record.ns, record.key, record.seq, record.length) != (part.ns, load.key, load.seq, load.length):
            raise CorruptRecord("another record lies in its place")
        return record

    def finish(self, part: Part, payload_crc: int) -> bool:
        """Publish a record of which all pieces are there; returns whether it still counts and was in order.

        `payload_crc` is the payload's checksum, of which the caller has taken all parts already.
        """
        try:
            if part.write is None:
                there = self._loader.checked(part.ns, part.load, part.buffer)
            else:
                pin = part.write.commit(payload_crc)
                there = pin is not None
                if pin is not None:
                    pin.release()
        except CorruptRecord as corrupt:
            self.damaged(part, corrupt)
            return False
        except BaseException:
            self.abort(part)
            raise
        self.abort(part)  # lets go of what is left
        self._loader.succeeded()
        if there:
            self._counters.add("loaded_records")
            self._counters.add("loaded_bytes", part.load.length)
            if part.write is None:
                self._counters.add("unpromoted_records")
        return there

    def unread(self, part: Part, error: int) -> None:
        """End a part of which a piece could not be read."""
        self.abort(part)
        if self._loader.unread(part.load, error):
            self._loader.forget(part.ns, [part.load])
        else:
            self._loader.failed(part.load, error)

    def damaged(self, part: Part, corrupt: CorruptRecord) -> None:
        """End a part that proved to be something else than what was stored."""
        self.abort(part)
        self._loader.damaged(part.load, corrupt)
        self._loader.forget(part.ns, [part.load])

    def abort(self, part: Part) -> None:
        """End a part without publishing anything."""
        if part.write is None:
            self._leave(private_bytes=len(part.buffer))
        else:
            part.write.abort()
            self._leave(arrivals=1)
        part.buffer = memoryview(b"")

    def _leave(self, arrivals: int = 0, private_bytes: int = 0) -> None:
        with self._lock:
            self._arrivals -= arrivals
            self._private_bytes -= private_bytes

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()
        self._arrivals = self._private_bytes = 0
