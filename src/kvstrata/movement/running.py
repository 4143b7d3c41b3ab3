"""What moves records in threads of its own, and has to end before the cache is closed."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

__all__ = ["Moving", "Running"]


class Moving(Protocol):
    """Something that is under way."""

    def stop(self) -> None:
        """End soon, let go of everything, and return when that is done."""


class Running:
    """All that is under way in this process for one cache. What isn't needed any more leaves by itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moving: weakref.WeakSet[Moving] = weakref.WeakSet()
        self._stopped = False
        self._pid = os.getpid()

    def add(self, moving: Moving) -> bool:
        """Have it stopped when the cache is closed; False when that has happened."""
        with self._lock:
            if not self._stopped:
                self._moving.add(moving)
            return not self._stopped

    def stop(self) -> None:
        """Stop all, and have nothing added any more."""
        with self._lock:
            self._stopped = True
            moving = list(self._moving)
        if self._pid == os.getpid():  # threads don't survive a fork
            for each in moving:
                each.stop()
