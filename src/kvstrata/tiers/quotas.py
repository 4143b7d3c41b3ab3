"""How many bytes a namespace may have on disk. The oldest of its records make room for new ones.

The catalog counts, row by row within each transaction: so the figure is exact for all processes, and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.catalog import Catalog, Lasting

if TYPE_CHECKING:
    from kvstrata._core import DirtyRecord, Store

__all__ = ["Quotas"]

_AHEAD = 16  # a part of the quota that is freed at once, since looking for the oldest takes time


class Quotas:
    """The quotas of a disk tier's namespaces. `is_immutable(ns)` says whether its records are."""

    def __init__(self, catalog: Catalog, store: Store, is_immutable: Callable[[int], bool]) -> None:
        self._catalog = catalog
        self._store = store
        self._is_immutable = is_immutable
        self._known: dict[int, int] = {}

    def set(self, ns: int, quota: int) -> None:
        """Set the quota of a namespace in bytes, 0 = none, and keep to it; raises TierUnavailable."""
        use = self._catalog.usage().get(ns)
        if quota != (use.quota if use else 0):
            self._catalog.set_quota(ns, quota)
        self._known[ns] = quota
        if quota and use and use.bytes > quota:
            self._evict(ns, use.bytes - quota)

    def hold(self, records: Sequence[DirtyRecord]) -> list[bool]:
        """Return which of the records are small enough for the quotas of their namespaces."""
        self._refresh()
        return [record.length <= (self._known.get(record.ns) or record.length) for record in records]

    def part(self, records: list[DirtyRecord]) -> list[DirtyRecord]:
        """Return as many records as the quotas can hold at once, at least the first."""
        sizes: dict[int, int] = {}
        for n, record in enumerate(records):
            quota = self._known.get(record.ns)
            if quota:
                sizes[record.ns] = sizes.get(record.ns, 0) + record.length
                if sizes[record.ns] > quota and n:
                    return records[:n]
        return records

    def make_room(self, records: Sequence[DirtyRecord]) -> None:
        """Let the oldest records go where these need their room. The ledger must be held. Raises TierUnavailable."""
        sizes: dict[int, int] = {}
        for record in records:
            if self._known.get(record.ns):
                sizes[record.ns] = sizes.get(record.ns, 0) + record.length
        for ns, size in sizes.items():
            use = self._catalog.usage().get(ns)
            if use is not None and use.quota and use.bytes + size > use.quota:
                self._evict(ns, max(use.bytes + size - use.quota, min(use.quota // _AHEAD, use.quota - size)))

    def _evict(self, ns: int, size: int) -> None:
        oldest = self._catalog.oldest(ns, size)
        # The index forgets them after, and then they are overwritten and deleted without a transaction.
        lasting: Lasting = "synced" if self._is_immutable(ns) else "marked"
        self._catalog.delete(ns, [(key, seq + 1) for key, seq in oldest], lasting)
        for key, seq in oldest:
            self._store.forget_disk(ns, key, seq)

    def _refresh(self) -> None:
        try:
            self._known = {ns: use.quota for ns, use in self._catalog.usage().items()}
        except TierUnavailable:
            return  # the write will meet it, too
