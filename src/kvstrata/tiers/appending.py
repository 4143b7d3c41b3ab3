"""Appending to a segment: where the records of a batch go, and how they are written there.

Small records lie one after the other, by way of a buffer; large ones on pages behind them, straight from memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvstrata.record import LARGE_PAYLOAD, PAGE
from kvstrata.tiers.blockio import Reader, Workers, aligned_buffer, is_aligned, page_ceil, write_all
from kvstrata.tiers.segment_format import pack_header

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Active", "Appender", "Outgoing", "Plan"]

_LARGE_RECORD = PAGE + LARGE_PAYLOAD  # bytes; no small record is as long
_WRITE_BYTES = 1 << 20  # of one transfer


class Outgoing(Protocol):
    """A record on its way to disk."""

    @property
    def ns(self) -> int:
        """Number of its namespace."""

    @property
    def version(self) -> int:
        """Of the namespace."""

    @property
    def epoch(self) -> int:
        """Of the namespace."""

    @property
    def view(self) -> memoryview:
        """The whole record."""

    @property
    def length(self) -> int:
        """Bytes of the whole record."""


class Plan(NamedTuple):
    """Where the first records of a batch go."""

    stream: list[memoryview | bytes]  # small ones, to lie one after the other from the end of the segment
    large: list[memoryview]  # on pages, after them
    offsets: list[int]
    described: set[tuple[int, int, int]]
    end: int


class Active:
    """The segment that this process appends to."""

    def __init__(self, number: int, path: Path, fd: int, data_fd: int, size: int) -> None:
        self.number = number
        self.path = path
        self.fd = fd  # holds the lock
        self.data_fd = data_fd
        self.size = size
        self.end = PAGE
        self.described: set[tuple[int, int, int]] = set()  # namespaces whose descriptor it holds

    def close(self) -> None:
        """Let go of the file, and of its lock."""
        for fd in {self.fd, self.data_fd}:
            os.close(fd)


class Appender:
    """Makes segments and writes to them, one batch at a time. The process that made one holds a file lock on it."""

    def __init__(
        self, *, seed: int, describe: Callable[[int, int, int], bytes], reader: Reader, workers: Workers
    ) -> None:
        self._seed = seed
        self._describe = describe
        self._reader = reader  # says whether the page cache is bypassed
        self._workers = workers
        self._stream_buffer: memoryview | None = None

    def least_bytes(self, first: Outgoing) -> int:
        """Return how long a segment has to be for the record."""
        descriptor = self._describe(first.ns, first.version, first.epoch)
        return PAGE + page_ceil(len(descriptor) + first.length) + (PAGE if first.length >= _LARGE_RECORD else 0)

    def create(self, number: int, path: Path, size: int) -> Active:
        """Make the file, of that size. Raises OSError; nothing is left then."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        data_fd = fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, pack_header(number, self._seed), 0)
            if self._reader.direct:
                data_fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        return Active(number, path, fd, data_fd, size)

    def plan(self, active: Active, records: Sequence[Outgoing]) -> Plan:
        """Say where as many of `records` as the segment takes go."""
        stream: list[memoryview | bytes] = []
        large: list[memoryview] = []
        places: list[tuple[bool, int]] = []  # among the large ones?, bytes before
        small_bytes = large_bytes = 0
        described = set(active.described)
        for record in records:
            identity = (record.ns, record.version, record.epoch)
            descriptor = b"" if identity in described else self._describe(*identity)
            is_large = record.length >= _LARGE_RECORD
            small_after = small_bytes + len(descriptor) + (0 if is_large else record.length)
            large_after = large_bytes + (record.length if is_large else 0)
            if active.end + page_ceil(small_after) + large_after > active.size:
                break
            if descriptor:
                stream.append(descriptor)
                described.add(identity)
            if is_large:
                places.append((True, large_bytes))
                large.append(record.view)
            else:
                places.append((False, small_bytes + len(descriptor)))
                stream.append(record.view)
            small_bytes, large_bytes = small_after, large_after
        start_of_large = active.end + page_ceil(small_bytes)
        offsets = [(start_of_large if is_large else active.end) + before for is_large, before in places]
        return Plan(stream, large, offsets, described, start_of_large + large_bytes)

    def write(self, active: Active, plan: Plan) -> None:
        """Write a batch; raises OSError."""
        at = self._write_stream(active, plan.stream, active.end)
        jobs: list[tuple[int, list[memoryview]]] = []
        joined = 0
        for view in plan.large:
            if self._reader.direct and not is_aligned(view):
                at = self._write_stream(active, [view], at)
                joined = _WRITE_BYTES
                continue
            if jobs and joined + len(view) <= _WRITE_BYTES:
                jobs[-1][1].append(view)
                joined += len(view)
            else:
                jobs.append((at, [view]))
                joined = len(view)
            at += len(view)

        def job(offset: int, views: list[memoryview]) -> Callable[[], None]:
            return lambda: self._write_at(active, views, offset)

        self._workers.run([job(*one) for one in jobs])

    def _write_stream(self, active: Active, parts: Sequence[memoryview | bytes], at: int) -> int:
        """Write parts one after the other by way of an aligned buffer, zeros behind.

        Returns the end of the last page.
        """
        if self._stream_buffer is None:
            self._stream_buffer = aligned_buffer(_WRITE_BYTES)
        buffer, filled = self._stream_buffer, 0
        for part in parts:
            rest = memoryview(part)
            while len(rest):
                moved = min(len(rest), len(buffer) - filled)
                buffer[filled : filled + moved] = rest[:moved]
                rest = rest[moved:]
                filled += moved
                if filled == len(buffer):
                    self._write_at(active, [buffer], at)
                    at, filled = at + filled, 0
        if filled:
            end = page_ceil(filled)
            buffer[filled:end] = bytes(end - filled)
            self._write_at(active, [buffer[:end]], at)
            at += end
        return at

    def _write_at(self, active: Active, views: list[memoryview], offset: int) -> None:
        fd = active.data_fd if self._reader.direct else active.fd
        try:
            write_all(fd, views, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or fd == active.fd:
                raise
            self._reader.refused(active.path)
            write_all(active.fd, views, offset)
