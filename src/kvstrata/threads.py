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

__all__ = ["cores", "new_thread", "thread_pool"]


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


def new_thread(target: Callable[..., None], name: str, *args: Any) -> threading.Thread:
    """Return a thread, not started yet, that doesn't keep the process from ending."""

    def run() -> None:
        _spread()
        target(*args)

    return threading.Thread(target=run, name=name, daemon=True)


def _spread() -> None:
    with suppress(OSError):  # of cores that were taken from the process
        os.sched_setaffinity(0, cores())
