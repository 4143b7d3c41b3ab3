"""Moving bytes between buffers and segment files: aligned, several transfers at a time.

O_DIRECT wants file offset, length and address on pages. What isn't is moved by way of a buffer that is.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvstrata import _core
from kvstrata.record import PAGE
from kvstrata.threads import LazyPool

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "OpenSegments",
    "Read",
    "Reader",
    "Workers",
    "aligned_buffer",
    "is_aligned",
    "page_ceil",
    "sync_directory",
    "try_direct",
    "write_all",
]

RUN_BYTES = 4 << 20  # neighbours are read one after the other up to this
SMALL_BYTES = 256 << 10  # and others, which need not be asked for all at the same time
SHORT_READ = errno.ENODATA  # what a read beyond the end of a segment is reported as

log = logging.getLogger("kvstrata.disk")


def page_ceil(size: int) -> int:
    """Round up to whole pages."""
    return -(-size // PAGE) * PAGE


def aligned_buffer(size: int) -> memoryview:
    """Return `size` zeroed bytes that start on a page; their memory is freed with the last view."""
    return memoryview(mmap.mmap(-1, size))


def is_aligned(buffer: memoryview) -> bool:
    """Whether address and length are whole pages."""
    if len(buffer) % PAGE:
        return False
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address % PAGE == 0


def write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write all of `buffers` from `offset` on; raises OSError."""
    left = list(buffers)
    while left:
        moved = os.pwritev(fd, left, offset)
        offset += moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if moved:
            left[0] = left[0][moved:]


def sync_directory(directory: Path) -> None:
    """Have the names of its files on the device."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def try_direct(directory: Path) -> OSError | None:
    """Write and read a page with O_DIRECT in `directory`; returns the error if it is refused."""
    path = directory / f"probe-{os.getpid()}.tmp"
    fd = -1
    page = aligned_buffer(PAGE)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
        os.pwritev(fd, [page], 0)
        os.preadv(fd, [page], 0)
    except OSError as error:
        return error
    finally:
        if fd >= 0:
            os.close(fd)
        path.unlink(missing_ok=True)
    return None


class Workers:
    """A few threads for blocking transfers; started when first needed, and again in a forked child."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = LazyPool(lambda: count, "kvstrata-disk")

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run all jobs, the caller helping; returns when none is running.

        Raises an error of one of them, after which no further job was started.
        """
        todo = collections.deque(jobs)

        def work() -> None:
            try:
                while True:
                    todo.popleft()()
            except IndexError:
                return
            except BaseException:
                todo.clear()
                raise

        helpers: list[Future[None]] = []
        with contextlib.suppress(RuntimeError):  # at shutdown the interpreter starts no more threads
            helpers.extend(self._pool.executor().submit(work) for _ in range(min(self.count, len(jobs)) - 1))
        try:
            work()
        finally:
            helpers = [helper for helper in helpers if not helper.cancel()]  # the others wait for other runs to end
            wait(helpers)
        for helper in helpers:
            helper.result()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.close()


class Read(NamedTuple):
    """Fill `buffer` from `offset` of a segment."""

    segment: int
    offset: int
    buffer: memoryview


class Reader:
    """Reads many pieces of segments at once. `direct` says whether the page cache is bypassed, also in writing."""

    def __init__(self, path_of: Callable[[int], Path], workers: Workers, *, direct: bool) -> None:
        self._path_of = path_of
        self._workers = workers
        self.direct = direct

    def read(self, reads: Sequence[Read], done: Callable[[int, int], None]) -> None:
        """Fill all buffers. `done(index, errno)` is called for each, 0 meaning success, from any thread.

        ENOENT means that the segment is gone, SHORT_READ that it ends before the piece does.
        """

        def job(indices: list[int]) -> Callable[[], None]:
            def work() -> None:
                with self.opened() as files:
                    errors = files.fill([reads[index] for index in indices])
                for index, error in zip(indices, errors, strict=True):
                    done(index, error)

            return work

        self._workers.run([job(indices) for indices in self._plan(reads)])

    def opened(self) -> OpenSegments:
        """Return what reads from segments that stay open until it is closed."""
        return OpenSegments(self, self._path_of)

    def refused(self, path: Path) -> None:
        """Use the page cache from now on, since a file refuses O_DIRECT."""
        if self.direct:
            self.direct = False
            log.warning("%s: O_DIRECT is refused (errno %d); using the page cache", path, errno.EINVAL)

    def _plan(self, reads: Sequence[Read]) -> list[list[int]]:
        """Divide reads, by where they lie, among jobs of one segment each: neighbours together, and small ones."""
        jobs: list[list[int]] = []
        most = -(-len(reads) // (2 * self._workers.count))
        last, size = Read(-1, 0, memoryview(b"")), 0
        for index in sorted(range(len(reads)), key=lambda i: reads[i][:2]):
            read = reads[index]
            size += len(read.buffer)
            is_neighbour = read.segment == last.segment and read.offset == last.offset + len(last.buffer)
            if (is_neighbour and size <= RUN_BYTES) or (
                read.segment == last.segment and size <= SMALL_BYTES and len(jobs[-1]) < most
            ):
                jobs[-1].append(index)
            else:
                jobs.append([index])
                size = len(read.buffer)
            last = read
        return jobs


class OpenSegments:
    """Segments that are read from; a dropped one frees its space when this is closed. Threads may share one."""

    def __init__(self, reader: Reader, path_of: Callable[[int], Path]) -> None:
        self._reader = reader
        self._path_of = path_of
        self._lock = threading.Lock()
        self._files: dict[tuple[int, bool], int] = {}

    def fill(self, reads: Sequence[Read]) -> list[int]:
        """Fill buffers from one segment, in turn.

        Returns an errno for each, 0 where it is there; ENOENT when the segment is gone, SHORT_READ when it ends before.
        """
        segment, direct = reads[0].segment, self._reader.direct
        try:
            errors = _core.read_pieces(self._file(segment, direct), [(read.offset, read.buffer) for read in reads])
        except OSError as error:
            errors = [error.errno or errno.EIO] * len(reads)
        if not direct or errno.EINVAL not in errors:
            return errors
        self._reader.refused(self._path_of(segment))
        return self.fill(reads)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            files, self._files = self._files, {}
        for fd in files.values():
            os.close(fd)

    def __enter__(self) -> OpenSegments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, segment: int, direct: bool) -> int:
        with self._lock:
            fd = self._files.get((segment, direct))
            if fd is None:
                flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
                fd = self._files[segment, direct] = os.open(self._path_of(segment), flags)
            return fd
