"""A tier over a store that the host's index knows nothing of: it makes the names, and checks all that comes back.

Names and records hold nothing that only one host knows, so others that use the same store find the same records:
docs/format.md says how both are made. A namespace has a generation there, a random number that stands in every name;
`clear` changes it, and if the store loses it, all that was under it is lost, and nothing comes back.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from kvstrata import _core
from kvstrata.errors import CorruptRecord, FormatError, InvalidValue, TierUnavailable, WrongKey
from kvstrata.record import NAMESPACE, TAGGED, build_record
from kvstrata.tiers.base import Key, NamedRecord, RecordStore, Stats, StoreFault
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.encodings import Encoding
from kvstrata.tiers.filters import Filters
from kvstrata.tiers.keyed_records import addressed, decode
from kvstrata.tiers.keyed_space import GENERATION, GENERATION_NUMBER, KeyedSpace
from kvstrata.tiers.presence import FilterOptions, Names, Roll

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstrata._core import DirtyRecord

__all__ = ["Found", "KeyedTier"]

_log = logging.getLogger("kvstrata")
_COUNTERS = (
    "sealed_records",
    "lookups", "hits", "misses", "refused_lookups", "rejected_records", "expired_records",
    "written_records", "written_bytes", "unencoded_records", "deleted_records", "generations_read", "generations_made",
)  # fmt: skip

T = TypeVar("T")
_Question = Callable[[Sequence[bytes], float], list[Any]]  # names and seconds -> an answer to each


class Found(NamedTuple):
    """A record's value, where it expires (ms since the Unix epoch, 0 = never), and when it was written (ns)."""

    value: memoryview
    expires: int
    written: int


class _Moved(Exception):
    """The generation is another one now."""


