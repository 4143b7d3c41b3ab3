"""The raw device: what the file system of a directory gives by O_DIRECT, at a request size and a queue depth.

The queue is as deep as there are threads, each with one request under way, as in kvstrata's disk tier.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

__all__ = ["RawFile", "read_bandwidth", "write_bandwidth"]

MIB = 1 << 20


class RawFile:
    """A file of `requests` blocks of `request` bytes (whole pages), moved by `depth` threads with O_DIRECT.

    It is allocated at once and written by `write`. `buffers` is how many blocks of memory take turns: few stay in
    the processor's caches, which is faster than what anybody can do who keeps what is read. Raises OSError where
    the file system refuses O_DIRECT.
    """

    def __init__(
        self, path: Path, *, request: int = MIB, requests: int = 256, depth: int = 8, buffers: int | None = None
    ) -> None:
        self.path = path
        self.request = request
        self.requests = requests
        self._depth = depth
        self._buffers = [_random_buffer(request, seed) for seed in range(buffers or depth)]
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(self.fd, 0, request * requests)
        except OSError:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.request * self.requests

    def write(self, blocks: Sequence[int] | None = None) -> float:
        """Write these blocks, or all in order; returns the seconds that it took."""
        return self._run(os.pwritev, range(self.requests) if blocks is None else blocks)

    def read(self, blocks: Sequence[int]) -> float:
        """Read these blocks, which were written before; returns the seconds that it took."""
        return self._run(os.preadv, blocks)

    def close(self) -> None:
        """Remove the file."""
        os.close(self.fd)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> RawFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Callable[[int, list[memoryview], int], int], blocks: Sequence[int]) -> float:
        todo = iter(list(zip(blocks, itertools.cycle(self._buffers), strict=False)))
        failures: list[str] = []
        ready = threading.Barrier(self._depth + 1)

        def work() -> None:
            ready.wait()
            try:
                while (turn := next(todo, None)) is not None:  # atomic under the interpreter's lock
                    block, buffer = turn
                    if call(self.fd, [buffer], block * self.request) != self.request:
                        failures.append(f"a short transfer at block {block}")
            except OSError as error:
                failures.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(self._depth)]
        for thread in threads:
            thread.start()
        ready.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        if failures:
            raise OSError(f"{self.path}: {failures[0]}")
        return took


def _random_buffer(size: int, seed: int) -> memoryview:
    buffer = memoryview(mmap.mmap(-1, size))  # on a page
    buffer[:] = np.random.default_rng(seed).bytes(size)
    return buffer


def read_bandwidth(
    directory: Path, *, request: int = MIB, depth: int = 8, total: int = 256 * MIB, repeats: int = 3
) -> list[float]:
    """Return bytes per second of random reads over `total` bytes, once for each repeat."""
    count = total // request
    with RawFile(_scratch(directory), request=request, requests=count, depth=depth) as file:
        file.write()
        rng = np.random.default_rng(0)
        return [file.nbytes / file.read(rng.permutation(count).tolist()) for _ in range(repeats)]


def write_bandwidth(
    directory: Path, *, request: int = MIB, depth: int = 8, total: int = 256 * MIB, repeats: int = 3
) -> list[float]:
    """Return bytes per second of writes into a new, preallocated file, once for each repeat."""
    found = []
    for _ in range(repeats):
        with RawFile(_scratch(directory), request=request, requests=total // request, depth=depth) as file:
            found.append(file.nbytes / file.write())
    return found


def _scratch(directory: Path) -> Path:
    return directory / f"raw-{os.getpid()}.tmp"


def drop_page_cache(directory: Path) -> None:
    """Have what lies below a directory read from the device the next time."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
