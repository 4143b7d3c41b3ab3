"""Write-behind for tiers elsewhere: what is put here is brought there soon after, and what is gone here goes there.

Its queue holds keys, not values: when a key's turn comes, its record is taken from memory as it is then. So a tier
that is down keeps nothing in memory and no put waiting. Every change is unsent, and says so to the other processes,
from before it is made until the tier has it; what is read there meanwhile of such a key is refused
(core/store/remote.cpp).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvstrata.errors import KVStrataError, TierUnavailable
from kvstrata.record import TAGGED
from kvstrata.threads import new_thread
from kvstrata.tiers.base import Stats, StoreFault
from kvstrata.tiers.keyed import KeyedTier
from kvstrata.tiers.keyed_space import KeyedSpace

if TYPE_CHECKING:
    from kvstrata._core import DirtyRecord, Space, Store

_log = logging.getLogger("kvstrata.remote")

__all__ = ["Change", "RemoteWriter", "Target", "Unsent", "trust_from"]

_AT_ONCE = 64  # keys
_BYTES_AT_ONCE = 16 << 20
_IDLE_S = 0.2
_LONGEST_PAUSE_S = 30.0
_SKEW_NS = 10_000_000_000  # as in core/store/remote.cpp
_SETTLING_S = 1.0  # after which a command that timed out earlier is no longer carried out by a server that is back
_RECHECKS = 3


def trust_from() -> int:
    """The time, ns since the Unix epoch, before which nothing counts that was written elsewhere until now."""
    return time.time_ns() + _SKEW_NS


class Change:
    """Something that was put or removed here. `left`: how many queues still hold a part of it."""

    __slots__ = ("left", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.left = 1


class Unsent:
    """This process's changes that have not got everywhere; keeps the core told of the oldest."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: OrderedDict[int, Change] = OrderedDict()  # by identity, oldest first
        self._lock = threading.Lock()

    def begin(self) -> Change:
        """Announce a change that is about to be made."""
        with self._lock:
            change = Change(self._store.next_number())
            if not self._open:
                self._store.set_unsent(change.number)
            self._open[id(change)] = change
            return change

    def more(self, change: Change, parts: int) -> None:
        """Say that so many more have to `end` it."""
        with self._lock:
            change.left += parts

    def end(self, change: Change) -> None:
        """Say that one of those who hold it is done with it."""
        with self._lock:
            change.left -= 1
            if change.left:
                return
            oldest = next(iter(self._open)) == id(change)
            del self._open[id(change)]
            if oldest:
                self._store.set_unsent(next(iter(self._open.values())).number if self._open else 0)

    def __len__(self) -> int:
        return len(self._open)


class Target:
    """A namespace in one tier: where its records are here, and where there."""

    def __init__(self, space: Callable[[], Space], keyed: KeyedSpace, *, immutable: bool) -> None:
        self.space = space
        self.keyed = keyed
        self.immutable = immutable


class _Item:
    __slots__ = ("change", "due", "must", "rechecks")

    def __init__(self) -> None:
        self.change: Change | None = None  # the oldest one that isn't there
        self.due = 0.0  # not before then, monotonic; inf: once the tier answers again
        self.must = False  # if it isn't here any more, it has to go there, whatever the namespace
        self.rechecks = 0


_Place = tuple[Target, bytes | None]  # a key, or None: the namespace's generation has to change


