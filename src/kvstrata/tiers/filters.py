"""The filters of one store that several hosts write to, and the thread that keeps them up to date."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kvstrata.errors import CorruptRecord, FormatError
from kvstrata.tiers.background import OnDemand
from kvstrata.tiers.base import RecordStore, Stats, StoreFault
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.keyed_space import KeyedSpace
from kvstrata.tiers.presence import FilterOptions, NameFilter, Names

__all__ = ["Filters"]

_log = logging.getLogger("kvstrata.remote")


class Filters:
    """A filter for each namespace, read anew as long as somebody asks it.

    Its thread starts with the first lookup that finds a filter too old, and waits while nobody looks anything up. What
    goes wrong is told to `failed`, and to the breaker through that.
    """

    def __init__(
        self,
        store: RecordStore,
        options: FilterOptions,
        breaker: Breaker,
        timeout_s: float,
        failed: Callable[[StoreFault], None],
    ) -> None:
        self._store = store
        self._options = options
        self._breaker = breaker
        self._timeout_s = timeout_s
        self._failed = failed
        self._filters: dict[bytes, tuple[KeyedSpace, NameFilter]] = {}
        self._lock = threading.Lock()
        self._reading = OnDemand("kvstrata-filter", self._read)

    def of(self, space: KeyedSpace) -> NameFilter:
        """Return the filter of a namespace, the same for all who have it open here."""
        with self._lock:
            return self._filters.setdefault(space.start, (space, NameFilter(self._options)))[1]

    def want(self) -> None:
        """Have those that are in use read soon; returns at once."""
        self._reading.want()

    def refresh(self) -> None:
        """Read what was published about the namespaces that were looked up in since the last time; faults are told."""
        with self._lock:
            due = [(space, names) for space, names in self._filters.values() if names.used]
        for space, names in due:
            if not self._breaker.allow():
                return
            try:
                data = self._store.read([space.generation_name], self._timeout_s)[0]
                try:
                    generation = space.generation_in(data)
                except (CorruptRecord, FormatError):
                    generation = None  # as lookups take it
                names.refresh(self._store, Names(space, generation), self._timeout_s)
            except StoreFault as fault:
                self._failed(fault)
            else:
                self._breaker.success()

    def stats(self) -> tuple[Stats, int]:
        """Return figures of all together, and how many lookups they spared."""
        with self._lock:
            filters = [names for _, names in self._filters.values()]
        figures = [each.figures for each in filters]
        spared = sum(spared for spared, _, _ in figures)
        return {
            "filtered_lookups": spared,
            "filter_names": sum(count for _, count, _ in figures),
            "filter_bytes": sum(nbytes for _, _, nbytes in figures),
            "filter_off": next((each.why for each in filters if each.why), None),
        }, spared

    def close(self) -> None:
        """End the thread, and see to it that what this process published is found."""
        self._reading.stop()
        for _, names in self._filters.values():
            try:
                if self._breaker.state == "closed":
                    names.settle(self._store, self._timeout_s)
            except StoreFault as fault:
                self._failed(fault)

    def _read(self) -> float:
        if not any(names.used for _, names in list(self._filters.values())):
            return 0.0
        try:
            self.refresh()
        except Exception:  # noqa: BLE001 - a defect: filters get too old, and the store is asked
            _log.exception("kvstrata: the filters of %s could not be read", self._store.name)
        self._reading.want()  # as long as somebody asks them
        return self._options.refresh_s / 2
