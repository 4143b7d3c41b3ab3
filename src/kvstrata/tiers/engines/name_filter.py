"""Which names an engine may have, so that a lookup of another one doesn't ask it.

A Bloom filter (core/base/mapped_bloom.hpp) is told of each name before a record is written under it. It is used only
while it has all names: a directory that was begun anew has none, and where there are records their names are read in
the background, while what is written goes into the filter as before and lookups ask the engine. Names that have left
the engine stay in the filter until it is full: then it is filled anew, of a size for what there is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from kvstrata.errors import CacheClosed, TierUnavailable
from kvstrata.tiers.background import OnDemand
from kvstrata.tiers.base import RecordStore, Stats

if TYPE_CHECKING:
    from kvstrata.tiers.engines.directory import FileLock
    from kvstrata.tiers.engines.filter_file import FilterFile

__all__ = ["EngineFilter", "NamedStore"]

_ORDER_S = 2.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0
_TOLD = 4096  # names put in, after which a full one may be filled anew again
_log = logging.getLogger("kvstrata")


class NamedStore(RecordStore, Protocol):
    """A store that can say which names it has."""

    filter: FilterFile

    @property
    def scanning(self) -> FileLock | None:
        """Held by who fills the filter; None where there is one process."""

    def count(self) -> int:
        """Return about how many names it has."""

    def scan(self) -> Iterator[list[bytes]]:
        """Yield at least all names that it had at the first step and has at the last; raises StoreFault."""


class EngineFilter:
    """The filter of one engine. `order` gives the lock under which all changes are made, for a time in s."""

    def __init__(self, store: NamedStore, order: Callable[[float], AbstractContextManager[None]]) -> None:
        self._store = store
        self._order = order
        self._filter = store.filter
        self.bloom = store.filter.bloom
        self._told = _TOLD
        self._filling = threading.Lock()
        self._pause_s = _PAUSE_S
        self._names = OnDemand("kvstrata-names", self._fill_some_time)
        self._scans = 0

    def add(self, names: list[bytes]) -> None:
        """Tell it of names that are about to be written; in the cache's order."""
        self.bloom.add(names)
        self._told += len(names)
        if self._told >= _TOLD and self._full():
            self._told = 0
            self.want()

    def positions(self, names: list[bytes], *, count: bool) -> Sequence[int]:
        """Return where in `names` those stand that the engine may have; the others are counted, if so wanted."""
        found = self.bloom.positions(names, count)
        if len(found) == len(names) and not self.bloom.is_complete:
            self.want()
        return found

    def want(self) -> None:
        """Have it filled soon, if it isn't complete or is full; returns at once."""
        self._names.want()

    def _full(self) -> bool:
        return self.bloom.count > self.bloom.capacity

    def _fill_some_time(self) -> float:
        try:
            self.fill()
            self._pause_s = _PAUSE_S
        except (TierUnavailable, CacheClosed):
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)  # lookups ask the engine meanwhile
        except Exception:  # noqa: BLE001 - a defect: lookups ask the engine
            _log.exception("kvstrata: the names of %s could not be read", self._store.name)
            self._pause_s = _LONGEST_PAUSE_S
        return self._pause_s

    def fill(self) -> None:
        """Begin it anew and fill it, unless it is complete and not full, or another thread or process does so."""
        scanning = self._store.scanning
        if not self._filling.acquire(blocking=False):
            return
        try:
            if scanning is None:
                self._fill()
            elif scanning.take():
                try:
                    self._fill()
                finally:
                    scanning.release()
        finally:
            self._filling.release()

    def _fill(self) -> None:
        if self.bloom.is_complete and not self._full():
            return
        room = 2 * self._store.count()
        with self._order(_ORDER_S):  # whatever is written from now on is told to the new one
            phase = self._filter.begin(room)
        started = time.monotonic()
        for names in self._store.scan():
            self.bloom.add(names)
            if self._names.stopped.wait(min(_PAUSE_S, time.monotonic() - started)):  # half of the time is others'
                return
            started = time.monotonic()
        if self.bloom.complete(phase):
            self._scans += 1

    def stats(self) -> Stats:
        """Return its figures; "filter_off" says why it isn't used, None if it is."""
        return {
            "filtered_lookups": self.bloom.spared,
            "filter_names": self.bloom.count,
            "filter_bytes": self.bloom.nbytes,
            "filter_scans": self._scans,
            "filter_off": None if self.bloom.is_complete else "not all names were read yet",
        }

    def close(self) -> None:
        """End its thread."""
        self._names.stop()
