"""A lock that threads are given in the order in which they asked for it."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Turns"]


class Turns:
    """A lock for what lets the GIL go often and shortly, or is asked for again at once by who gives it back.

    `threading.Lock` goes to whoever comes first, so a thread that has to be woken may wait for ever. And threads that
    take turns in letting the GIL go for a microsecond keep all others of the process from it: CPython asks a thread to
    give it up only where the same one has had it for the whole switch interval.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def take(self, timeout_s: float) -> bool:
        """Take it; False when others had it until the time, in s, was over."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            given = turn.acquire(timeout=max(0.0, timeout_s))
        except BaseException:
            if not self._withdraw(turn):
                self.release()
            raise
        return given or not self._withdraw(turn)

    def _withdraw(self, turn: threading.Lock) -> bool:
        """Wait no longer; False where it was given just now."""
        with self._guard:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            return True

    def release(self) -> None:
        """Give it to who has waited longest."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
