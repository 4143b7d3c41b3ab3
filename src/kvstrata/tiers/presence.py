"""Which records a store that several hosts write to may have, so that a lookup of another one costs no round trip.

Whoever writes records publishes hashes of their keys in the store first, and everybody reads those of the others now
and then into a Bloom filter. So a process that is killed leaves no record without its hash. What another one has
written meanwhile is a miss until the next reading. A filter is used only while it is known to be complete: if anything
that was published is gone, if somebody writes without publishing, or if the last reading is too old, the store is asked
as if there were none. docs/format.md says what lies where.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import blake3
import msgspec

from kvstrata.bloom import HASH_BYTES, GrowingBloomFilter
from kvstrata.errors import CorruptRecord, FormatError
from kvstrata.record import NAMESPACE, build_record, parse_record, payload_of
from kvstrata.tiers.base import Key, NamedRecord, RecordStore
from kvstrata.tiers.keyed_space import GENERATION_NUMBER, KeyedSpace

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FilterOptions", "Incomplete", "NameFilter", "Names", "Roll"]

_CONTEXT = "kvstrata 2026-11 remote filter"
_PAGE = 2048  # hashes, after which a page is full and never written again
_MOST = 1 << 24  # hashes; with more in a namespace the store is always asked
_VERIFY_S = 60.0  # after which who writes looks whether he is still listed
_SILENT_S = 300.0  # after which others may take over what somebody published
_SLACK_MS = 60_000  # by which clocks may differ
_READ_AT_ONCE = 64
_UNPUBLISHED = 1e-6  # the part of names that may not be published, since they are taken for others
_STALE = 100_000  # hashes of what has gone that aren't worth a new filter
_FORMAT = 1


class FilterOptions(NamedTuple):
    """At most `fp_rate` of what isn't there is asked for all the same; others' writes are seen after `refresh_s`."""

    fp_rate: float = 0.01
    refresh_s: float = 1.0


class Incomplete(Exception):
    """Something that was published can't be found: nobody knows all that is there."""


class _Head(msgspec.Struct, array_like=True):
    """What one process has published: the number of its first page, when the names in each expire, and the rest."""

    format: int
    first: int
    pages: list[int]
    hashes: bytes


class Names:
    """A namespace in one generation there, None if it has none: how what is published is named and framed."""

    def __init__(self, space: KeyedSpace, generation: int | None) -> None:
        number = b"" if generation is None else GENERATION_NUMBER.pack(generation)
        self.generation = generation
        self.secret = blake3.blake3(space.start + number, derive_key_context=_CONTEXT).digest(length=16)
        self.roll = space.start + b"w" + number
        self._start = space.start + b"n" + number
        self._seed = space.seed
        self._version = space.version

    def head(self, writer: bytes) -> bytes:
        """Where one says what he has published: the hashes that are in no page, and which pages there are."""
        return self._start + writer

    def page(self, writer: bytes, number: int) -> bytes:
        """Where more of his hashes are, never written again."""
        return self._start + writer + number.to_bytes(4, "little")

    def record(self, name: bytes, content: bytes, expires: int = 0) -> NamedRecord:
        """Return what is written under a name."""
        record = build_record(
            name, content, seed=self._seed, ns=0, version=self._version, seq=time.time_ns(), expires=expires,
            flags=NAMESPACE,
        )  # fmt: skip
        return NamedRecord(name, (record,), expires)

    def content(self, name: bytes, data: Buffer | None) -> bytes:
        """Return what a record holds; raises Incomplete when it isn't there, or damaged."""
        try:
            if data is not None:
                record = parse_record(data, seed=self._seed)
                if record.key == name and record.flags & NAMESPACE:
                    return bytes(payload_of(data, record))
        except (CorruptRecord, FormatError):
            pass
        raise Incomplete("something that was published is gone")


class Roll:
    """The list of who writes there, and one's own place in it. b"" stands for those who don't publish what they write.

    A store can't compare and set, so of two who enter at once one may be lost: hence each looks once more.
    """

    def __init__(self, names: Names, *, me: bytes) -> None:
        self._names = names
        self._me = me
        self.generation = names.generation
        self.sure = True  # whether one's own entry was seen there, if there is one
        self._checked_at = float("-inf")

    def enter(self, store: RecordStore, timeout_s: float) -> None:
        """See to it that one's own entry is there, before anything is written; raises StoreFault."""
        now = time.monotonic()
        if self.sure and now - self._checked_at < _VERIFY_S:
            return
        name = self._names.roll
        try:
            listed = self.decode(store.read([name], timeout_s)[0])
            self.sure = self._me in listed
        except Incomplete:
            self.sure = True  # without a list nobody uses filters, and no list of a part may appear
        if not self.sure:
            store.write([self.first(*listed, self._me)], timeout_s)
        self._checked_at = now

    def leave_out(self, store: RecordStore, writers: set[bytes], timeout_s: float) -> None:
        """Take others off the list; raises StoreFault and Incomplete."""
        listed = self.decode(store.read([self._names.roll], timeout_s)[0])
        store.write([self.first(*(writer for writer in listed if writer not in writers))], timeout_s)

    def first(self, *writers: bytes) -> NamedRecord:
        """Return the record of a list."""
        return self._names.record(self._names.roll, msgspec.msgpack.encode(writers))

    def decode(self, data: Buffer | None) -> list[bytes]:
        """Return who is listed; raises Incomplete where there is no list."""
        try:
            return msgspec.msgpack.decode(self._names.content(self._names.roll, data), type=list[bytes])
        except msgspec.DecodeError:
            raise Incomplete("the list of writers can't be read") from None


