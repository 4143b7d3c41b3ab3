"""Holders: who wants records to stay in memory, whatever the policies say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstrata._core import Store
    from kvstrata.cache import Cache
    from kvstrata.namespace import Namespace
    from kvstrata.tiers.base import Key

__all__ = ["Holder"]

_AT_ONCE = 256  # keys whose values are pinned at once


class Holder:
    """Somebody by a name, for all processes that open the cache, who keeps up to `limit` bytes of records in memory.

    What is held isn't evicted, by nobody's put. It goes when it is deleted, overwritten or cleared, when it expires,
    or with `release` and `close`; a process may end meanwhile. `Cache.holder` makes one.
    """

    def __init__(self, cache: Cache, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self._cache = cache
        self._number = self._store.open_holder(name, limit)

    @property
    def _store(self) -> Store:
        return self._cache.tiers.live_store()

    def __repr__(self) -> str:
        return f"<kvstrata holder {self.name!r}, {self.held_bytes:,} of {self.limit:,} bytes>"

    def hold(self, ns: Namespace, keys: Sequence[Key]) -> int:
        """Keep the records of those keys in memory, from below if they lie there; returns how many are held.

        Keys that are absent are skipped. Raises TierFull beyond the limit; those before are held then.
        """
        held = 0
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            pins = ns.pin_many(part)  # brings them up
            try:
                held += ns._space.hold(part, self._number)
            finally:
                for pin in pins:
                    if pin is not None:
                        pin.release()
        return held

    def release(self, ns: Namespace | None = None, keys: Sequence[Key] | None = None) -> None:
        """Let go of those keys, or of everything."""
        if ns is None or keys is None:
            self._store.let_go_of_all(self._number)
        else:
            ns._space.let_go(keys, self._number)

    def close(self) -> None:
        """Let go of everything, for everybody, and free the name and the limit."""
        self._store.close_holder(self._number)

    @property
    def held_bytes(self) -> int:
        """The sum of the sizes of the records held, with their headers and padding."""
        return next((held for name, _, held in self._store.holders() if name == self.name), 0)
