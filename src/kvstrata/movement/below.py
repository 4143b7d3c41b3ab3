"""The tier under the host's index, as a cache and its namespaces use it: what comes up from there, what it forgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstrata.tiers.base import Arrived, Key, NamespaceState, Stats, Tier
from kvstrata.tiers.disk import DiskTier

if TYPE_CHECKING:
    from kvstrata._core import Pin, Space, Store
    from kvstrata.movement.cost import CostModel
    from kvstrata.tiers.partial import PartLoader

__all__ = ["Below"]


class Below:
    """Memory and the tier under it, for all threads of a process.

    Where there is no such tier, nothing comes up, and nothing has to be forgotten.
    """

    def __init__(self, store: Store, tier: Tier | None, cost: CostModel) -> None:
        self._store = store
        self._cost = cost
        self.tier = tier

    @property
    def name(self) -> str:
        """The name of the tier, "" if there is none."""
        return self.tier.name if self.tier else ""

    def namespaces(self) -> list[NamespaceState]:
        """Return those that the tier knows; raises TierUnavailable."""
        return self.tier.namespaces() if self.tier else []

    def usage(self) -> dict[int, tuple[int, int]]:
        """Return by number of a namespace how many records and bytes it has in the tier."""
        return self.tier.usage() if self.tier else {}

    def stats(self) -> Stats | None:
        """Return what the tier says of itself."""
        return self.tier.stats() if self.tier else None

    # ---- Up

    def load(self, ns: int, keys: list[Key], arrived: Arrived | None = None) -> list[Pin | memoryview | None]:
        """Bring records up; None where that can't be done."""
        if self.tier is None:
            return [None] * len(keys)
        sizes = self.sizes(ns, keys)  # now: who copies a value as it arrives lets go of its pin
        started = self._cost.clock()
        values = self.tier.load(ns, keys, arrived)
        if all(sizes) and None not in values:  # else it has failed, or waited for somebody else
            self._cost.observe(self.tier.name, sum(sizes), self._cost.clock() - started)
        return values

    def parts(self) -> PartLoader | None:
        """Return what loads records piece by piece, if that is possible."""
        return self.tier.parts() if isinstance(self.tier, DiskTier) else None

    def sizes(self, ns: int, keys: Sequence[Key]) -> list[int]:
        """Return for each key the bytes of its record if that lies in the tier only; 0 for others."""
        if self.tier is None:
            return [0] * len(keys)
        return [0 if at is None else at[4] for at in self._store.find_on_disk(ns, keys)]

    # ---- What is gone

    def forget_older(self, ns: int, keys: Sequence[tuple[Key, int | None]]) -> None:
        """Remove what the tier has of keys that were deleted, where a number is given only what has a lower one."""
        if self.tier:
            epoch = self._store.undurable_epoch(ns)
            if epoch:  # somebody's clear() is not done, and may never be
                self.persist_epoch(ns, epoch)
            self.tier.delete(ns, keys)
            self._store.pay(ns, [key for key, _ in keys])

    def remove_prefix(self, space: Space, prefix: bytes) -> int:
        """Remove all keys of a namespace that start with `prefix`, from memory too; returns how many were there."""
        before = self._store.next_seq()
        present = 0
        owed: list[tuple[bytes, int]] = []
        for shard in range(self._store.shards):
            keys = space.keys_of(shard, prefix)
            removed, on_disk = space.remove_many(keys)
            present += removed
            after = self._store.next_seq()  # what was put since `before` is among them; what is put again is not
            owed += [(keys[i], after) for i in on_disk]
        if self.tier:
            self.forget_older(space.id, owed)
            self.tier.delete_prefix(space.id, prefix, before)  # those that the index has no room for; syncs all of it
        return present

    def persist_epoch(self, ns: int, epoch: int) -> None:
        """Make a clear() outlast a restart."""
        if self.tier:
            self.tier.set_epoch(ns, epoch)
            self._store.epoch_is_durable(ns, epoch)

    def persist_tag(self, slot: int, seq: int) -> None:
        """Make a delete_tag() outlast a restart."""
        if self.tier:
            self.tier.remove_tag(slot, seq)