class _Published:
    """What this process publishes of a namespace in one generation."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.me = secrets.token_bytes(8)
        self.roll = Roll(names, me=self.me)
        self.roll.sure = False
        self._first = 0
        self._pages: list[int] = []  # when each expires, 0 = never
        self._open: dict[bytes, None] = {}  # hashes that are in no page yet
        self._expires = 1  # of these, the latest; 0 = never
        self._lasting = GrowingBloomFilter(names.secret, _UNPUBLISHED)  # hashes in what never expires
        self._unsent: list[NamedRecord] = []  # pages that aren't known to be there,
        self._changed = False  # and whether there is more

    @property
    def count(self) -> int:
        """How many hashes it has published, about."""
        return len(self._pages) * _PAGE + len(self._open)

    def publish(self, store: RecordStore, hashes: bytes, expires: Sequence[int], timeout_s: float) -> None:
        """Have hashes in the store when it returns; raises StoreFault. `expires`: of each name, ms, 0 = never."""
        each = [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]
        lasting = self._lasting.absent(b"".join(h for h, until in zip(each, expires, strict=True) if not until))
        self._lasting.add_hashes(lasting)
        self._add(lasting, 0)
        for one, until in zip(each, expires, strict=True):
            if until:
                self._add(one, until)
        while self._pages and 0 < self._pages[0] < int(time.time() * 1000) - _SLACK_MS:
            self._first += 1
            del self._pages[0]
        if self._unsent:
            store.write(self._unsent, timeout_s)
            self._unsent = []
        if self._changed:
            head = _Head(_FORMAT, self._first, self._pages, b"".join(self._open))
            store.write([self._names.record(self._names.head(self.me), msgspec.msgpack.encode(head))], timeout_s)
            self._changed = False
        self.roll.enter(store, timeout_s)  # last: whoever is listed has a head

    def _add(self, hashes: bytes, expires: int) -> None:
        for start in range(0, len(hashes), HASH_BYTES):
            self._open[hashes[start : start + HASH_BYTES]] = None
            self._expires = max(self._expires, expires) if expires and self._expires else 0
            self._changed = True
            if len(self._open) == _PAGE:
                keep = self._expires + _SLACK_MS if self._expires else 0
                name = self._names.page(self.me, self._first + len(self._pages))
                self._unsent.append(self._names.record(name, b"".join(self._open), keep))
                self._pages.append(keep)
                self._open, self._expires = {}, 1


class _Known:
    """What is known of a namespace in one generation: the filter, and until when it can be relied on."""

    def __init__(self, names: Names, fp_rate: float) -> None:
        self.names = names
        self.bloom = GrowingBloomFilter(names.secret, fp_rate)
        self.until = float("-inf")  # monotonic
        self.pages: set[bytes] = set()  # names of those that are in the filter
        self.heads: dict[bytes, tuple[bytes, float]] = {}  # of others, and since when they are as they are


class NameFilter:
    """The filter of one namespace in one store, over its generations. All methods may be called from any thread."""

    def __init__(self, options: FilterOptions) -> None:
        self._options = options
        self._lock = threading.Lock()  # of what is published
        self._refreshing = threading.Lock()
        self._known: _Known | None = None
        self._published: _Published | None = None
        self._spared = 0
        self._counting = threading.Lock()
        self.used = False
        """Whether anybody has asked since the last refresh."""
        self.why = "not read yet"
        """Why it isn't used, "" if it is."""

    # ---- Looking up

    @property
    def stale(self) -> bool:
        """Whether it has to be read before it is of use."""
        known = self._known
        return known is None or time.monotonic() >= known.until

    def lacks(self, key: Key) -> bool:
        """Whether the store certainly hasn't got a key, as of the last refresh; counted if so."""
        self.used = True
        known = self._known
        if known is None or time.monotonic() >= known.until or key in known.bloom:
            return False
        with self._counting:
            self._spared += 1
        return True

    def positions(self, keys: Sequence[Key], *, count: bool) -> list[int]:
        """Return where in `keys` those stand that the store may have; the others are counted, if so wanted."""
        self.used = True
        known = self._known
        if known is None or time.monotonic() >= known.until:
            return list(range(len(keys)))
        found: list[int] = known.bloom.contains_many(keys).nonzero()[0].tolist()
        if count:
            with self._counting:
                self._spared += len(keys) - len(found)
        return found

    # ---- Publishing

    def publish(
        self, store: RecordStore, names: Names, keys: Sequence[Key], expires: Sequence[int], timeout_s: float
    ) -> None:
        """Before records are written: say so, here and there. Raises StoreFault."""
        with self._lock:
            known = self._of(names)
            hashes = known.bloom.hashes(keys)
            known.bloom.add_hashes(hashes)
            if self._published is None:
                self._published = _Published(names)
            self._published.publish(store, hashes, expires, timeout_s)

    def settle(self, store: RecordStore, timeout_s: float) -> None:
        """At the end: see once more whether one is listed; raises StoreFault."""
        with self._lock:
            if self._published is not None and not self._published.roll.sure:
                self._published.roll.enter(store, timeout_s)

    def _of(self, names: Names) -> _Known:
        """What is known of that generation; nothing if it is another one than before. Under the lock."""
        known = self._known
        if known is None or known.names.generation != names.generation:
            known = self._known = _Known(names, self._options.fp_rate)
            self._published = None
        return known

    # ---- Refreshing

    def refresh(self, store: RecordStore, names: Names, timeout_s: float) -> None:
        """Read what others have published since the last time; raises StoreFault."""
        with self._refreshing:
            started = time.monotonic()
            with self._lock:
                known = self._of(names)
                mine = self._published
            self.used = False
            try:
                total = self._read(store, known, mine, timeout_s)
            except Incomplete as reason:
                self.why, known.until = str(reason), float("-inf")
                return
            self.why = ""
            known.until = started + self._options.refresh_s
            if known.bloom.count > 2 * total + _STALE:
                self._start_anew(known)

    def _read(self, store: RecordStore, known: _Known, mine: _Published | None, timeout_s: float) -> int:
        """Bring the filter up to date; returns how many hashes are published."""
        names = known.names
        if names.generation is None:
            return 0
        writers = Roll(names, me=b"").decode(store.read([names.roll], timeout_s)[0])
        if b"" in writers:
            raise Incomplete("somebody writes there with bloom=no")
        me = mine.me if mine is not None else None
        others = list(dict.fromkeys(writer for writer in writers if writer != me))
        heads: dict[bytes, _Head] = {}
        wanted: list[tuple[bytes, int]] = []
        data = store.read([names.head(writer) for writer in others], timeout_s) if others else []
        total, now, clock = mine.count if mine is not None else 0, int(time.time() * 1000), time.monotonic()
        for writer, found in zip(others, data, strict=True):
            content = names.content(names.head(writer), found)
            before, since = known.heads.get(writer, (b"", clock))
            known.heads[writer] = content, since if content == before else clock
            head = heads[writer] = _decoded(content)
            if content != before:
                known.bloom.add_hashes(head.hashes)
            for number, expires in enumerate(head.pages, head.first):
                if not expires or expires > now:
                    wanted.append((names.page(writer, number), expires))
            total += len(head.hashes) // HASH_BYTES
        total += len(wanted) * _PAGE
        if total > _MOST:
            raise Incomplete(f"more than {_MOST:,} names")
        unread = [place for place in wanted if place[0] not in known.pages]
        for start in range(0, len(unread), _READ_AT_ONCE):
            some = unread[start : start + _READ_AT_ONCE]
            for (name, _), page in zip(some, store.read([name for name, _ in some], timeout_s), strict=True):
                known.bloom.add_hashes(names.content(name, page))
                known.pages.add(name)
        known.heads = {writer: known.heads[writer] for writer in others}
        if mine is not None:
            self._take_over(store, known, mine, heads, timeout_s)
        return total

    def _take_over(
        self, store: RecordStore, known: _Known, mine: _Published, heads: dict[bytes, _Head], timeout_s: float
    ) -> None:
        """Publish what little was published by those who have been silent for long, and take them off the list."""
        now, clock = time.time() * 1000, time.monotonic()
        silent = {
            writer: head for writer, head in heads.items()
            if clock - known.heads[writer][1] >= _SILENT_S and all(0 < expires < now for expires in head.pages)
        }  # fmt: skip
        if not silent:
            return
        with self._lock:
            for head in silent.values():
                mine.publish(store, head.hashes, [0] * (len(head.hashes) // HASH_BYTES), timeout_s)
            mine.roll.leave_out(store, set(silent), timeout_s)
        for writer in silent:
            del known.heads[writer]

    def _start_anew(self, known: _Known) -> None:
        """Most of what is in the filter has gone: the next refresh makes a new one."""
        with self._lock:
            if self._known is known:
                # What this process published is read from there as well, as if by somebody else.
                self._known = self._published = None

    @property
    def figures(self) -> tuple[int, int, int]:
        """Lookups that it spared, names that are in it, and its bytes."""
        known = self._known
        return (self._spared, 0, 0) if known is None else (self._spared, known.bloom.count, known.bloom.nbytes)


def _decoded(content: bytes) -> _Head:
    try:
        head = msgspec.msgpack.decode(content, type=_Head)
    except msgspec.DecodeError:
        raise Incomplete("something that was published can't be read") from None
    if head.format != _FORMAT or len(head.hashes) % HASH_BYTES:
        raise Incomplete("something was published by another release")
    return head