class KeyedTier:
    """Asks one store; for all threads of a process, not for its forked children.

    A lookup takes `lookup_s` seconds at most (see RecordStore for what is added while bytes arrive), a change
    `change_s`. What goes wrong in a lookup is counted and is a miss; what can't be changed raises StoreFault, a
    TierUnavailable. A clear() by another host is seen after `generation_s` at most. With `bloom`, what is certainly not
    there isn't asked for, and what is written is published for the others' filters.
    """

    def __init__(
        self,
        store: RecordStore,
        *,
        prefix: bytes = b"kvstrata",
        lookup_s: float = 0.05,
        change_s: float = 2.0,
        generation_s: float = 1.0,
        breaker: Breaker | None = None,
        bloom: FilterOptions | None = None,
    ) -> None:
        self.name = store.name
        self.store = store
        self.breaker = breaker or Breaker(store.name)
        self._prefix = prefix
        self.lookup_s = lookup_s
        self._change_s = change_s
        self._generation_s = generation_s
        self._filters = None if bloom is None else Filters(store, bloom, self.breaker, change_s, self._failed)
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def open_namespace(self, name: str, version: int, encoding: Encoding | None = None) -> KeyedSpace:
        """Return the place of a namespace, in which values are stored by that encoding; nobody is asked yet."""
        space = KeyedSpace(self._prefix, name, version, encoding or Encoding())
        if self._filters is not None:
            space.filter = self._filters.of(space)
        return space

    # ---- Looking up

    def load(self, space: KeyedSpace, keys: Sequence[Key], state: object) -> list[Found | None]:
        """Return what is there of `keys`, checked, None for the rest.

        Whenever `state` is another one than the last time, the generation is read anew.
        """
        asked = self._asked(space, keys, state, count=True)
        if len(asked) == len(keys):
            return self._load(space, keys, state)
        result: list[Found | None] = [None] * len(keys)
        if asked:
            for position, found in zip(asked, self._load(space, [keys[i] for i in asked], state), strict=True):
                result[position] = found
        return result

    def _asked(self, space: KeyedSpace, keys: Sequence[Key], state: object, *, count: bool) -> Sequence[int]:
        """Return the positions of keys that may be there."""
        del state
        if self._filters is None or space.filter is None:
            return range(len(keys))
        positions = space.filter.positions(keys, count=count)
        if space.filter.stale:
            self._filters.want()
        return positions

    def _load(self, space: KeyedSpace, keys: Sequence[Key], state: object) -> list[Found | None]:
        self._count(lookups=len(keys))
        result: list[Found | None] = [None] * len(keys)
        answers = self._look_up(space, keys, state, self.store.read)
        if answers is not None:
            generation, data = answers
            checked = _core.check_records(
                data, keys, space.seed, 0, space.version, generation & 0xFFFFFFFF, NAMESPACE | TAGGED
            )
            for position, record in enumerate(checked):
                if isinstance(record, tuple):
                    start, length, expires, written, number, value_len = record
                    value = memoryview(cast("Buffer", data[position]))[start : start + length].toreadonly()
                    if number:
                        decoded = self._decoded(space, keys[position], generation, written, number, value, value_len)
                        if decoded is None:
                            continue
                        value = decoded
                    result[position] = Found(value, expires, written)
                elif record is not None:
                    self._count(**{record: 1})
        hits = sum(found is not None for found in result)
        self._count(hits=hits, misses=len(keys) - hits)
        return result

    def _decoded(
        self, space: KeyedSpace, key: Key, generation: int, written: int, number: int, payload: memoryview, length: int
    ) -> memoryview | None:
        """Return the value of a record that is encoded; None, counted, where that can't be done."""
        try:
            return decode(space, space.names([key], generation)[0], written, number, payload, length)
        except CorruptRecord:
            self._count(rejected_records=1)
        except WrongKey as wrong:
            self._tell_first("sealed_records", wrong)
        return None

    def contains(self, space: KeyedSpace, keys: Sequence[Key], state: object) -> list[bool]:
        """Say which keys seem to be there; only a load checks."""
        there = [False] * len(keys)
        asked = self._asked(space, keys, state, count=False)
        if asked:
            found = self._contains(space, [keys[i] for i in asked], state)
            for position, answer in zip(asked, found, strict=True):
                there[position] = answer
        return there

    def _contains(self, space: KeyedSpace, keys: Sequence[Key], state: object) -> list[bool]:
        def ask(names: Sequence[bytes], timeout_s: float) -> list[Any]:
            if names[0] != space.generation_name:
                return list(self.store.contains(names, timeout_s))
            until = time.monotonic() + timeout_s
            current: list[Any] = list(self.store.read(names[:1], timeout_s))
            return current + self.store.contains(names[1:], max(0.001, until - time.monotonic()))

        answers = self._look_up(space, keys, state, ask)
        return [False] * len(keys) if answers is None else [bool(there) for there in answers[1]]

    def _look_up(
        self,
        space: KeyedSpace,
        keys: Sequence[Key],
        state: object,
        ask: Callable[[Sequence[bytes], float], list[T | None]],
    ) -> tuple[int, list[T | None]] | None:
        """Ask for the names of keys in the current generation; None where that can't be done, or there is none."""
        until = time.monotonic() + self.lookup_s

        def left() -> float:
            return max(0.001, until - time.monotonic())

        permitted = False
        for _ in range(3):  # once or twice, unless somebody clears it all the time
            if not keys or space.uncleared:
                return None
            known = space.known_in == state
            fresh = known and time.monotonic() - space.known_at < self._generation_s
            if fresh and space.generation is None:
                return None
            if not permitted:
                permitted = self.breaker.allow()
                if not permitted:
                    self._count(refused_lookups=len(keys))
                    return None
            try:
                generation = space.generation
                if generation is None or not known:
                    self._read_generation(space, state, left())
                    self.breaker.success()
                    continue
                return self._ask(space, keys, state, generation, fresh, ask, left)
            except _Moved:
                continue
            except StoreFault as fault:
                self._failed(fault)
                return None
        return None

    def _ask(
        self, space: KeyedSpace, keys: Sequence[Key], state: object, generation: int, fresh: bool,
        ask: _Question, left: Callable[[], float],
    ) -> tuple[int, list[Any]]:  # fmt: skip
        """Ask for names in a generation, and in the same breath whether that is still the one, unless it is fresh."""
        names = space.names(keys, generation)
        head = [] if fresh else [space.generation_name]
        asked_at = time.monotonic()
        try:
            got = ask(head + names, left())
        except StoreFault as fault:
            if fault.found is None or (head and fault.found[0] is None):
                raise  # without the generation, nothing of it counts
            self._failed(fault)
            got = fault.found
        else:
            self.breaker.success()
        if head:
            self._remember(space, state, got[0], asked_at)
            if space.generation != generation:
                raise _Moved
        return generation, got[len(head) :]

    # ---- Changing

    def write(self, space: KeyedSpace, records: Sequence[DirtyRecord]) -> None:
        """Store records that are pinned in memory; raises StoreFault, and TierUnavailable while nobody is asked."""
        generation = self._generation_to_change(space, make=True)
        assert generation is not None
        names = space.names([record.key for record in records], generation)
        now = time.time_ns()
        items: list[NamedRecord] = []
        left_out: list[bytes] = []  # an older record must not stay in its place
        for name, record in zip(names, records, strict=True):
            try:
                items.append(addressed(name, record, space, generation, now))
            except InvalidValue as wrong:
                self._tell_first("unencoded_records", wrong)
                left_out.append(name)
        self._publish(space, generation, names, records)
        if left_out:
            self._change(lambda: self.store.delete(left_out, self._change_s), first=True)
        asked_at = time.monotonic()
        current = self._change(lambda: self.store.write(items, self._change_s, then_read=space.generation_name))
        # What was written under an earlier generation isn't there.
        self._remember(space, space.known_in, current, asked_at)
        if space.generation != generation:
            raise StoreFault("cleared", f"{self.name}: the namespace was cleared meanwhile", sent=False)
        self._count(written_records=len(items), written_bytes=sum(item.length for item in items))

    def _publish(self, space: KeyedSpace, generation: int, names: list[bytes], records: Sequence[DirtyRecord]) -> None:
        """Before records are written, tell the others' filters, or that they can't know."""
        del names

        def publish() -> None:
            if space.filter is not None:
                keys, expires = [record.key for record in records], [record.expires for record in records]
                space.filter.publish(self.store, Names(space, generation), keys, expires, self._change_s)
                return
            if space.roll is None or space.roll.generation != generation:
                space.roll = Roll(Names(space, generation), me=b"")
            space.roll.enter(self.store, self._change_s)

        try:
            self._change(publish, first=True)
        except StoreFault as fault:
            fault.sent = False  # of the records
            raise

    def delete(self, space: KeyedSpace, keys: Sequence[Key]) -> None:
        """Forget records before it returns; raises StoreFault, and TierUnavailable while nobody is asked."""
        generation = self._generation_to_change(space, make=False)
        if generation is not None:
            names = space.names(keys, generation)
            self._change(lambda: self.store.delete(names, self._change_s))
            self._count(deleted_records=len(keys))
        else:
            self.breaker.success()  # there was nothing to change

    def probe(self, space: KeyedSpace) -> None:
        """See whether the store answers; raises StoreFault."""
        self._generation_to_change(space, make=False)
        self.breaker.success()

    def clear(self, space: KeyedSpace) -> None:
        """Make all that is there unreachable, for everybody, before it returns; raises as `delete`.

        When it can't be done, nothing there counts for this process until it has been made up for.
        """
        space.uncleared = True
        if not self.breaker.allow():
            raise TierUnavailable(f"{self.name} is not being asked: {self.breaker.stats()['last_error']}")
        self._change(lambda: self._clear(space))

    def _clear(self, space: KeyedSpace) -> None:
        self._make_generation(space)
        space.uncleared = False

    def _change(self, call: Callable[[], T], *, first: bool = False) -> T:
        """Call the store. That what comes `first` succeeds says nothing of the change itself to the breaker."""
        try:
            result = call()
        except StoreFault as fault:
            self._failed(fault)
            raise
        if not first:
            self.breaker.success()
        return result

    def _generation_to_change(self, space: KeyedSpace, *, make: bool) -> int | None:
        """Return the generation, and make one where there is none, or one is due.

        Who writes takes the copy, since he looks at it again afterwards.
        """
        if not self.breaker.allow():
            last = self.breaker.stats()["last_error"]
            raise StoreFault("open", f"{self.name} is not being asked: {last}", sent=False)

        copy = space.generation
        if make and copy is not None and not space.uncleared:
            return copy

        def find() -> int | None:
            if space.uncleared:
                self._clear(space)
            elif self._read_generation(space, space.known_in, self._change_s) is None and make:
                self._make_generation(space)
            return space.generation

        try:
            return self._change(find, first=True)
        except StoreFault as fault:
            fault.sent = False  # of what the caller wants
            raise

    # ---- Generations

    def _read_generation(self, space: KeyedSpace, state: object, timeout_s: float) -> int | None:
        self._count(generations_read=1)
        asked_at = time.monotonic()
        data = self.store.read([space.generation_name], timeout_s)[0]
        self._remember(space, state, data, asked_at)
        return space.generation

    def _remember(self, space: KeyedSpace, state: object, data: Buffer | None, asked_at: float) -> None:
        generation = None
        try:
            generation = space.generation_in(data)
        except (CorruptRecord, FormatError):
            self._count(rejected_records=1)
        with self._lock:
            if asked_at > space.known_at:  # else another thread has seen a newer one
                space.generation, space.known_at, space.known_in = generation, asked_at, state

    def _make_generation(self, space: KeyedSpace) -> None:
        number = secrets.randbits(64)
        record = build_record(
            GENERATION, GENERATION_NUMBER.pack(number), seed=space.seed, ns=0, version=space.version, flags=NAMESPACE,
            seq=time.time_ns(),
        )  # fmt: skip
        first = self._before_generation(space, number)
        self.store.write([*first, NamedRecord(space.generation_name, (record,), 0, lasting=True)], self._change_s)
        self._count(generations_made=1)
        with self._lock:
            space.generation, space.known_at = number, time.monotonic()

    def _before_generation(self, space: KeyedSpace, number: int) -> list[NamedRecord]:
        """Return what is written before a generation: who sees that has to see that the list of writers is complete."""
        return [Roll(Names(space, number), me=b"").first(*([] if space.filter is not None else [b""]))]

    # ---- Figures

    def stats(self) -> Stats:
        """Return the counters of this process, "error <kind>" for faults, and what breaker and store say."""
        with self._lock:
            numbers = {**dict.fromkeys(_COUNTERS, 0), **self._numbers}
        filters: Stats = {}
        if self._filters is not None:
            filters, spared = self._filters.stats()
            numbers["lookups"] += spared
            numbers["misses"] += spared
        return {**numbers, **filters, **self.breaker.stats(), **self.store.stats()}

    def close(self) -> None:
        """Let go of the store."""
        if self._filters is not None:
            self._filters.close()
        self.store.close()

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._numbers[name] += amount

    def _tell_first(self, name: str, error: Exception) -> None:
        if not self._numbers[name]:
            _log.error("kvstrata: %s: %s", self.name, error)
        self._count(**{name: 1})

    def _failed(self, fault: StoreFault) -> None:
        self._count(**{f"error {fault.kind}": 1})
        (self.breaker.refusal if fault.answered else self.breaker.failure)(fault.kind, fault)
