"""The bound on all bytes of a disk tier's directory, kept by dropping segments.

Deleting a large file waits for the file system for about as long as writing it takes. So a segment is dropped
ahead, by a thread, as soon as the next one would find no room; and nobody is kept from anything meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvstrata import _core
from kvstrata.errors import TierError, TierFull
from kvstrata.forking import after_fork
from kvstrata.threads import new_thread
from kvstrata.tiers.ledger import Ledger
from kvstrata.tiers.segments import Segment, SegmentSet

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Capacity"]

log = logging.getLogger("kvstrata.disk")


class Capacity:
    """Makes room in a directory of at most `limit` bytes.

    `reserve` bytes stay free for what dropping a segment needs itself. `order` says which segments go first, and
    `drop(number)` forgets all that a segment holds; both are called with the ledger held, before the file goes.
    `keep_some(number)` is called without it, when there's time before a segment goes.
    """

    def __init__(
        self,
        directory: Path,
        limit: int,
        *,
        reserve: int,
        ledger: Ledger,
        order: Callable[[list[Segment]], list[Segment]],
        keep_some: Callable[[int], None],
        drop: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._limit = limit
        self._reserve = reserve
        self._ledger = ledger
        self._order = order
        self._keep_some = keep_some
        self._drop = drop
        self._dropping = False  # the ledger is held
        self._ahead: threading.Thread | None = None
        after_fork(self)

    def used(self) -> int:
        """Return how many bytes the directory and all files in it take."""
        return _core.directory_bytes(os.fsencode(self._directory))

    def make(self, segments: SegmentSet, need: int) -> None:
        """Drop segments until `need` bytes fit. The ledger must be held.

        Raises TierFull, and drops nothing, when they can't be made to: processes append to what is left.
        """
        if not self._dropping:  # the deletions of drop() are what the reserve is for
            for number in self._choose(segments, need):
                self._forget(number)
                segments.remove(number)

    def make_ahead(self, segments: SegmentSet, need: int) -> None:
        """Have room for `need` bytes soon, if that can be. The ledger must be held."""
        busy = self._ahead is not None and self._ahead.is_alive()
        if not busy and self._free() < need:
            self._ahead = new_thread(self._clear, "kvstrata-clear", segments, need)
            # A new thread can't be started while the interpreter shuts down.
            with contextlib.suppress(RuntimeError):
                self._ahead.start()

    def close(self) -> None:
        """Wait until nothing is being dropped."""
        thread, self._ahead = self._ahead, None
        if thread is not None and thread.is_alive():
            thread.join()

    def _free(self) -> int:
        return self._limit - self._reserve - self.used()

    def _choose(self, segments: SegmentSet, need: int) -> list[int]:
        """Return the segments that have to go for `need` bytes; raises TierFull when that isn't enough."""
        free = reached = self._free()
        if reached >= need:
            return []
        victims = []
        for segment in self._order(segments.all()):
            if reached >= need:
                break
            if not segments.is_being_written(segment.number):
                victims.append(segment.number)
                reached += segment.size
        if reached < need:
            raise TierFull("disk", need, max(free, 0))
        return victims

    def _forget(self, number: int) -> None:
        self._dropping = True
        try:
            self._drop(number)
        finally:
            self._dropping = False

    def _clear(self, segments: SegmentSet, need: int) -> None:
        try:
            with self._ledger.hold():
                victims = self._choose(segments, need)
            for number in victims:
                # Without the ledger, since it appends; somebody else may drop the segment meanwhile.
                try:
                    self._keep_some(number)
                except (OSError, TierError) as error:
                    log.debug("nothing is kept of segment %d: %s", number, error)
                with self._ledger.hold():
                    if self._free() >= need:
                        return
                    self._forget(number)
                # Without it: nothing refers to the file any more, and its number is never used again.
                segments.remove(number)
        except (OSError, TierError) as error:
            log.debug("no room is made ahead: %s", error)  # who needs it will be told

    def _forget_parent(self) -> None:
        self._dropping = False
        self._ahead = None
