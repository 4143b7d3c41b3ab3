"""Copying that several threads share, where that is worth waking them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

from kvstrata.threads import LazyPool, cores

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
        self._pool = LazyPool(lambda: max(1, self._count() - 1), "kvstrata-copy")

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
                for _ in range(min(self._count(), len(items)) - 1):
                    others += [self._pool.executor().submit(work)]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()

    def _count(self) -> int:
        if self._threads is None:
            self._threads = min(4, len(cores()))
        return self._threads
