"""Threads that work against each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["failures_of"]


def failures_of(
    writers: Sequence[Callable[[list[str]], None]], readers: Sequence[Callable[[threading.Event, list[str]], None]]
) -> list[str]:
    """Run each in a thread of its own, readers until the event says that all writers are done.

    Returns the failures that they noted in the list that they are given, and what they raised.
    """
    failures: list[str] = []
    done = threading.Event()

    def run(work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments, failures)
        except BaseException as error:  # noqa: BLE001
            failures.append(repr(error))

    reading = [threading.Thread(target=run, args=(reader, done)) for reader in readers]
    writing = [threading.Thread(target=run, args=(writer,)) for writer in writers]
    for thread in reading + writing:
        thread.start()
    for thread in writing:
        thread.join()
    done.set()
    for thread in reading:
        thread.join()
    return failures
