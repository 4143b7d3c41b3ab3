"""Segments that must not be let go of yet: what was appended to them has no rows in the catalog so far."""

from __future__ import annotations

import collections
import threading

from kvstrata.forking import after_fork

__all__ = ["Holds"]

_PATIENCE_S = 10.0  # whoever has to wait longer goes on: one lock that can't be had must not stop all for ever


class Holds:
    """How many hold which segment. Threads may share one; a forked child holds none."""

    def __init__(self) -> None:
        self._forget_parent()
        after_fork(self)

    def take(self, segment: int) -> None:
        """Hold a segment once more."""
        with self._changed:
            self._held[segment] += 1

    def release(self, segment: int) -> None:
        """Undo one `take`."""
        with self._changed:
            self._held[segment] -= 1
            if self._held[segment] <= 0:
                del self._held[segment]
                self._changed.notify_all()

    def wait(self, segment: int) -> bool:
        """Wait until nobody holds the segment; returns False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: segment not in self._held, _PATIENCE_S)

    def _forget_parent(self) -> None:
        self._changed = threading.Condition()
        self._held: collections.Counter[int] = collections.Counter()
