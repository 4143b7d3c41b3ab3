"""What a namespace does in all its tiers: memory and index first, then what lies below, then what is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvstrata import _core
from kvstrata.config import parse_duration
from kvstrata.errors import InvalidKey, InvalidValue, TierUnavailable
from kvstrata.tiers.base import Arrived, Key

if TYPE_CHECKING:
    from kvstrata.cache import Cache
    from kvstrata.movement.remote_writer import Change
    from kvstrata.movement.remotes import RemoteSpace
    from kvstrata.namespace_options import SpaceOptions

__all__ = ["TieredSpace", "Value", "copied", "listed", "pinned"]

_HIGHEST_COST = 3e38  # it is kept in single precision
_WRITE_THROUGH_S = 30.0

Value = Any  # bytes-like, an array, or any exporter of the buffer or DLPack protocol


class TieredSpace(_core.QuickVerbs):
    """What the verbs of a namespace are made of."""

    def __init__(
        self, cache: Cache, options: SpaceOptions, ttl_ms: int, jitter: float, *, through: bool = False
    ) -> None:
        self._cache = cache
        self._options = options
        self._space = cache.tiers.open_space(options)
        self._ttl_ms = ttl_ms
        self._jitter = jitter
        self._through = through
        self._remote: RemoteSpace | None = cache.tiers.open_remote_space(options, self._native)
        self._set_plain(self._remote is None, self._remote is None and not through and not ttl_ms)

    # ---- Writing

    def _put(
        self,
        key: Key,
        value: Value,
        *,
        ttl: float | None = None,
        cost: float | None = None,
        tags: Sequence[Key] | None = None,
    ) -> None:
        """What `put`, which is native, leaves to do."""
        change = self._begin(key)
        try:
            seq = self._space.put(key, value, self._ttl(ttl), self._jitter, _number(cost), tags)
        except BaseException:
            self._end(change)
            raise
        self._stored(change, key, seq)

    def _replaced(self, key: Key, seq: int) -> None:
        """An older record than that of this number is on disk, or may be."""
        self._cache.below.forget_older(self._space.id, [(key, seq)])

    def _begin(self, key: Key) -> Change | None:
        """Before a put; None if it changes nothing that a tier elsewhere would have to know."""
        if self._remote is None or (self._options.immutable and self._space.contains(key)):
            return None
        return self._remote.begin()

    def _stored(self, change: Change | None, key: Key, seq: int) -> None:
        """After a put, which returned `seq`."""
        if change is not None and self._remote is not None:
            self._remote.changed(change, [key])
        if seq:
            self._replaced(key, seq)
        if self._through:
            self._require_durable([key])

    def _end(self, change: Change | None) -> None:
        """After a change that came to nothing."""
        if change is not None and self._remote is not None:
            self._remote.drop(change)

    def _put_some(
        self, items: Mapping[Key, Value], *, ttl: float | None, cost: float | None, tags: Sequence[Key] | None
    ) -> None:
        keys = list(items)
        replaced: list[tuple[int, int]] = []
        change = self._remote.begin() if self._remote else None
        try:
            self._space.put_many(
                keys, list(items.values()), replaced, self._ttl(ttl), self._jitter, _number(cost), tags
            )
        except InvalidKey:  # then none is stored, and what isn't a key can't be sent
            self._end(change)
            change = None
            raise
        finally:
            if change is not None and self._remote is not None:
                self._remote.changed(change, keys)
            if replaced:
                self._cache.below.forget_older(self._space.id, [(keys[i], seq) for i, seq in replaced])
        if self._through:
            self._require_durable(keys)

    @contextmanager
    def _reserve(
        self,
        key: Key,
        size: int,
        *,
        ttl: float | None = None,
        cost: float | None = None,
        tags: Sequence[Key] | None = None,
        depth: int = 0,
    ) -> Iterator[memoryview]:
        """As `reserve`, for the value at that place in a prefix, from 1 on; 0: in none."""
        write = self._space.reserve(key, size, self._ttl(ttl), self._jitter, _number(cost), tags, depth)
        try:
            yield write.view()
        except BaseException:
            write.abort()
            raise
        change = self._remote.begin() if self._remote else None
        try:
            seq = write.publish()
        except BaseException:
            self._end(change)
            raise
        self._stored(change, key, seq)

    def _put_pinned(
        self, key: Key, value: Value, ttl: float | None, cost: float | None, tags: Sequence[Key] | None
    ) -> _core.Pin | None:
        """Put a value; returns a pin of its record, None where an immutable namespace had the key already."""
        change = self._begin(key)
        try:
            seq, pin = self._space.put_pinned(key, value, self._ttl(ttl), self._jitter, _number(cost), tags)
        except BaseException:
            self._end(change)
            raise
        self._stored(change, key, seq)
        return pin

    def _require_durable(self, keys: Sequence[Key]) -> None:
        missing = self._space.wait_until_durable(keys, _WRITE_THROUGH_S)
        if missing:
            raise TierUnavailable(
                f"{missing} of {len(keys)} values of namespace {self._options.name!r} are in memory, but the disk did "
                "not take them; cache.stats()['disk'] says why"
            )

    def _ttl(self, ttl: float | None) -> int:
        return self._ttl_ms if ttl is None else parse_duration(ttl)

    # ---- Reading

    def _get(self, key: Key, default: Any = None, *, out: Any = None) -> Any:
        """What `get`, which is native, leaves to do."""
        value = self._space.get(key) if out is None else self._space.get_into(key, out)
        if value is _core.BELOW:
            value = copied(self._load([key])[0], out)
        if value is None and self._remote is not None:
            value = copied(self._remote.fetch([key])[0], out)
        return default if value is None else value

    def _pin_or_none(self, key: Key) -> _core.Pin | None:
        pin: _core.Pin | None = self._space.pin(key)
        if pin is _core.BELOW:
            pin = self._load([key])[0]
        return self._remote.fetch([key])[0] if pin is None and self._remote is not None else pin

    def _fetch_absent(self, keys: Sequence[Key], pins: list[_core.Pin | None]) -> list[int]:
        """Ask the tiers elsewhere for what has no pin; returns the positions of what they had."""
        if self._remote is None or None not in pins:
            return []
        absent = [i for i, pin in enumerate(pins) if pin is None]
        for i, pin in zip(absent, self._remote.fetch([keys[i] for i in absent]), strict=True):
            pins[i] = pin
        return [i for i in absent if pins[i] is not None]

    def _load(self, keys: list[Key], arrived: Arrived | None = None) -> list[_core.Pin | None]:
        pins = self._load_once(keys, arrived)
        for i, pin in enumerate(pins):
            if pin is None:  # somebody else may have brought it up meanwhile
                found = self._space.pin(keys[i])
                pins[i] = self._load_once([keys[i]])[0] if found is _core.BELOW else found
        return pins

    def _load_once(self, keys: list[Key], arrived: Arrived | None = None) -> list[_core.Pin | None]:
        loaded = self._cache.below.load(self._space.id, keys, arrived)
        return [None if value is None else pinned(value) for value in loaded]

    def _prefix_places(self, keys: Sequence[Key]) -> tuple[int, dict[int, str]]:
        """As `contains_prefix`; also the tiers that seem to have those that aren't on this host, by position."""
        here = self._space.contains_prefix(keys)
        places: dict[int, str] = {}
        if self._remote is None or here == len(keys):
            return here, places
        for i, place in enumerate(self._remote.places(keys[here:]), here):
            if not self._space.contains(keys[i]):
                if place is None:
                    return i, places
                places[i] = place
        return len(keys), places

    def _bring(self, keys: list[Key]) -> list[_core.Pin | None]:
        pins = self._load_once(keys)
        self._fetch_absent(keys, pins)
        return pins

    def _fetch_ahead(self, keys: list[Key]) -> list[_core.Pin | memoryview | None]:
        """Bring from elsewhere what isn't on this host; what memory has no room for is a view of nothing."""
        absent = [key for key in keys if not self._space.contains(key)]
        if self._remote is None or not absent:
            return []
        brought: list[_core.Pin | memoryview | None] = []
        for key, pin in zip(absent, self._remote.fetch(absent), strict=True):
            if pin is not None and not self._space.contains(key):
                pin.release()
                brought.append(memoryview(b""))
            else:
                brought.append(pin)
        return brought

    # ---- Removing

    def _gone(self, change: Change | None, keys: Sequence[Key], on_disk: Sequence[int]) -> None:
        """After keys were removed from the index; `on_disk`: positions of those that have a row."""
        try:
            if on_disk:
                self._cache.below.forget_older(self._space.id, [(keys[i], None) for i in on_disk])
        finally:
            if change is not None and self._remote is not None:
                self._remote.removed(change, keys)

    def _native(self) -> _core.Space:
        """Return the native part itself, in a forked child after that has one of its own."""
        _ = self._space.id
        return self._space


def _number(cost: Any) -> float:
    if cost is None:
        return 1.0
    if not hasattr(cost, "__float__") or math.isnan(cost):
        raise InvalidValue(f"cost must be a number or None, not {cost!r}")
    return max(-_HIGHEST_COST, min(float(cost), _HIGHEST_COST))


def listed(keys: Iterable[Key], *, copy: bool = False) -> Sequence[Key]:
    """Return keys so that they can be looked at again, with `copy` whatever becomes of a list meanwhile.

    One key stays what it is, and the core refuses it.
    """
    kept = (tuple, str, bytes) if copy else (list, tuple, str, bytes)
    return keys if isinstance(keys, kept) else list(keys)


def pinned(value: _core.Pin | memoryview) -> _core.Pin:
    """Return a pin of what a tier below has given: one already, or a view of the process's own memory."""
    return _core.local_pin(value) if isinstance(value, memoryview) else value


def copied(pin: _core.Pin | None, out: Any) -> Any:
    """Return what a pin holds as bytes, or in `out`."""
    if pin is None:
        return None
    with pin as view:
        return bytes(view) if out is None else _core.copy_into(view, out)
