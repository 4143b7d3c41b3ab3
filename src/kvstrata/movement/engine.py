"""A disk engine outside the host's index, and what a namespace does with it.

What is put is in the engine before the put returns, and what is removed is gone from it. All changes of a cache, in
memory and engine together, are made one after the other, under one lock of all processes: so engine and memory can't
disagree on which came last. Reads take no lock; what they may bring up is decided as for tiers elsewhere, by numbers
(core/store/remote.cpp), and what that refuses is looked up once more under the lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.errors import CacheClosed, TierUnavailable
from kvstrata.movement.cost import CostModel
from kvstrata.movement.remote_writer import Change, Target, Unsent
from kvstrata.movement.remotes import Remotes, RemoteSpace
from kvstrata.record import TAGGED
from kvstrata.tiers.base import Key, Stats, StoreFault
from kvstrata.tiers.engines.directory import FileLock
from kvstrata.tiers.engines.tier import EngineTier
from kvstrata.tiers.engines.turns import Turns

if TYPE_CHECKING:
    from kvstrata._core import Pin, Store
    from kvstrata.tiers.engines.btree import BtreeStore
    from kvstrata.tiers.engines.lsm import LsmStore

__all__ = ["Engine", "EngineSpace", "open_engine"]

_LOOKUP_S, _CHANGE_S, _GENERATION_S = 1.0, 10.0, 60.0  # a change waits long where other threads want the GIL
_TRIES = 3  # of a write, when the namespace had been cleared
_REAP_S = 0.2


def open_engine(name: str, directory: Path, cap: int) -> BtreeStore | LsmStore:
    """Open the engine of a cache's directory; raises MissingExtra, TierUnavailable."""
    if name == "lsm":
        from kvstrata.tiers.engines.lsm import LsmStore

        return LsmStore(directory / "lsm", cap)
    from kvstrata.tiers.engines.btree import BtreeStore

    return BtreeStore(directory / "btree", cap)


class Order:
    """The lock under which all changes are made: of this process's threads, and with a file, of all processes."""

    def __init__(self, file: Path | None) -> None:
        self._turns = Turns()
        self._closed = False
        self._file = None if file is None else FileLock(file)

    def take(self, timeout_s: float) -> None:
        """Take it; raises TierUnavailable when it can't be had in that time, in s, and then nothing is taken."""
        until = time.monotonic() + timeout_s
        if self._closed:
            raise CacheClosed("this cache is closed")
        if self._turns.take(timeout_s):
            try:
                if self._file is None or self._file.take(timeout_s=max(0.0, until - time.monotonic())):
                    return
            except BaseException:
                self._turns.release()
                raise
            self._turns.release()
        raise TierUnavailable(f"nothing was changed: others have been changing the cache for {timeout_s:g} s")

    def release(self) -> None:
        """Give it back."""
        try:
            if self._file is not None:
                self._file.release()
        finally:
            self._turns.release()

    @contextmanager
    def held(self, timeout_s: float) -> Iterator[None]:
        """Hold it for a block."""
        self.take(timeout_s)
        try:
            yield
        finally:
            self.release()

    def close(self) -> None:
        """Let nobody take it any more, and close the file; who has it gets a while to be done."""
        self._closed = True
        done = self._turns.take(_CHANGE_S)
        if self._file is not None:
            self._file.close()
        if done:
            self._turns.release()

    def leave_to_parent(self) -> None:
        """In a forked child: close the file, whichever of the parent's threads has the lock."""
        self._closed = True
        if self._file is not None:
            self._file.close()


