"""Copying that several threads share, where that is worth waking them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

from kvstrata.threads import cores, thread_pool
from kvstrata.tiers.ledger import after_fork

__all__ = ["Copiers"]

T = TypeVar("T")

_WORTH_BYTES, _WORTH_EACH = 4 << 20, 32 << 10
"""Of less in all a copy is quicker than waking another thread, of smaller items than taking turns in Python."""


class Copiers:
    """Threads that copy, one of them the caller's. Thread-safe.

    `threads` is up to 4, as many as cores, by default: those that the process has when there is first much to copy.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        after_fork(self)

    def share(self, copy: Callable[[T], object], items: Sequence[T], nbytes: int) -> None:
        """Call `copy` with each of the items, which are `nbytes` together.

        Returns when all calls have ended, and raises then what one of them has raised.
        """
        left = iter(items)

        def work() -> None:
            for item in left:  # which any of the threads takes
                copy(item)

        others: list[Future[None]] = []
        if nbytes >= max(_WORTH_BYTES, len(items) * _WORTH_EACH):
            with suppress(RuntimeError):  # the interpreter ends, or the system has no more threads
                pool, threads = self._started()
                for _ in range(min(threads, len(items)) - 1):
                    others += [pool.submit(work)]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()

    def _started(self) -> tuple[ThreadPoolExecutor, int]:
        with self._lock:
            if self._threads is None:
                self._threads = min(4, len(cores()))
            if self._pool is None:
                self._pool = thread_pool(max(1, self._threads - 1), "kvstrata-copy")
            return self._pool, self._threads

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()
        self._pool = None
