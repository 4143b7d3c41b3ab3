"""Copying that several threads share, where that is worth waking them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

from kvstrata.threads import cores, thread_pool

__all__ = ["Copiers"]

T = TypeVar("T")

_WORTH_BYTES = 4 << 20
"""Below this a copy is quicker than waking another thread."""

_PARTS_EACH = 4
"""Of the items for each thread, so that the others go on while one of them has to wait for a core."""


class Copiers:
    """Threads that copy, one of them the caller's. Thread-safe; `threads` is up to 4, as many as cores, by default."""

    def __init__(self, threads: int | None = None) -> None:
        self._limit = threads
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def share(self, copy: Callable[[Sequence[T]], None], items: Sequence[T], nbytes: int) -> None:
        """Call `copy` with parts of `items`, which are `nbytes` together, until all were given.

        Returns when all calls have ended, and raises then what one of them has raised.
        """
        threads = min(self._limit or min(4, len(cores())), len(items)) if nbytes >= _WORTH_BYTES else 1
        if threads < 2:
            copy(items)
            return
        step = -(-len(items) // (threads * _PARTS_EACH))
        parts = iter([items[start : start + step] for start in range(0, len(items), step)])

        def work() -> None:
            for part in parts:  # which any of the threads takes
                copy(part)

        others: list[Future[None]] = []
        with suppress(RuntimeError):  # the interpreter ends, or the system has no more threads
            for _ in range(threads - 1):
                others += [self._started(threads).submit(work)]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()

    def _started(self, threads: int) -> ThreadPoolExecutor:
        if self._pool is None or self._pid != os.getpid():  # threads don't survive a fork
            self._pool, self._pid = thread_pool(threads - 1, "kvstrata-copy"), os.getpid()
        return self._pool
