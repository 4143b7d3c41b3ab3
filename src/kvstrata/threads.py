"""Threads of kvstrata's own, which run on any core that the process uses.

A new thread is bound to the cores of whoever starts it. Engines that compute on the CPU bind each of their threads to
one core; copying and reading for them must not wait for that one while others are free.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvstrata.forking import after_fork

__all__ = ["LazyPool", "cores", "new_thread", "thread_pool"]


def cores() -> set[int]:
    """Return the cores on which any thread of this process may run."""
    found = os.sched_getaffinity(0)
    if len(found) < (os.cpu_count() or 1):
        with suppress(OSError):  # where there is no /proc
            for task in Path("/proc/self/task").iterdir():
                with suppress(ProcessLookupError):  # it has ended
                    found |= os.sched_getaffinity(int(task.name))
    return found


def thread_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Return an executor of at most so many threads."""
    return ThreadPoolExecutor(threads, name, initializer=_spread)


class LazyPool:
    """An executor that is made when it is first needed, of `count()` threads, and again in a forked child."""

    def __init__(self, count: Callable[[], int], name: str) -> None:
        self._count = count
        self._name = name
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        after_fork(self)

    def executor(self) -> ThreadPoolExecutor:
        """Return it."""
        with self._lock:
            if self._executor is None:
                self._executor = thread_pool(self._count(), self._name)
            return self._executor

    def close(self) -> None:
        """Wait for what its threads do, and stop them."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()
        self._executor = None


def new_thread(target: Callable[..., None], name: str, *args: Any) -> threading.Thread:
    """Return a thread, not started yet, that doesn't keep the process from ending."""

    def run() -> None:
        _spread()
        target(*args)

    return threading.Thread(target=run, name=name, daemon=True)


def _spread() -> None:
    with suppress(OSError):  # of cores that were taken from the process
        os.sched_setaffinity(0, cores())
