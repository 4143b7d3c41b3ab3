"""Moving bytes between buffers and segment files: aligned, several transfers at a time.

O_DIRECT wants file offset, length and address on pages. What isn't is moved through an aligned bounce buffer.
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

from kvstrata.record import PAGE
from kvstrata.threads import LazyPool

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Read",
    "Reader",
    "Workers",
    "aligned_buffer",
    "is_aligned",
    "page_ceil",
    "sync_directory",
    "transfer",
    "try_direct",
]

RUN_BYTES = 4 << 20  # adjacent transfers are joined up to this
RUN_BUFFERS = 256  # and up to this many buffers (the kernel takes 1,024)
BOUNCE_BYTES = 256 << 10
GAP_BYTES = 16 << 10  # read over rather than leave out
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


def transfer(
    call: Callable[[int, list[memoryview], int], int], fd: int, buffers: Sequence[memoryview], offset: int
) -> int:
    """Have os.preadv or os.pwritev move all of `buffers`.

    Returns the bytes moved, which are fewer only at the end of the file.
    """
    left = list(buffers)
    total = 0
    while left:
        moved = call(fd, left, offset + total)
        if moved == 0:
            break
        total += moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if moved:
            left[0] = left[0][moved:]
    return total


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
        self._count = count
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
            helpers.extend(self._pool.executor().submit(work) for _ in range(min(self._count, len(jobs)) - 1))
        try:
            work()
        finally:
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


class _Run(NamedTuple):
    """One transfer: reads of one segment, in order. `bounced`: by way of an aligned buffer."""

    segment: int
    start: int
    end: int
    reads: list[int]
    bounced: bool


class Reader:
    """Reads many pieces of segments at once.

    Files are open only meanwhile, so that a dropped one frees its space.
    """

    def __init__(self, path_of: Callable[[int], Path], workers: Workers, *, direct: bool) -> None:
        self._path_of = path_of
        self._workers = workers
        self.direct = direct
        self._bounce = threading.local()

    def read(self, reads: Sequence[Read], done: Callable[[int, int], None]) -> None:
        """Fill all buffers. `done(index, errno)` is called for each, 0 meaning success, from any thread.

        ENOENT means that the segment is gone, SHORT_READ that it ends before the piece does.
        """
        runs = self._plan(reads)

        def job(run: _Run) -> Callable[[], None]:
            return lambda: self._read_run(run, reads, done)

        self._workers.run([job(run) for run in runs])

    def _plan(self, reads: Sequence[Read]) -> list[_Run]:
        runs: list[_Run] = []
        for index in sorted(range(len(reads)), key=lambda i: reads[i][:2]):
            segment, offset, buffer = reads[index]
            end = offset + len(buffer)
            bounced = self.direct and not (offset % PAGE == 0 and is_aligned(buffer))
            if bounced:
                start, end = offset // PAGE * PAGE, page_ceil(end)
                gap, most = GAP_BYTES, BOUNCE_BYTES
            else:
                start, gap, most = offset, 0, RUN_BYTES
            last = runs[-1] if runs else None
            if (
                last is not None
                and last.segment == segment
                and last.bounced == bounced
                and len(last.reads) < RUN_BUFFERS
                and (start == last.end or (bounced and start <= last.end + gap))
                and max(end, last.end) - last.start <= most
            ):
                last.reads.append(index)
                runs[-1] = last._replace(end=max(end, last.end))
            else:
                runs.append(_Run(segment, start, end, [index], bounced))
        return runs

    def _read_run(self, run: _Run, reads: Sequence[Read], done: Callable[[int, int], None]) -> None:
        failure = SHORT_READ
        reached = run.start
        if run.bounced:
            bounce = self._bounce_buffer(run.end - run.start)
            buffers = [bounce]
        else:
            buffers = [reads[index].buffer for index in run.reads]
        try:
            reached += self._read_at(run.segment, run.start, buffers)
        except OSError as error:
            failure = error.errno or errno.EIO
        for index in run.reads:
            _, offset, buffer = reads[index]
            if offset + len(buffer) > reached:
                done(index, failure)
                continue
            if run.bounced:
                buffer[:] = bounce[offset - run.start : offset - run.start + len(buffer)]
            done(index, 0)

    def _read_at(self, segment: int, offset: int, buffers: list[memoryview]) -> int:
        path = self._path_of(segment)
        direct = self.direct
        try:
            fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
            try:
                return transfer(os.preadv, fd, buffers, offset)
            finally:
                os.close(fd)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
        if self.direct:
            self.direct = False
            log.warning("%s: O_DIRECT is refused (errno %d); reading through the page cache", path, errno.EINVAL)
        return self._read_at(segment, offset, buffers)

    def _bounce_buffer(self, size: int) -> memoryview:
        """Return an aligned buffer of this thread, which stays as it is until the thread asks again."""
        if size > BOUNCE_BYTES:
            return aligned_buffer(size)
        buffer: memoryview | None = getattr(self._bounce, "buffer", None)
        if buffer is None:
            buffer = self._bounce.buffer = aligned_buffer(BOUNCE_BYTES)
        return buffer[:size]