class RemoteWriter:
    """A thread that brings this process's changes to one tier.

    The queue has room for `limit` keys. When it is full, what is put is not brought there (`dropped_records`); of a
    namespace that isn't immutable, whatever was written there until then is distrusted from then on.
    """

    def __init__(self, store: Store, tier: KeyedTier, unsent: Unsent, *, limit: int = 65_536) -> None:
        self._store = store
        self._tier = tier
        self._unsent = unsent
        self._limit = limit
        self._queue: OrderedDict[_Place, _Item] = OrderedDict()
        self._busy = 0
        self._waiting = False
        self._numbers: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._stopping = False
        self._give_up_at = float("inf")
        self._probe_at = 0.0
        self._pause_s = _IDLE_S  # after the next failure
        self._hurried = False
        self._thread = new_thread(self._run, "kvstrata-remote")
        self._thread.start()

    # ---- For those who make changes

    def add(self, target: Target, key: bytes | None, change: Change | None, *, must: bool = False) -> None:
        """Queue a key. `change` is ended once the tier has it as it is here; without one, nobody minds if it hasn't."""
        with self._changed:
            item = self._queue.get((target, key))
            if item is None:
                if len(self._queue) >= self._limit and key is not None:
                    self._drop(target, change)
                    return
                item = self._queue[target, key] = _Item()
                if self._waiting:
                    self._changed.notify_all()
            item.must |= must
            self._merge(item, change)

    def _merge(self, item: _Item, change: Change | None) -> None:
        """Let an item stand for one more change. While the older one is unsent, the newer is."""
        if change is not None and item.change is not None:
            older, newer = sorted((item.change, change), key=lambda each: each.number)
            self._unsent.end(newer)
            item.change = older
        elif change is not None:
            item.change = change

    def _drop(self, target: Target, change: Change | None) -> None:
        self._numbers["dropped_records"] += 1
        if change is not None:
            if not target.immutable:
                self._store.distrust(trust_from())
            self._unsent.end(change)

    def flush(self, until: float) -> bool:
        """Wait, no longer than until that monotonic time, until all that was queued has been dealt with."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not self._queue and not self._busy, max(0.0, until - time.monotonic())
            )

    def stats(self) -> Stats:
        """Return how many keys wait, and what became of others."""
        with self._changed:
            names = ("dropped_records", "vanished_records", "rewritten_records", "refused_writes")
            return {"queued_records": len(self._queue) + self._busy, **{name: self._numbers[name] for name in names}}

    def stop(self, patience_s: float) -> None:
        """Bring there what is left, as far as that can be done without waiting for a tier that is down; then end."""
        with self._changed:
            self._stopping = True
            self._give_up_at = time.monotonic() + patience_s
            self._changed.notify_all()
        self._thread.join()

    # ---- The thread

    def _run(self) -> None:
        while True:
            target, batch = self._take()
            if target is None:
                return
            failed = False
            try:
                failed = not self._bring(target, batch)
            except KVStrataError:  # of this host: a lock, or the namespace has a newer version here
                self._put_back(target, batch, due=time.monotonic() + _IDLE_S)
                failed = True
            except Exception:  # noqa: BLE001 - a defect: one bad batch must not stop all later ones
                _log.exception("kvstrata: %d records could not be sent to %s", len(batch), self._tier.name)
                for item in batch.values():
                    self._drop(target, item.change)
            with self._changed:
                self._busy = 0
                self._changed.notify_all()
                if failed:
                    if self._stopping:
                        self._give_up_at = 0.0
                    self._changed.wait_for(lambda: self._stopping or self._hurried, self._pause_s)
                    self._hurried = False

    def _take(self) -> tuple[Target | None, dict[bytes | None, _Item]]:
        """Wait for something that is due; returns keys of one namespace, None for the end.

        No keys: only what was sent in vain is left, and somebody has to see whether the tier answers.
        """
        with self._changed:
            while True:
                now = time.monotonic()
                if self._stopping and (not self._queue or now >= self._give_up_at):
                    self._numbers["dropped_records"] += len(self._queue)
                    return None, {}
                target = parked = None
                batch: dict[bytes | None, _Item] = {}
                for (owner, key), item in self._queue.items():
                    if item.due > now and not (self._stopping and item.due < float("inf")):
                        parked = owner if item.due == float("inf") else parked
                        continue
                    if target is None:
                        target = owner
                    if owner is target:
                        batch[key] = item
                        if len(batch) == _AT_ONCE:
                            break
                if target is not None:
                    for key in batch:
                        del self._queue[target, key]
                    self._busy = len(batch)
                    return target, batch
                if parked is not None and now >= self._probe_at:
                    self._probe_at = now + _IDLE_S
                    return parked, {}
                self._waiting = True
                self._changed.wait(_IDLE_S if self._queue else None)
                self._waiting = False

    def _bring(self, target: Target, batch: dict[bytes | None, _Item]) -> bool:
        """Make the tier agree with what is here; False when it couldn't be asked.

        What is dealt with leaves the batch.
        """
        try:
            if None in batch:
                self._tier.clear(target.keyed)
                target.space().change_all()  # so that everybody here looks up the generation anew
                self._settle(batch.pop(None))
            elif not batch:
                self._tier.probe(target.keyed)
            while batch:
                self._bring_some(target, batch)
        except StoreFault as fault:
            may_arrive = fault.sent and not target.immutable
            self._put_back(target, batch, due=float("inf") if may_arrive else 0.0, first=True)
            self._pause_s = self._refused() if fault.answered else _IDLE_S
            return False
        except TierUnavailable:
            self._put_back(target, batch, first=True)
            self._pause_s = _IDLE_S
            return False
        self._pause_s = _IDLE_S
        self._unpark()
        return True

    def _refused(self) -> float:
        """The tier can be reached but doesn't take this: return how long to wait this time, twice the last."""
        self._unpark()
        with self._changed:
            self._numbers["refused_writes"] += 1
        return min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _bring_some(self, target: Target, batch: dict[bytes | None, _Item]) -> None:
        """Deal with the first keys: as many records as may be pinned and sent at once."""
        space = target.space()
        epoch = space.epoch
        before: dict[bytes, int] = {}
        chosen: list[DirtyRecord] = []
        gone: list[bytes] = []
        size = 0
        for key, item in batch.items():
            assert key is not None
            if size >= _BYTES_AT_ONCE:
                break
            (before[key],) = space.last_changes([key])
            (record,) = space.records([key])
            if record is None or record.flags & TAGGED:  # nobody there knows of tags
                if not target.immutable or item.must:
                    gone.append(key)
                if record is None and not item.must:
                    self._numbers["vanished_records"] += 1
            else:
                chosen.append(record)
                size += record.length
            del record
        try:
            if gone:
                self._tier.delete(target.keyed, gone)
            if chosen:
                self._tier.write(target.keyed, chosen)
        finally:
            chosen.clear()  # and with them the pins, whoever keeps the exception
        same_epoch = space.epoch == epoch
        for key, now in zip(before, space.last_changes(list(before)), strict=True):
            item = batch.pop(key)
            if same_epoch and now == before[key]:
                self._settle(item)
                continue
            # It was changed meanwhile, so what is there may be older than what is here.
            self._numbers["rewritten_records"] += 1
            item.must = True
            item.rechecks += 1
            self._put_back(target, {key: item}, due=time.monotonic() + _IDLE_S if item.rechecks > _RECHECKS else 0.0)

    def _settle(self, item: _Item) -> None:
        if item.change is not None:
            self._unsent.end(item.change)

    def _put_back(
        self, target: Target, items: dict[bytes | None, _Item], *, due: float = 0.0, first: bool = False
    ) -> None:
        """Queue again what isn't settled. Due at inf is what was sent and may still arrive: it has to be sent again.

        `first`: before all else, so that the head of a prefix still goes before its tail.
        """
        with self._changed:
            for key, item in reversed(items.items()) if first else items.items():
                if item.change is None and not item.must and key is not None:
                    continue
                newer = self._queue.setdefault((target, key), item)
                if newer is not item:
                    self._merge(newer, item.change)
                    newer.must |= item.must
                newer.due = due
                if first:
                    self._queue.move_to_end((target, key), last=False)

    def _unpark(self) -> None:
        """The tier answers: what may have been under way when it didn't arrives about now."""
        with self._changed:
            for item in self._queue.values():
                if item.due == float("inf"):
                    item.due = time.monotonic() + _SETTLING_S
