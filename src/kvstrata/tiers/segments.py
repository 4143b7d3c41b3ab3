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
from typing import TYPE_CHECKING, NamedTuple

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.forking import after_fork
from kvstrata.record import PAGE, Record
from kvstrata.tiers.appending import Active, Appender, Outgoing
from kvstrata.tiers.blockio import (
    OpenSegments,
    Read,
    Reader,
    Workers,
    log,
    page_ceil,
    sync_directory,
    try_direct,
)
from kvstrata.tiers.holds import Holds
from kvstrata.tiers.ledger import Ledger
from kvstrata.tiers.segment_format import MAX_NUMBER, NAME, read_header, scan

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Segment", "SegmentSet", "segment_bytes_for"]

MAX_SEGMENT = 64 << 20
MIN_SEGMENT = 256 << 10


def segment_bytes_for(capacity: int) -> int:
    """Return the size of segments for a tier of `capacity` bytes: a thirty-second, within limits."""
    wanted = min(max(capacity // 32, MIN_SEGMENT), MAX_SEGMENT)
    return page_ceil(max(wanted, capacity // 1024))  # no more than about a thousand files


class Segment(NamedTuple):
    """A segment file that is there; `size` in bytes."""

    number: int
    size: int


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
        self._holds = Holds()
        self._lock = threading.Lock()
        self._active: Active | None = None
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
        self._appender = Appender(seed=seed, describe=describe, reader=self._reader, workers=self._workers)
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
            plan = self._appender.plan(active, records) if active else None
            if active is None or plan is None or not plan.offsets:
                self._seal()
                active = self._active = self._allocate(records[0])
                plan = self._appender.plan(active, records)
            try:
                self._appender.write(active, plan)
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

    def opened(self) -> OpenSegments:
        """Return what reads from segments that stay open until it is closed."""
        return self._reader.opened()

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

    def _allocate(self, first: Outgoing) -> Active:
        least = self._appender.least_bytes(first)
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
            active = self._appender.create(number, self.path_of(number), size)
            self._ledger.write(mark._replace(segment=number))
        return active

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
