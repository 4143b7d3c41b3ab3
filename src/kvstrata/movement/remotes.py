"""The tiers elsewhere of a cache, and what a namespace does with them.

After a miss here they are asked in order; what is found comes into memory as an ordinary put, unless it may be older
than a change that was made here. Changes reach them through a `RemoteWriter` each; removals before they return.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvstrata import _core
from kvstrata.errors import TierUnavailable
from kvstrata.movement.cost import CostModel
from kvstrata.movement.remote_writer import Change, RemoteWriter, Target, Unsent, trust_from
from kvstrata.movement.single_flight import fetch_once
from kvstrata.tiers.base import Key, Stats
from kvstrata.tiers.encodings import Encoding
from kvstrata.tiers.keyed import KeyedTier
from kvstrata.tiers.small_files import replace_file, usable

if TYPE_CHECKING:
    from kvstrata._core import Pin, Space, Store

__all__ = ["RemoteSpace", "Remotes"]

_STATE = "remote.json"
_PROMOTED, _PRESENT, _REFUSED = 0, 1, 2  # what Space.promote says; else there was no room
_AT_CLOSING_S = 5.0


class _State(msgspec.Struct, frozen=True):
    """What `remote.json` says: what was written to `tiers` before `distrusted`, ns since the epoch, counts for nothing.

    `open`: nor does what was written until the next opening. A damaged file is read as one that names no `tiers`.
    """

    distrusted: int
    open: bool
    tiers: list[str] | None


class Remotes:
    """The tiers, in the order in which they are asked, and a writer for each."""

    def __init__(self, store: Store, tiers: Sequence[KeyedTier], cost: CostModel) -> None:
        store.watch()
        self.store = store
        self.cost = cost
        self.lease_ms = max(1, round(1000 * sum(tier.lookup_s for tier in tiers)))
        self.tiers = list(tiers)
        self.unsent = Unsent(store)
        self.writers = [RemoteWriter(store, tier, self.unsent) for tier in tiers]
        self.refused = self.shared = 0

    def flush(self, timeout: float) -> bool:
        """Wait until they have what this process put; False when the time, in s, was over first."""
        until = time.monotonic() + timeout
        return all(writer.flush(until) for writer in self.writers)

    def stats(self) -> list[Stats]:
        """Return the figures of each, of this process."""
        return [
            {"tier": tier.name}
            | tier.stats()
            | writer.stats()
            | {"refused_records": self.refused, "shared_lookups": self.shared}
            for tier, writer in zip(self.tiers, self.writers, strict=True)
        ]

    def close(self) -> None:
        """Bring there what is left, for 5 s at most and only while they answer; then let go of them."""
        for tier, writer in zip(self.tiers, self.writers, strict=True):
            writer.stop(_AT_CLOSING_S)
            tier.close()

    # ---- Over restarts

    @staticmethod
    def restore_trust(store: Store, directory: Path, tiers: list[str]) -> None:
        """Tell a new mapping from when on what was written elsewhere counts, `tiers` being where that is.

        If the last one went without saying that everything had been sent to the same tiers, nothing that was written
        until now does, where it could be older than what was here. Raises ConfigError when the directory can't be used.
        """
        state = _read_state(directory)
        if state is None and not tiers:
            return
        if state is None:
            distrusted = 0
        else:
            distrusted = state.distrusted if not state.open and state.tiers == tiers else trust_from()
        store.distrust(distrusted)
        with usable(directory):
            _write_state(directory, _State(distrusted, True, tiers))

    @staticmethod
    def differences(directory: Path, tiers: list[str]) -> dict[str, tuple[object, object]]:
        """Return how the tiers of who made the mapping differ from these, as {option: (theirs, ours)}."""
        state = _read_state(directory)
        theirs = [] if state is None else state.tiers
        return {} if theirs is None or theirs == tiers else {"remote": (theirs, tiers)}

    def keep_trust(self, directory: Path, tiers: list[str]) -> None:
        """Write down what the next mapping has to know; for the last process to leave this one, which had `tiers`."""
        if not len(self.unsent):
            with suppress(OSError, TierUnavailable):
                self.store.reap()  # the dead may have left something unsent
                _write_state(directory, _State(self.store.distrusted(), False, tiers))


class RemoteSpace:
    """A namespace in the tiers elsewhere. In a forked child, it finds those of the child at its first use."""

    def __init__(
        self, name: str, version: int, *, immutable: bool, space: Callable[[], Space],
        remotes: Callable[[], Remotes], replaced: Callable[[Space, Key, int], None], encoding: Encoding,
    ) -> None:  # fmt: skip
        self._name = name
        self._version = version
        self._immutable = immutable
        self._space = space
        self._find = remotes
        self._encoding = encoding
        self._replaced = replaced  # called with the number of a record that replaced one on disk
        self._bound: tuple[Remotes, list[Target]] | None = None

    def forget_parent(self) -> None:
        """In a forked child: let go of what is the parent's."""
        self._bound = None

    def _bind(self) -> tuple[Remotes, list[Target]]:
        if self._bound is None:
            remotes = self._find()
            targets = [
                Target(
                    self._space,
                    tier.open_namespace(self._name, self._version, self._encoding),
                    immutable=self._immutable,
                )
                for tier in remotes.tiers
            ]
            self._bound = remotes, targets
        return self._bound

    # ---- Changes

    def begin(self) -> Change:
        """Announce a change, before it is made here; it must be ended by one of the methods below."""
        return self._bind()[0].unsent.begin()

    def changed(self, change: Change, keys: Sequence[Key]) -> None:
        """Let what was put reach the tiers soon."""
        remotes, targets = self._bind()
        remotes.unsent.more(change, len(keys) * len(targets))
        for target, writer in zip(targets, remotes.writers, strict=True):
            for key in keys:
                writer.add(target, _bytes(key), change)
        remotes.unsent.end(change)

    def drop(self, change: Change) -> None:
        """Nothing was changed after all."""
        self._bind()[0].unsent.end(change)

    def removed(self, change: Change, keys: Sequence[Key]) -> None:
        """Remove keys from the tiers, before it returns.

        Raises TierUnavailable when one can't be reached. Then it is done as soon as that is possible, and nobody on
        this host is given them from there meanwhile.
        """
        remotes, targets = self._bind()
        failed: TierUnavailable | None = None
        try:
            for tier, target, writer in zip(remotes.tiers, targets, remotes.writers, strict=True):
                try:
                    tier.delete(target.keyed, keys)
                except TierUnavailable as error:
                    failed = error
                    remotes.unsent.more(change, len(keys))
                    for key in keys:
                        writer.add(target, _bytes(key), change, must=True)
        finally:
            remotes.unsent.end(change)
        if failed is not None:
            raise TierUnavailable(f"removed on this host, and there as soon as it can be reached: {failed}") from failed

    def cleared(self, change: Change, here: Callable[[], None]) -> None:
        """Make all that is in the tiers unreachable, and, between, what is `here`. Raises as `removed`."""
        remotes, targets = self._bind()
        space = self._space()
        failed: TierUnavailable | None = None
        try:
            space.change_all()  # what is being read now isn't promoted any more
            here()
            for tier, target, writer in zip(remotes.tiers, targets, remotes.writers, strict=True):
                try:
                    tier.clear(target.keyed)
                except TierUnavailable as error:
                    failed = error
                    remotes.unsent.more(change, 1)
                    writer.add(target, None, change)
            space.change_all()  # and everybody here looks up the generation anew
        finally:
            remotes.unsent.end(change)
        if failed is not None:
            raise TierUnavailable(f"cleared on this host, and there as soon as it can be reached: {failed}") from failed

    # ---- Lookups

    def fetch(self, keys: Sequence[Key]) -> list[Pin | None]:
        """Bring up what the tiers have of keys that aren't here; None for the rest."""
        remotes, targets = self._bound or self._bind()
        if len(keys) == 1 and _lacked(keys[0], targets):  # the whole of most lookups, so it goes first
            return [None]
        pins, shared = fetch_once(
            self._space(),
            keys,
            lambda chosen: self._fetch(remotes, targets, [keys[i] for i in chosen]),
            remotes.lease_ms,
        )
        if shared:
            remotes.shared += shared
        return pins

    def _fetch(self, remotes: Remotes, targets: list[Target], keys: Sequence[Key]) -> list[Pin | None]:
        pins, refused = self._look_up(remotes, targets, keys)
        if refused:
            self._once_more(remotes, targets, keys, pins, refused)
        return pins

    def _once_more(
        self, remotes: Remotes, targets: list[Target], keys: Sequence[Key], pins: list[Pin | None], refused: list[int]
    ) -> None:
        """Deal with records that may be older than a change that was made here."""
        del targets, keys, pins
        remotes.refused += len(refused)

    def _look_up(
        self, remotes: Remotes, targets: list[Target], keys: Sequence[Key]
    ) -> tuple[list[Pin | None], list[int]]:
        """Ask the tiers; returns the positions of what was refused, too."""
        refused: list[int] = []
        space = self._space()
        state = space.epoch, space.last_change_of_all
        low = remotes.store.low()
        pins: list[Pin | None] = [None] * len(keys)
        left = [] if space.moved_on else list(range(len(keys)))
        for number, (tier, target) in enumerate(zip(remotes.tiers, targets, strict=True)):
            if not left:
                break
            absent = []
            nbytes, started = 0, remotes.cost.clock()
            found = tier.load(target.keyed, [keys[i] for i in left], state)
            for n, i in enumerate(left):
                record, found[n] = found[n], None  # so that its memory goes as soon as it can
                if record is None:
                    absent.append(i)
                    continue
                nbytes += len(record.value)
                became, replaced, pin = space.promote(
                    keys[i], record.value, record.expires, record.written, low, state[0]
                )
                if became == _PROMOTED:
                    if replaced:
                        self._replaced(space, keys[i], replaced)
                    for above, writer in zip(targets[:number], remotes.writers, strict=False):
                        writer.add(above, _bytes(keys[i]), None)
                elif became == _PRESENT:
                    there = space.pin(keys[i])
                    pin = None if there is _core.BELOW else there
                elif became == _REFUSED:
                    refused.append(i)
                else:
                    pin = _core.local_pin(record.value)
                pins[i] = pin
            if nbytes:
                remotes.cost.observe(tier.name, nbytes, remotes.cost.clock() - started)
            left = absent
        return pins, refused

    def places(self, keys: Sequence[Key]) -> list[str | None]:
        """Return in which tier each key seems to be, by its name, None for nowhere; only `fetch` checks."""
        remotes, targets = self._bind()
        space = self._space()
        low = remotes.store.low()
        state = space.epoch, space.last_change_of_all
        there: list[str | None] = [None] * len(keys)
        if state[1] >= low or space.moved_on:
            return there
        # What was changed here and isn't there yet would be refused.
        left = [i for i, number in enumerate(space.last_changes(keys)) if number < low]
        for tier, target in zip(remotes.tiers, targets, strict=True):
            answers = tier.contains(target.keyed, [keys[i] for i in left], state)
            for i, answer in zip(left, answers, strict=True):
                there[i] = tier.name if answer else None
            left = [i for i in left if not there[i]]
        return there


def _lacked(key: Key, targets: Sequence[Target]) -> bool:
    """Whether no tier has a key, as their filters know."""
    for target in targets:
        names = target.keyed.filter
        if names is None or not names.lacks(key):
            return False
    return True


def _bytes(key: Key) -> bytes:
    return key.encode() if isinstance(key, str) else bytes(key)


def _read_state(directory: Path) -> _State | None:
    """Return what the file says, None where there is none."""
    file = directory / _STATE
    if not file.exists():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=_State)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return _State(0, True, None)


def _write_state(directory: Path, state: _State) -> None:
    replace_file(directory / _STATE, msgspec.json.encode(state), sync=True)
