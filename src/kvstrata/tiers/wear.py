"""A limit on how much is written to a device, for the sake of its life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvstrata.forking import after_fork

__all__ = ["WriteLimit"]


class WriteLimit:
    """At most `rate` bytes per second on average, and what a second brings at once; 0 means no limit.

    A token bucket that may be overdrawn by one record, so that those larger than a second's bytes get through.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left = float(rate)
        self._then = clock()
        self._lock = threading.Lock()
        after_fork(self)

    def admits(self, size: int) -> bool:
        """Whether `size` bytes may be written now; they count as written then."""
        if not self._rate:
            return True
        with self._lock:
            now = self._clock()
            self._left = min(float(self._rate), self._left + (now - self._then) * self._rate)
            self._then = now
            if self._left <= 0:
                return False
            self._left -= size
            return True

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()
