"""Namespaces: partitions of a cache's keys, and the verbs on them."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from kvstrata import _core
from kvstrata.config import parse_duration
from kvstrata.errors import InvalidKey, InvalidValue, TierFull
from kvstrata.movement.prefetch import Prefetch
from kvstrata.movement.single_flight import compute_once
from kvstrata.movement.warm import AT_ONCE, Progress, Warmed, warm
from kvstrata.tiered_space import TieredSpace, Value, copied, listed, pinned
from kvstrata.tiers.base import Key

if TYPE_CHECKING:
    from kvstrata.cache import Cache
    from kvstrata.memoize import Memoized
    from kvstrata.namespace_options import SpaceOptions
    from kvstrata.objects import ObjectCache, Serializer

__all__ = ["Namespace"]

_LONGEST_KEY = 1024
_LOADED_AT_ONCE = 256  # records that get_many keeps pinned until it has copied them
_FETCHED_AT_ONCE = 64  # the same, of records from elsewhere
_FETCHED_TO_WARM = 16  # fewer, as nobody knows how large they are

P = ParamSpec("P")
T = TypeVar("T")


class Namespace(TieredSpace):
    """A partition of a cache's keys, with a version, a policy, a quota and a time to live of its own.

    Keys are str (their UTF-8) or bytes, 1 to 1,024 of them. All methods may be called from any thread. They raise
    errors of `kvstrata.errors`: InvalidKey, InvalidValue, TierFull, VersionConflict once the namespace has moved on
    to a newer version, and CacheClosed.
    """

    def __init__(
        self, cache: Cache, options: SpaceOptions, ttl_ms: int, jitter: float, *, through: bool = False
    ) -> None:
        super().__init__(cache, options, ttl_ms, jitter, through=through)
        cache._opened.add(self)

    @property
    def name(self) -> str:
        """The name that it was opened with."""
        return self._options.name

    def __repr__(self) -> str:
        return f"<kvstrata namespace {self.name!r} of {self._cache.path or 'a private cache'}>"

    @property
    def version(self) -> int:
        """The version that this namespace was opened with."""
        return self._options.version

    # ---- Writing; `put` is native

    def put_many(
        self,
        items: Mapping[Key, Value],
        *,
        ttl: float | None = None,
        cost: float | None = None,
        tags: Sequence[Key] | None = None,
    ) -> None:
        """Store values in the order given. When one fails the ones before it are stored."""
        limit = self._cache.tiers.written_at_once
        if limit and len(items) > 1:  # each is to be in memory still when it is written
            for some in _parted(items, *limit):
                self._put_some(some, ttl=ttl, cost=cost, tags=tags)
        else:
            self._put_some(items, ttl=ttl, cost=cost, tags=tags)

    @contextmanager
    def reserve(
        self,
        key: Key,
        nbytes: int,
        *,
        ttl: float | None = None,
        cost: float | None = None,
        tags: Sequence[Key] | None = None,
    ) -> Iterator[memoryview]:
        """Give `nbytes` of the cache's own memory to fill; stored at the end of the block, dropped on an exception.

        A put without a copy. Don't write through the view, or an array over it, after the block.
        """
        try:
            size = operator.index(nbytes)
        except TypeError:
            size = -1
        if not 0 <= size < 1 << 63:
            raise InvalidValue(f"nbytes must be an int from 0 on, not {nbytes!r}")
        with self._reserve(key, size, ttl=ttl, cost=cost, tags=tags) as view:
            yield view

    def get_or_compute(
        self,
        key: Key,
        compute: Callable[[], Value],
        *,
        ttl: float | None = None,
        cost: float | None = None,
        tags: Sequence[Key] | None = None,
        lease: float = 60.0,
    ) -> bytes:
        """Return the value as bytes; where it is absent, what `compute` returns, which is stored.

        Of all threads and processes of this host that miss it at the same time one computes, and the others wait for
        it: `lease` seconds at most, and no longer when that process dies or `compute` raises, which goes to its own
        caller; then another one computes. `cost` is by default the time that it took, in seconds. A value for which
        there is no room is returned all the same.
        """

        def make() -> bytes:
            started = time.perf_counter()
            value = compute()
            took = time.perf_counter() - started
            with suppress(TierFull):
                self.put(key, value, ttl=ttl, cost=took if cost is None else cost, tags=tags)
            return value if isinstance(value, bytes) else _core.value_bytes(value)

        found = self.get(key)
        lease_ms = parse_duration(lease, option="lease")
        return compute_once(self._space, key, lambda: self.get(key), make, lease_ms) if found is None else found

    def warm(self, keys: Sequence[Key], *, time_limit: float | None = None, progress: Progress | None = None) -> Warmed:
        """Bring records from below and elsewhere into memory, in the order of the keys; returns what was done.

        It ends early after `time_limit` seconds, and when as much has come as the memory, or the quota, holds.
        `progress` is called after each batch with what was done so far.
        """
        room = self._cache.tiers.room_to_warm(self._options.quota)
        at_once = AT_ONCE if self._remote is None else _FETCHED_TO_WARM
        return warm(
            self._cache.tiers.live_store(), [(self._space, self._bring, keys)],
            room=room, time_limit=time_limit, progress=progress, at_once=at_once,
        )  # fmt: skip

    def prefetch(self, keys: Sequence[Key]) -> Prefetch:
        """Begin to bring records from below and elsewhere into memory, in the order of the keys, and return at once.

        The handle has `cancel()`, `wait(timeout)` and `done`. A record that is on its way is not read once more by
        whoever asks for it meanwhile. Of many requests the newest count, and none brings more than half of what the
        memory, or the quota, holds. What goes wrong is counted in `stats()["prefetch"]` and never raised, except
        InvalidKey and CacheClosed.
        """
        wanted = [_checked(key) for key in keys]
        self._cache.tiers.live_store()
        room = self._cache.tiers.room_to_warm(self._options.quota) // 2
        fetch = None if self._remote is None else self._fetch_ahead
        return self._cache.tiers.prefetcher.request(self._space.id, wanted, room, fetch)

    # ---- Reading; `get` is native

    def get_many(self, keys: Sequence[Key], *, out: Sequence[Any] | None = None) -> list[Any]:
        """Return the values in the order of the keys, None where absent; `out`: one writable buffer per key."""
        keys = listed(keys)
        values, below = self._space.get_many(keys, out)
        for start in range(0, len(below), _LOADED_AT_ONCE):
            wanted = below[start : start + _LOADED_AT_ONCE]

            def copy(
                n: int, value: _core.Pin | memoryview, wanted: list[int] = wanted
            ) -> None:  # while others are read
                values[wanted[n]] = copied(pinned(value), None if out is None else out[wanted[n]])

            for n, pin in enumerate(self._load([keys[i] for i in wanted], copy)):
                if pin is not None and values[wanted[n]] is None:
                    copy(n, pin)
        if self._remote is not None and None in values:
            absent = [i for i, value in enumerate(values) if value is None]
            for start in range(0, len(absent), _FETCHED_AT_ONCE):
                some = absent[start : start + _FETCHED_AT_ONCE]
                for i, pin in zip(some, self._remote.fetch([keys[i] for i in some]), strict=True):
                    values[i] = copied(pin, None if out is None else out[i])
        return values

    def pin(self, key: Key) -> _core.Pin:
        """Return a context manager that gives the value as a read-only memoryview, without a copy.

        The value stays where it is until the block ends and no view of it is left, whatever else happens to the key.
        Raises KeyError when absent.
        """
        pin = self._pin_or_none(key)
        if pin is None:
            raise KeyError(key)
        return pin

    def pin_many(self, keys: Sequence[Key]) -> list[_core.Pin | None]:
        """Return a pin for each key, None where absent; a pin exports its value as a buffer, too."""
        keys = listed(keys)
        pins: list[_core.Pin | None]
        pins, below = self._space.pin_many(keys)
        if below:
            for i, pin in zip(below, self._load([keys[i] for i in below]), strict=True):
                pins[i] = pin
        self._fetch_absent(keys, pins)
        return pins

    def contains_prefix(self, keys: Sequence[Key]) -> int:
        """Return how many keys from the first on are present, in whichever tier, without loading anything.

        A tier elsewhere, or another disk engine than the log, is asked, in one batch, for those behind the first that
        the index doesn't have.
        """
        return self._prefix_places(listed(keys))[0]

    def __contains__(self, key: Key) -> bool:
        return self._space.contains(key) or (self._remote is not None and self._remote.places([key])[0] is not None)

    def keys(self, prefix: Key = b"") -> Iterator[bytes]:
        """Iterate over the keys that start with `prefix`, in memory or on disk of this host and in no order.

        It looks through the whole index of the cache, a part at a time: what is stored meanwhile may be among them.
        """
        start = _encoded(prefix, "a prefix of keys")
        for shard in range(self._cache.tiers.live_store().shards):
            yield from self._space.keys_of(shard, start)

    # ---- Removing

    def delete(self, key: Key) -> bool:
        """Remove a key from all tiers; returns whether it was there. It does not come back after a restart.

        With a tier elsewhere, "there" means on this host; raises TierUnavailable when it can't be removed from that.
        """
        change = self._remote.begin() if self._remote else None
        try:
            present, on_disk = self._space.remove(key)
        except BaseException:
            self._end(change)
            raise
        self._gone(change, [key], [0] if on_disk else [])
        return present

    def delete_many(self, keys: Sequence[Key]) -> int:
        """Remove keys from all tiers; returns how many were there. They do not come back after a restart.

        With a tier elsewhere as `delete`.
        """
        keys = listed(keys, copy=True)
        change = self._remote.begin() if self._remote else None
        try:
            present, on_disk = self._space.remove_many(keys)
        except BaseException:
            self._end(change)
            raise
        self._gone(change, keys, on_disk)
        return present

    def delete_prefix(self, prefix: Key) -> int:
        """Remove all keys that start with `prefix` from all tiers; returns how many were there.

        It takes time in proportion to what the whole cache holds; `delete_tag` and `clear` don't. A tier elsewhere
        can't be asked which keys it has, so it loses the whole namespace.
        """
        start = _encoded(prefix, "a prefix of keys")
        if not start:
            raise InvalidKey("a prefix has a byte at least; clear() removes everything")
        removed = 0

        def here() -> None:
            nonlocal removed
            removed = self._cache.below.remove_prefix(self._space, start)

        if self._remote is None:
            here()
        else:
            self._remote.cleared(self._remote.begin(), here)
        return removed

    def delete_tag(self, tag: Key) -> None:
        """Remove everything that was put with this tag, in all tiers and for everybody, in constant time.

        A tag is kept as one of 65,535 numbers, by its hash: another tag's records may go with it, at that chance.
        """
        slot, seq = self._space.remove_tag(tag)
        self._cache.below.persist_tag(slot, seq)

    def clear(self) -> None:
        """Remove everything in this namespace, in all tiers and for everybody, in constant time.

        Other hosts that share a tier elsewhere see it there a second later at most, and keep what they have themselves.
        """

        def here() -> None:
            epoch = self._space.clear()
            self._cache.below.persist_epoch(self._space.id, epoch)

        if self._remote is None:
            here()
        else:
            self._remote.cleared(self._remote.begin(), here)

    # ---- Objects

    def objects(self, maxsize: int = 1024, *, serializer: str | Serializer = "pickle") -> ObjectCache:
        """Return an in-process cache of Python objects over this namespace, true in all processes.

        It keeps at most `maxsize` objects; bytes of the others stay in the namespace. `serializer` is "pickle",
        "msgpack", or a pair of functions: dumps (object to bytes-like) and loads (read-only memoryview to object).
        Read in `ObjectCache` what pickle means for safety, and that objects are shared. All processes must use the
        same serializer; give objects a namespace of their own. Raises MissingExtra without `kvstrata[objects]`.
        """
        from kvstrata.objects import ObjectCache

        return ObjectCache(self, maxsize, serializer)

    def memoize(
        self,
        *,
        name: str | None = None,
        version: int = 1,
        key: Callable[..., Any] | None = None,
        ttl: float | None = None,
        cost: float | None = None,
        maxsize: int = 1024,
        serializer: str | Serializer = "pickle",
    ) -> Callable[[Callable[P, T]], Memoized[P, T]]:
        """Return a decorator that remembers a function's results here, for every process; `async def` works too.

        A result's key is made of the function's module and qualified name (or `name`), `version`, which you raise
        when the function's meaning changes, and the arguments, however they are passed. None, bools, ints, floats,
        complex, str, bytes, numpy arrays and scalars, and tuples, lists, dicts and sets of these have a canonical form;
        1, 1.0 and True differ. For other arguments, InvalidKey is raised, unless `key` makes something of that
        kind of them. A lambda or closure needs a `name`, or ConfigError is raised.

        Within a process, calls for the same key at the same time compute once; between processes, each may. An
        exception goes to all who waited for that call, and isn't remembered; None is. A result that can't be stored is
        returned all the same. Results are shared objects that must not be changed: see `objects`, also for `maxsize`,
        `serializer` and MissingExtra. The decorated function has `cache_info()`, `cache_clear()`, `forget(*args)` and
        `__wrapped__`.
        """
        from kvstrata.memoize import memoized

        def decorate(function: Callable[P, T]) -> Memoized[P, T]:
            objects = self.objects(maxsize, serializer=serializer)
            return memoized(function, self, objects, name=name, version=version, key=key, ttl=ttl, cost=cost)

        return decorate


def _parted(items: Mapping[Key, Value], most: int, nbytes: int) -> Iterator[dict[Key, Value]]:
    """Part items into some of `most` at most, and about `nbytes` bytes where their values say how long they are."""
    for key in items:
        if not 1 <= len(_encoded(key)) <= _LONGEST_KEY:
            raise InvalidKey(f"a key has 1 to {_LONGEST_KEY:,} bytes")
    some: dict[Key, Value] = {}
    size = 0
    for key, value in items.items():
        some[key] = value
        size += getattr(value, "nbytes", None) or (len(value) if isinstance(value, (bytes, bytearray)) else 0)
        if len(some) >= most or size >= nbytes:
            yield some
            some, size = {}, 0
    if some:
        yield some


def _checked(key: Key, what: str = "a key") -> Key:
    if not isinstance(key, (str, bytes)):
        raise InvalidKey(f"{what} is str or bytes, not {type(key).__name__}")
    return key


def _encoded(key: Key, what: str = "a key") -> bytes:
    key = _checked(key, what)
    try:
        return key.encode() if isinstance(key, str) else key
    except UnicodeEncodeError:
        raise InvalidKey(f"{what} that is a str must have a UTF-8 encoding; this one has a lone surrogate") from None
