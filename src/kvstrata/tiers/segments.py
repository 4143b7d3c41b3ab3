"""The segment files of a disk tier: appending records, reading them, walking through them.

A process appends to a segment of its own, on which it holds a file lock, so that nobody else drops it. A
segment whose writer has finished or died is never written again, and its number is never given out again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.forking import after_fork
from kvstrata.record import LARGE_PAYLOAD, PAGE, Record
from kvstrata.tiers.blockio import (
    Read,
    Reader,
    Workers,
    aligned_buffer,
    is_aligned,
    log,
    page_ceil,
    sync_directory,
    transfer,
    try_direct,
)
from kvstrata.tiers.holds import Holds
from kvstrata.tiers.ledger import Ledger
from kvstrata.tiers.segment_format import MAX_NUMBER, NAME, pack_header, read_header, scan

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Outgoing", "Segment", "SegmentSet", "segment_bytes_for"]

MAX_SEGMENT = 64 << 20
MIN_SEGMENT = 256 << 10
_LARGE_RECORD = PAGE + LARGE_PAYLOAD  # bytes; no small record is as long
_WRITE_BYTES = 1 << 20  # of one transfer


def segment_bytes_for(capacity: int) -> int:
    """Return the size of segments for a tier of `capacity` bytes: a thirty-second, within limits."""
    wanted = min(max(capacity // 32, MIN_SEGMENT), MAX_SEGMENT)
    return page_ceil(max(wanted, capacity // 1024))  # no more than about a thousand files


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


class Segment(NamedTuple):
    """A segment file that is there; `size` in bytes."""

    number: int
    size: int


class _Plan(NamedTuple):
    """Where the first records of a batch go."""

    stream: list[memoryview | bytes]  # small ones, to lie one after the other from the end of the segment
    large: list[memoryview]  # on pages, after them
    offsets: list[int]
    described: set[tuple[int, int, int]]
    end: int


class _Active:
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
        for fd in {self.fd, self.data_fd}:
            os.close(fd)


class SegmentSet:
    """All segments of a directory. Threads may share one.

    `make_room(bytes)` is called, with the ledger held, before a file of that size is made; it raises TierFull
    when the capacity forbids it. `describe(ns, version, epoch)` returns a namespace's descriptor record.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seed: int,
        segment_bytes: int,
        ledger: Ledger,
        make_room: Callable[[int], None],
        describe: Callable[[int, int, int], bytes],
        direct: bool = True,
        depth: int = 8,
    ) -> None:
        self._directory = directory
        self._seed = seed
        self._segment_bytes = segment_bytes
        self._ledger = ledger
        self._make_room = make_room
        self._describe = describe
        self._holds = Holds()
        self._lock = threading.Lock()
        self._active: _Active | None = None
        self._unsynced: set[int] = set()  # segments that this process wrote to since the last sync
        self._workers = Workers(depth)
        refusal = try_direct(directory) if direct else None
        if refusal is not None and refusal.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            refusal = None  # says nothing about O_DIRECT
        if refusal is not None:
            log.warning(
                "%s: O_DIRECT is refused (errno %s, %s); using the page cache",
                directory,
                refusal.errno,
                refusal.strerror,
            )
        self._reader = Reader(self.path_of, self._workers, direct=direct and refusal is None)
        self._stream_buffer: memoryview | None = None
        after_fork(self)

    # ---- What is there

    @property
    def direct(self) -> bool:
        """Whether the page cache is bypassed."""
        return self._reader.direct

    def path_of(self, number: int) -> Path:
        """Return the file of a segment."""
        return self._directory / f"seg-{number:08d}.kvs"

    def all(self) -> list[Segment]:
        """Return all segments, the oldest first."""
        return sorted(Segment(number, size) for number, size in self._entries() if size >= 0)

    def is_being_written(self, number: int) -> bool:
        """Whether a living process appends to the segment. With the ledger held, a False remains true."""
        try:
            fd = os.open(self.path_of(number), os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def remove(self, number: int) -> None:
        """Delete a segment file. The ledger must be held, and nothing may refer to the segment any more."""
        with contextlib.suppress(FileNotFoundError):
            self.path_of(number).unlink()

    def trim(self, number: int, end: int) -> None:
        """Give back the space after byte `end` of a segment whose writer died. The ledger must be held."""
        end = max(page_ceil(end), PAGE)
        with contextlib.suppress(FileNotFoundError):
            path = self.path_of(number)
            if path.stat().st_size > end:
                os.truncate(path, end)

    # ---- Writing

    def append(self, records: Sequence[Outgoing], *, hold: bool = False) -> tuple[int, list[int]]:
        """Write as many of `records` as go into one segment, at least the first.

        Returns the segment and the offsets of those that were written. With `hold` the segment isn't finished, by
        nobody, until `release` is called with it. Raises TierFull when there is no room and none can be made, OSError
        when the file system fails; nothing was written then.
        """
        with self._lock:
            active = self._active
            if active is not None and os.fstat(active.fd).st_nlink == 0:
                self._seal()  # somebody deleted the file
                active = None
            plan = self._plan(active, records) if active else None
            if active is None or plan is None or not plan.offsets:
                self._seal()
                active = self._active = self._allocate(records[0])
                plan = self._plan(active, records)
            try:
                self._write(active, plan)
            except OSError:
                # A scan ends at what may now be there, so nothing may follow.
                self._seal()
                raise
            active.end = plan.end
            self._unsynced.add(active.number)
            active.described = plan.described
            if hold:
                self._holds.take(active.number)
            return active.number, plan.offsets

    def release(self, number: int) -> None:
        """Let go of a segment that `append` holds, once: the rows of what was written are committed, or never will."""
        self._holds.release(number)

    def seal(self) -> None:
        """Finish the segment that is being appended to and give back what it didn't use."""
        with self._lock:
            self._seal()

    def sync(self) -> None:
        """Have what this process has written on the device; raises OSError, and tries again the next time."""
        with self._lock:
            unsynced, self._unsynced = self._unsynced, set()
        try:
            for number in unsynced:
                with contextlib.suppress(FileNotFoundError):
                    fd = os.open(self.path_of(number), os.O_RDONLY)
                    try:
                        os.fdatasync(fd)
                    finally:
                        os.close(fd)
            sync_directory(self._directory)
        except OSError:
            with self._lock:
                self._unsynced |= unsynced
            raise

    def close(self) -> None:
        """Finish writing and stop all threads."""
        self.seal()
        self._workers.close()

    # ---- Reading

    def read(self, reads: Sequence[Read], done: Callable[[int, int], None]) -> None:
        """Fill the buffers of `reads`, as Reader.read does."""
        self._reader.read(reads, done)

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run jobs that read in threads of their own, as many at a time as there are transfers, in their order."""
        self._workers.run(jobs)

    def scan(self, number: int) -> Iterator[tuple[int, Record, memoryview | None]]:
        """Yield (offset, record, payload of a descriptor) for every record, in order, payloads unchecked.

        Ends at the first thing that isn't a record: there's no search for another behind it, since what is
        found there could be part of a payload. Yields nothing when the segment's own header is damaged or the
        file is gone. Raises FormatError when a newer release wrote it.
        """
        path = self.path_of(number)
        header = read_header(path)
        if header is None or header != (number, self._seed):
            return
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            yield from scan(fd, self._seed)
        finally:
            os.close(fd)

    # ---- Inside

    def _entries(self) -> Iterator[tuple[int, int]]:
        """Yield (number, size) of whatever bears the name of a segment; the size is -1 if it is no file."""
        with os.scandir(self._directory) as entries:
            for entry in entries:
                match = NAME.fullmatch(entry.name)
                if match is None:
                    continue
                try:
                    size = entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
                except FileNotFoundError:
                    continue
                yield int(match[1]), size

    def _plan(self, active: _Active, records: Sequence[Outgoing]) -> _Plan:
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
        return _Plan(stream, large, offsets, described, start_of_large + large_bytes)

    def _write(self, active: _Active, plan: _Plan) -> None:
        at = self._write_stream(active, plan.stream, active.end)
        jobs: list[tuple[int, list[memoryview]]] = []
        joined = 0
        for view in plan.large:
            if self.direct and not is_aligned(view):
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

    def _write_stream(self, active: _Active, parts: Sequence[memoryview | bytes], at: int) -> int:
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

    def _write_at(self, active: _Active, views: list[memoryview], offset: int) -> None:
        fd = active.data_fd if self.direct else active.fd
        try:
            transfer(os.pwritev, fd, views, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or fd == active.fd:
                raise
            if self._reader.direct:
                self._reader.direct = False
                log.warning("%s: O_DIRECT is refused (errno %d); using the page cache", active.path, error.errno)
            transfer(os.pwritev, active.fd, views, offset)

    def _allocate(self, first: Outgoing) -> _Active:
        descriptor = self._describe(first.ns, first.version, first.epoch)
        least = PAGE + page_ceil(len(descriptor) + first.length) + (PAGE if first.length >= _LARGE_RECORD else 0)
        size = max(self._segment_bytes, least)
        with self._ledger.hold():
            try:
                self._make_room(size)
            except TierFull:
                if least >= size:
                    raise
                size = least
                self._make_room(size)
            mark = self._ledger.mark()
            number = max([mark.segment, *(number for number, _ in self._entries())]) + 1
            if number > MAX_NUMBER:
                raise TierUnavailable(f"{self._directory}: segment numbers are used up; start with an empty directory")
            active = self._create(number, size)
            self._ledger.write(mark._replace(segment=number))
        return active

    def _create(self, number: int, size: int) -> _Active:
        path = self.path_of(number)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        data_fd = fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, pack_header(number, self._seed), 0)
            if self.direct:
                data_fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        return _Active(number, path, fd, data_fd, size)

    def _seal(self) -> None:
        active, self._active = self._active, None
        if active is None:
            return
        self._holds.wait(active.number)  # from then on whoever opens the directory may cut off what no row is of
        try:
            if active.end > PAGE:
                os.ftruncate(active.fd, active.end)
            elif os.fstat(active.fd).st_nlink:
                active.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: can't give back unused space: %s", active.path, error)
        finally:
            active.close()

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()
        self._unsynced.clear()
        active, self._active = self._active, None
        if active is not None:
            active.close()  # leaves the parent's lock alone