class Engine(Remotes):
    """The one tier of a cache with an engine."""

    def __init__(self, store: Store, engine: BtreeStore | LsmStore, directory: Path, cost: CostModel) -> None:
        store.watch()
        self.engine = engine
        self.order = Order(directory / "engine.order" if engine.name == "btree" else None)
        self.tier = EngineTier(
            engine, self.order.held, lookup_s=_LOOKUP_S, change_s=_CHANGE_S, generation_s=_GENERATION_S
        )
        """The engine as a tier."""
        self.store, self.cost, self.tiers, self.writers = store, cost, [self.tier], []
        self.lease_ms = round(2000 * _LOOKUP_S)
        self.unsent = Unsent(store)
        self.refused = self.shared = self.unwritten = 0
        self._reaped = 0.0

    def reap(self) -> None:
        """Settle what processes that have died left unsent; seldom."""
        now = time.monotonic()
        if now - self._reaped > _REAP_S:
            self._reaped = now
            self.store.reap()

    def figures(self) -> Stats:
        """Return the counters of this process, and what the engine says."""
        own: Stats = {"tier": self.tier.name, "refused_records": self.refused, "unwritten_records": self.unwritten}
        return own | self.tier.stats()

    def stats(self) -> list[Stats]:
        """Return nothing: it is no tier elsewhere."""
        return []

    def close(self) -> None:
        """Let go of the engine."""
        self.order.close()
        self.tier.close()

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the files."""
        self.engine.leave_to_parent()
        self.order.leave_to_parent()


class EngineSpace(RemoteSpace):
    """A namespace in the engine. Who begins a change has the cache's order until it is ended."""

    def _engine(self) -> tuple[Engine, Target]:
        remotes, targets = self._bind()
        assert isinstance(remotes, Engine)
        return remotes, targets[0]

    # ---- Changes

    def begin(self) -> Change:
        """See RemoteSpace; raises TierUnavailable where others are changing the cache for too long."""
        engine, _ = self._engine()
        engine.order.take(_CHANGE_S)
        try:
            return engine.unsent.begin()
        except BaseException:
            engine.order.release()
            raise

    def drop(self, change: Change) -> None:
        """See RemoteSpace."""
        engine, _ = self._engine()
        try:
            engine.unsent.end(change)
        finally:
            engine.order.release()

    def changed(self, change: Change, keys: Sequence[Key]) -> None:
        """Write what was put; raises TierUnavailable, and then the keys are in memory no more."""
        engine, target = self._engine()
        try:
            self._written(engine, target, list(dict.fromkeys(map(_bytes, keys))))
        except BaseException:
            self._space().remove_many(list(keys))
            raise
        finally:
            self.drop(change)

    def _written(self, engine: Engine, target: Target, keys: list[bytes]) -> None:
        records = self._space().records(keys)
        chosen = [record for record in records if record is not None and not record.flags & TAGGED]
        gone = [key for key, record in zip(keys, records, strict=True) if record is None or record.flags & TAGGED]
        try:
            if gone:  # nobody there knows of tags; and what has left memory already must not be older there
                engine.unwritten += len(gone)
                engine.tier.delete(target.keyed, gone)
            for left in reversed(range(_TRIES)):
                if not chosen:
                    break
                try:
                    engine.tier.write(target.keyed, chosen)
                    break
                except StoreFault as fault:
                    if fault.kind != "cleared" or not left:
                        raise
        finally:
            del records
            chosen.clear()  # and with them the pins, whoever keeps the exception

    def removed(self, change: Change, keys: Sequence[Key]) -> None:
        """Remove keys from the engine, before it returns; raises TierUnavailable, and then they may come back."""
        engine, target = self._engine()
        try:
            engine.tier.delete(target.keyed, keys)
        finally:
            self.drop(change)

    def cleared(self, change: Change, here: Callable[[], None]) -> None:
        """Make all that is in the engine unreachable, and, between, what is `here`."""
        engine, target = self._engine()
        space = self._space()
        try:
            space.change_all()
            here()
            engine.tier.clear(target.keyed)
            space.change_all()
        finally:
            self.drop(change)

    # ---- Lookups

    def fetch(self, keys: Sequence[Key]) -> list[Pin | None]:
        """See RemoteSpace; who misses the same key at once asks at once, as waiting for another takes longer."""
        engine, target = self._engine()
        if len(keys) == 1:  # the whole of most lookups of what isn't there, so it goes first
            space = self._space()
            if engine.tier.lacks(target.keyed, keys[0], (space.epoch, space.last_change_of_all)):
                return [None]
        return self._fetch(engine, [target], keys)

    def _once_more(
        self, remotes: Remotes, targets: list[Target], keys: Sequence[Key], pins: list[Pin | None], refused: list[int]
    ) -> None:
        """Look up what was refused, as something was being changed, while nothing is."""
        engine, _ = self._engine()
        try:
            with engine.order.held(_LOOKUP_S):
                engine.reap()
                found, still = self._look_up(remotes, targets, [keys[i] for i in refused])
        except TierUnavailable:
            engine.refused += len(refused)
            return
        engine.refused += len(still)
        for i, pin in zip(refused, found, strict=True):
            pins[i] = pin


def _bytes(key: Key) -> bytes:
    return key.encode() if isinstance(key, str) else bytes(key)
