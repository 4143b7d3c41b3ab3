"""What a tier below memory has to do for the cache. Batched throughout: one call carries a whole request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvstrata._core import DirtyRecord, Pin

__all__ = ["Arrived", "Key", "NamespaceState", "Stats", "Tier"]

Key = str | bytes
Arrived = Callable[[int, Pin | memoryview], None]
Stats = dict[str, int | float | str | None]


class NamespaceState(NamedTuple):
    """What a persistent tier remembers of a namespace."""

    id: int
    name: str
    version: int
    epoch: int
    immutable: bool


class Tier(Protocol):
    """A persistent store of records below the memory tier.

    The host's index says what is where, so a tier is asked only for records that it has. Faults of the tier are
    counted and become misses; only what the caller asked to be made durable (a deletion, a new epoch) raises
    TierUnavailable when that could not be done.
    """

    name: str

    def recover(self) -> None:
        """Bring what is stored in order, and tell a store that is new what there is."""

    def namespaces(self) -> list[NamespaceState]:
        """Return those that it knows."""

    def open_namespace(self, name: str, version: int, immutable: bool) -> NamespaceState:
        """Make a namespace known, or a newer version of it; raises VersionConflict for an older one."""

    def set_epoch(self, ns: int, epoch: int) -> None:
        """Make records of an earlier epoch unreachable, also after a restart, before it returns."""

    def remove_tag(self, slot: int, seq: int) -> None:
        """Make records with that tag and a lower number unreachable, also after a restart, before it returns."""

    def write(self, records: list[DirtyRecord]) -> None:
        """Store records that are pinned in memory, and settle each with the store: durable, or failed."""

    def load(self, ns: int, keys: Sequence[Key], arrived: Arrived | None = None) -> list[Pin | memoryview | None]:
        """Return the values: promoted to memory and pinned, or, where memory has no room, in private memory.

        `arrived` is called with the position of a key and its value as soon as it is there, from any thread, so that
        it can be used while others are read.
        """

    def delete(self, ns: int, keys: Sequence[tuple[Key, int | None]]) -> None:
        """Forget records, or with a number only those with a lower one, also after a restart, before it returns."""

    def delete_prefix(self, ns: int, prefix: bytes, below: int) -> None:
        """Forget records whose keys start with `prefix` and whose number is below `below`, like `delete`."""

    def save(self, name: str, data: bytes) -> None:
        """Keep a small file beside the records, in place of an older one; raises OSError, TierError."""

    def tend(self) -> None:
        """Do what is due, without raising for faults; called after each batch, or ten times a second."""

    def stats(self) -> Stats:
        """Return counters, in bytes and numbers of records."""

    def close(self) -> None:
        """Let go of everything. What was written stays."""
