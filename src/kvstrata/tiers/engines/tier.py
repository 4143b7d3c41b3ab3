"""An engine of this host as a tier: what it certainly hasn't got isn't asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from kvstrata.tiers.base import Key, NamedRecord, Stats
from kvstrata.tiers.engines.name_filter import EngineFilter, NamedStore
from kvstrata.tiers.keyed import KeyedTier

if TYPE_CHECKING:
    from kvstrata._core import DirtyRecord
    from kvstrata.tiers.keyed_space import KeyedSpace

__all__ = ["EngineTier"]


class EngineTier(KeyedTier):
    """Asks an engine. All that changes it is done while `order` is held, which gives that lock for a time in s."""

    def __init__(
        self,
        engine: NamedStore,
        order: Callable[[float], AbstractContextManager[None]],
        *,
        lookup_s: float,
        change_s: float,
        generation_s: float,
    ) -> None:
        super().__init__(engine, lookup_s=lookup_s, change_s=change_s, generation_s=generation_s)
        self.filter = EngineFilter(engine, order)

    def lacks(self, space: KeyedSpace, key: Key, state: object) -> bool:
        """Whether the engine certainly hasn't got a key, without asking it; counted if so. See `load` for `state`."""
        if not self._knows(space, state):
            return False
        generation = space.generation
        if generation is None:
            return self._has_nothing(space)
        return self.filter.bloom.lacks(space.names((key,), generation)[0])

    def _knows(self, space: KeyedSpace, state: object) -> bool:
        """Whether the copy of the generation counts: names of another one would say nothing."""
        return (
            not space.uncleared and space.known_in == state and time.monotonic() - space.known_at < self._generation_s
        )

    def _has_nothing(self, space: KeyedSpace) -> bool:
        """Whether there is still no generation; counted if so."""
        if self.filter.bloom.lacks(space.generation_name):
            return True
        space.known_at = float("-inf")  # another process may have made one, so it is read anew
        return False

    def _asked(self, space: KeyedSpace, keys: Sequence[Key], state: object, *, count: bool) -> Sequence[int]:
        if not self._knows(space, state):
            return range(len(keys))
        generation = space.generation
        if generation is None:
            self._has_nothing(space)
            return range(len(keys))  # which costs little: either it is read anew, or nobody is asked
        return self.filter.positions(space.names(keys, generation), count=count)

    def _before_generation(self, space: KeyedSpace, number: int) -> list[NamedRecord]:
        del number
        self.filter.add([space.generation_name])
        return []

    def _publish(self, space: KeyedSpace, generation: int, names: list[bytes], records: Sequence[DirtyRecord]) -> None:
        del space, generation, records
        self.filter.add(names)

    def stats(self) -> Stats:
        """See KeyedTier, and figures of the filter."""
        figures, own = super().stats(), self.filter.stats()
        for name in ("lookups", "misses"):
            figures[name] = figures[name] + own["filtered_lookups"]  # type: ignore[operator]
        return figures | own

    def close(self) -> None:
        """Let go of the engine."""
        self.filter.close()
        super().close()
