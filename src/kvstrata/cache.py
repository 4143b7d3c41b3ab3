"""The cache and its namespaces: what users hold."""

from __future__ import annotations

import atexit
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar, overload

from kvstrata import _core
from kvstrata.config import CacheOptions, parse_duration, parse_jitter, parse_size
from kvstrata.errors import CacheClosed, ConfigError, InvalidKey, InvalidValue, TierUnavailable, UnknownOption
from kvstrata.holder import Holder
from kvstrata.movement.write_behind import WriteBehind
from kvstrata.tiers.base import Arrived, Key, Tier
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from kvstrata.memoize import Memoized
    from kvstrata.objects import ObjectCache, Serializer

__all__ = ["Cache", "Namespace", "open"]

_HIGHEST_COST = 3e38  # it is kept in single precision
_LOADED_AT_ONCE = 256  # records that get_many keeps pinned until it has copied them

P = ParamSpec("P")
T = TypeVar("T")
Value = Any  # bytes-like, an array, or any exporter of the buffer or DLPack protocol


class _SpaceOptions(NamedTuple):
    """What everybody who has a namespace open agrees on; quota and guarantee in bytes, 0 = none."""

    name: str
    version: int = 1
    policy: str = "lru"
    quota: int = 0
    guarantee: int = 0
    immutable: bool = False
    proven_only: bool = False


class Namespace:
    """A partition of a cache's keys, with a version, a policy, a quota and a time to live of its own.

    Keys are str (their UTF-8) or bytes, 1 to 1,024 of them. All methods may be called from any thread. They raise
    errors of `kvstrata.errors`: InvalidKey, InvalidValue, TierFull, VersionConflict once the namespace has moved on
    to a newer version, and CacheClosed.
    """

    def __init__(self, cache: Cache, options: _SpaceOptions, ttl_ms: int, jitter: float) -> None:
        self._cache = cache
        self._options = options
        self._space = cache._open_space(options)
        self._ttl_ms = ttl_ms
        self._jitter = jitter
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

    # ---- Writing

    def put(
        self,
        key: Key,
        value: Value,
        *,
        ttl: float | None = None,
        cost: float | None = None,
        tags: Sequence[Key] | None = None,
    ) -> None:
        """Store a value: bytes-like, an array or a tensor on the CPU; its bytes are copied once.

        `ttl` is in seconds and overrides the namespace's; `cost` says how much it takes to compute the value again,
        in any unit. `tags`, four at most, are for `delete_tag`. In an immutable namespace a key that is there already
        stays as it is. Raises TierFull when the value can't be stored.
        """
        seq = self._space.put(key, value, self._ttl(ttl), self._jitter, _number(cost), tags)
        if seq:
            self._cache.forget_older(self._space.id, [(key, seq)])

    def put_many(
        self,
        items: Mapping[Key, Value],
        *,
        ttl: float | None = None,
        cost: float | None = None,
        tags: Sequence[Key] | None = None,
    ) -> None:
        """Store values in the order given. When one fails the ones before it are stored."""
        keys = list(items)
        replaced: list[tuple[int, int]] = []
        try:
            self._space.put_many(
                keys, list(items.values()), replaced, self._ttl(ttl), self._jitter, _number(cost), tags
            )
        finally:
            if replaced:
                self._cache.forget_older(self._space.id, [(keys[i], seq) for i, seq in replaced])

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
        seq = write.publish()
        if seq:
            self._cache.forget_older(self._space.id, [(key, seq)])

    def _ttl(self, ttl: float | None) -> int:
        return self._ttl_ms if ttl is None else parse_duration(ttl)

    # ---- Reading

    @overload
    def get(self, key: Key, default: None = None, *, out: None = None) -> bytes | None: ...
    @overload
    def get(self, key: Key, default: T, *, out: None = None) -> bytes | T: ...
    @overload
    def get(self, key: Key, default: T, *, out: Any) -> memoryview | T: ...
    @overload
    def get(self, key: Key, default: None = None, *, out: Any) -> memoryview | None: ...
    def get(self, key: Key, default: Any = None, *, out: Any = None) -> Any:
        """Return the value as bytes, or `default`; with `out`, a writable buffer, a memoryview of its filled part."""
        value = self._space.get(key) if out is None else self._space.get_into(key, out)
        if value is _core.BELOW:
            value = _copied(self._load([key])[0], out)
        return default if value is None else value

    def get_many(self, keys: Sequence[Key], *, out: Sequence[Any] | None = None) -> list[Any]:
        """Return the values in the order of the keys, None where absent; `out`: one writable buffer per key."""
        values, below = self._space.get_many(keys, out)
        for start in range(0, len(below), _LOADED_AT_ONCE):
            wanted = below[start : start + _LOADED_AT_ONCE]

            def copy(
                n: int, value: _core.Pin | memoryview, wanted: list[int] = wanted
            ) -> None:  # while others are read
                values[wanted[n]] = _copied(_pinned(value), None if out is None else out[wanted[n]])

            for n, pin in enumerate(self._load([keys[i] for i in wanted], copy)):
                if pin is not None and values[wanted[n]] is None:
                    copy(n, pin)
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

    def _pin_or_none(self, key: Key) -> _core.Pin | None:
        pin: _core.Pin | None = self._space.pin(key)
        return self._load([key])[0] if pin is _core.BELOW else pin

    def pin_many(self, keys: Sequence[Key]) -> list[_core.Pin | None]:
        """Return a pin for each key, None where absent; a pin exports its value as a buffer, too."""
        pins: list[_core.Pin | None]
        pins, below = self._space.pin_many(keys)
        if below:
            for i, pin in zip(below, self._load([keys[i] for i in below]), strict=True):
                pins[i] = pin
        return pins

    def _load(self, keys: list[Key], arrived: Arrived | None = None) -> list[_core.Pin | None]:
        pins = self._load_once(keys, arrived)
        for i, pin in enumerate(pins):
            if pin is None:  # somebody else may have brought it up meanwhile
                found = self._space.pin(keys[i])
                pins[i] = self._load_once([keys[i]])[0] if found is _core.BELOW else found
        return pins

    def _load_once(self, keys: list[Key], arrived: Arrived | None = None) -> list[_core.Pin | None]:
        loaded = self._cache.load(self._space.id, keys, arrived)
        return [None if value is None else _pinned(value) for value in loaded]

    def contains_prefix(self, keys: Sequence[Key]) -> int:
        """Return how many keys from the first on are present, in whichever tier, without loading anything."""
        return self._space.contains_prefix(keys)

    def __contains__(self, key: Key) -> bool:
        return self._space.contains(key)

    def keys(self, prefix: Key = b"") -> Iterator[bytes]:
        """Iterate over the keys that start with `prefix`, in whichever tier they are and in no order.

        It looks through the whole index of the cache, a part at a time: what is stored meanwhile may be among them.
        """
        start = _prefix_bytes(prefix)
        for shard in range(self._cache._shards()):
            yield from self._space.keys_of(shard, start)

    # ---- Removing

    def delete(self, key: Key) -> bool:
        """Remove a key from all tiers; returns whether it was there. It does not come back after a restart."""
        present, on_disk = self._space.remove(key)
        if on_disk:
            self._cache.forget_older(self._space.id, [(key, None)])
        return present

    def delete_many(self, keys: Sequence[Key]) -> int:
        """Remove keys from all tiers; returns how many were there. They do not come back after a restart."""
        keys = list(keys)
        present, on_disk = self._space.remove_many(keys)
        if on_disk:
            self._cache.forget_older(self._space.id, [(keys[i], None) for i in on_disk])
        return present

    def delete_prefix(self, prefix: Key) -> int:
        """Remove all keys that start with `prefix` from all tiers; returns how many were there.

        It takes time in proportion to what the whole cache holds; `delete_tag` and `clear` don't.
        """
        start = _prefix_bytes(prefix)
        if not start:
            raise InvalidKey("a prefix has a byte at least; clear() removes everything")
        return self._cache.forget_prefix(self._space, start)

    def delete_tag(self, tag: Key) -> None:
        """Remove everything that was put with this tag, in all tiers and for everybody, in constant time.

        A tag is kept as one of 65,535 numbers, by its hash: another tag's records may go with it, at that chance.
        """
        slot, seq = self._space.remove_tag(tag)
        self._cache.persist_tag(slot, seq)

    def clear(self) -> None:
        """Remove everything in this namespace, in all tiers and for everybody, in constant time."""
        epoch = self._space.clear()
        self._cache.persist_epoch(self._space.id, epoch)

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

    def _native(self) -> _core.Space:
        """Return the native part itself, in a forked child after that has one of its own."""
        _ = self._space.id
        return self._space

    def _put_pinned(
        self, key: Key, value: Value, ttl: float | None, cost: float | None, tags: Sequence[Key] | None
    ) -> _core.Pin | None:
        """Put a value; returns a pin of its record, None where an immutable namespace had the key already."""
        seq, pin = self._space.put_pinned(key, value, self._ttl(ttl), self._jitter, _number(cost), tags)
        if seq:
            self._cache.forget_older(self._space.id, [(key, seq)])
        return pin


def _prefix_bytes(prefix: Key) -> bytes:
    if not isinstance(prefix, (str, bytes)):
        raise InvalidKey(f"a prefix of keys is str or bytes, not {type(prefix).__name__}")
    return prefix.encode() if isinstance(prefix, str) else prefix


def _number(cost: Any) -> float:
    if cost is None:
        return 1.0
    if not hasattr(cost, "__float__"):
        raise InvalidValue(f"cost must be a number or None, not {cost!r}")
    return max(-_HIGHEST_COST, min(float(cost), _HIGHEST_COST))


def _pinned(value: _core.Pin | memoryview) -> _core.Pin:
    return _core.local_pin(value) if isinstance(value, memoryview) else value


def _copied(pin: _core.Pin | None, out: Any) -> Any:
    """Return what a pin holds as bytes, or in `out`."""
    if pin is None:
        return None
    with pin as view:
        return bytes(view) if out is None else _core.copy_into(view, out)


class Cache(Namespace):
    """What `kvstrata.open` returns. Used directly, it is its namespace "default"."""

    def __init__(self, path: Path | None, options: CacheOptions, shared: bool, huge_pages: bool) -> None:
        self.path = path
        self.options = options
        self._opened: weakref.WeakSet[Namespace] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._huge_pages = huge_pages
        self._below: Tier | None = None
        self._writer: WriteBehind | None = None
        try:
            self._memory = MemoryTier.open(path, options, shared=shared, restore=self._restore)
        except BaseException:
            self._close_below()
            raise
        try:
            if huge_pages:
                self._memory.use_huge_pages()
            self._open_below()
            super().__init__(self, _SpaceOptions("default"), 0, 0.0)
        except BaseException:
            self._shut()
            raise
        _open_caches.add(self)

    def _restore(self, store: _core.Store) -> None:
        """Tell a new memory tier what lies on disk."""
        if self.options.disk:
            assert self.path is not None
            self._below = DiskTier(self.path, self.options.disk, store)
            self._below.recover()

    def _open_below(self) -> None:
        if not self.options.disk:
            return
        if self._below is None:
            assert self.path is not None
            self._below = DiskTier(self.path, self.options.disk, self._memory.store)
        self._writer = WriteBehind(self._memory.store, self._below)

    def __repr__(self) -> str:
        return f"<kvstrata cache at {self.path or 'no path (private)'}{', closed' if self._closed else ''}>"

    # ---- Namespaces

    def namespace(
        self,
        name: str,
        *,
        version: int = 1,
        policy: str = "lru",
        quota: int | str | None = None,
        guarantee: int | str | None = None,
        ttl: float | None = None,
        ttl_jitter: float = 0.0,
        immutable: bool = False,
        admission: Literal["all", "reused"] = "all",
    ) -> Namespace:
        """Open a partition of the cache's keys.

        A higher `version` than the last one makes all older records unreachable; a lower one raises VersionConflict.
        `quota` bounds its bytes in memory, and `guarantee` says how many of them no other namespace takes from it,
        whatever that stores; at most 3/4 of the memory can be guaranteed. (The exception is a value that finds room
        enough, but only in pieces too small.) `ttl` is the time to live of its records in seconds; with `ttl_jitter`,
        0 to 1, each lives up to that part shorter, so that what was stored together doesn't expire together.
        `immutable` promises that a key implies its value, as content digests do: such records are stored once and can
        be recovered from the disk even when the index is lost. With `admission="reused"` only what is used again, or
        put again after it had gone, is written to the disk: what is wanted once costs no writes there, and what was
        used by nobody is gone with the last process. Who has it open already must have the same policy,
        quota, guarantee, immutable and admission, or ConfigMismatch is raised.
        """
        if not isinstance(name, str) or not 1 <= len(name.encode()) <= 128:
            raise ConfigError(f"a namespace's name is a str of 1 to 128 bytes, not {name!r}")
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 2**32:
            raise ConfigError(f"version must be an int from 1 on, not {version!r}")
        if name == "default" and version != 1:
            raise ConfigError("the namespace 'default', which is the cache itself, has no versions; use another name")
        if policy not in _core.policy_names():
            raise UnknownOption("policy", policy, _core.policy_names())
        if admission not in ("all", "reused"):
            raise UnknownOption("admission", admission, ["all", "reused"])
        quota_bytes = 0 if quota is None else parse_size(quota, option="quota")
        if quota is not None and quota_bytes == 0:
            raise ConfigError("quota must be more than 0 bytes; None means no limit")
        guaranteed = 0 if guarantee is None else parse_size(guarantee, option="guarantee")
        if guaranteed > self.options.memory // 4 * 3:
            raise ConfigError(f"guarantee={guarantee!r} is more than 3/4 of the memory, {self.options.memory:,} bytes")
        if quota_bytes and guaranteed > quota_bytes:
            raise ConfigError(f"guarantee={guarantee!r} is more than the quota, {quota!r}")
        options = _SpaceOptions(name, version, policy, quota_bytes, guaranteed, bool(immutable), admission == "reused")
        ttl_ms, jitter = parse_duration(ttl), parse_jitter(ttl_jitter)
        with self._lock:
            return Namespace(self, options, ttl_ms, jitter)

    def holder(self, name: str, *, limit: int | str) -> Holder:
        """Return the holder of that name, who can keep records in memory, `limit` bytes at most.

        All holders together can keep half of the memory. Who opens one that is there already must have the same limit,
        or ConfigMismatch is raised.
        """
        if not isinstance(name, str) or not 1 <= len(name.encode()) <= 128:
            raise ConfigError(f"a holder's name is a str of 1 to 128 bytes, not {name!r}")
        self._check_open()
        return Holder(self._memory.store, name, parse_size(limit, option="limit"))

    def _open_space(self, options: _SpaceOptions) -> _core.Space:
        self._check_open()
        ns = self._below.open_namespace(options.name, options.version, options.immutable).id if self._below else 0
        return self._memory.store.open_namespace(ns, *options)

    # ---- The tier below, for namespaces

    def load(self, ns: int, keys: list[Key], arrived: Arrived | None = None) -> list[_core.Pin | memoryview | None]:
        """Bring records up from the tier below; None where that can't be done."""
        return self._below.load(ns, keys, arrived) if self._below else [None] * len(keys)

    def forget_older(self, ns: int, keys: Sequence[tuple[Key, int | None]]) -> None:
        """Remove what the tier below has of keys that were deleted, or overwritten by a record of that number."""
        if self._below:
            epoch = self._memory.store.undurable_epoch(ns)
            if epoch:  # somebody's clear() is not done, and may never be
                self.persist_epoch(ns, epoch)
            self._below.delete(ns, keys)
            self._memory.store.pay(ns, [key for key, _ in keys])

    def forget_prefix(self, space: _core.Space, prefix: bytes) -> int:
        """Remove all keys of a namespace that start with `prefix`; returns how many were there."""
        store = self._memory.store
        before = store.next_seq()
        present = 0
        owed: list[bytes] = []
        for shard in range(store.shards):
            keys = space.keys_of(shard, prefix)
            removed, on_disk = space.remove_many(keys)
            present += removed
            owed += [keys[i] for i in on_disk]
        if self._below:  # also for those that the index has no room for
            self._below.delete_prefix(space.id, prefix, before)
            store.pay(space.id, owed)
        return present

    def persist_epoch(self, ns: int, epoch: int) -> None:
        """Make a clear() outlast a restart."""
        if self._below:
            self._below.set_epoch(ns, epoch)
            self._memory.store.epoch_is_durable(ns, epoch)

    def persist_tag(self, slot: int, seq: int) -> None:
        """Make a delete_tag() outlast a restart."""
        if self._below:
            self._below.remove_tag(slot, seq)

    def _shards(self) -> int:
        return self._memory.store.shards

    # ---- Life

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until all that this process has put has reached the disk; raises TierUnavailable after `timeout` s."""
        self._check_open()
        if self._writer and not self._writer.flush(timeout):
            raise TierUnavailable(f"the disk tier did not take all records within {timeout:g} s")

    def demote(self) -> int:
        """Take out of memory what lies on disk too, where nobody has it pinned; returns the bytes that became free."""
        self._check_open()
        return self._memory.store.demote_all()

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes: those of the memory tier and index, of the disk tier, and per namespace.

        Under "memory", sizes are in bytes and parts from 0 to 1: "memory_utilisation" is the part of "memory_bytes"
        that holds records ("memory_record_bytes"); what "memory_used_bytes" is more than these is lost to rounding,
        or is keys and records that only a pin keeps. "memory_fragmentation" is the part of the free memory that lies
        outside the largest free piece. "debt_keys" is about how many keys may have a row on disk that the index
        doesn't know, "debt_fill" how full the filter is that counts them, and "debt_fp_rate" the part of other keys
        for which a put or delete pays a transaction for nothing.
        """
        self._check_open()
        namespaces = {}
        for namespace in list(self._opened):
            records, used = namespace._space.usage
            namespaces[namespace.name] = {"records": records, "memory_bytes": used, "version": namespace.version}
        return {
            "memory": self._memory.store.stats(),
            "disk": self._below.stats() if self._below else None,
            "namespaces": namespaces,
            "holders": {
                name: {"limit": limit, "held_bytes": held} for name, limit, held in self._memory.store.holders()
            },
        }

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("this cache is closed")
        self.attach_again()

    def close(self) -> None:
        """Write what is not on disk yet, and let go of the cache. The last process out frees the shared memory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            _open_caches.discard(self)
            self._shut()

    def _shut(self) -> None:
        if self._pid != os.getpid():
            return  # never attached in this child
        try:
            if self._writer:
                with suppress(TierUnavailable):
                    self._memory.store.reap()  # what the dead had yet to write is ours to write
                self._writer.stop()
            self._close_below()
        finally:
            self._memory.close()

    def _close_below(self) -> None:
        if self._below:
            self._below.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- Forking

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the parent's place; the first use of a namespace takes one of its own."""
        self._lock = threading.RLock()
        for namespace in list(self._opened):
            namespace._space = _Forked(namespace)  # type: ignore[assignment]
        self._memory.leave_to_parent()

    def attach_again(self) -> None:
        """In a forked child: take a place of its own, unless it has one."""
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            self._below = None
            self._memory.attach_again(self._restore)
            if self._huge_pages:
                self._memory.use_huge_pages()
            self._open_below()
            self._pid = os.getpid()


class _Forked:
    """Stands for a namespace's native part in a forked child until it is used."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        namespace = self._namespace
        current: object = namespace._space
        if current is self:
            namespace._space = namespace._cache._open_space(namespace._options)
        return getattr(namespace._space, name)


_open_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_open_caches):
        cache.leave_to_parent()


def _at_exit() -> None:
    for cache in list(_open_caches):
        cache.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    memory: int | str = "1GiB",
    disk: int | str | None = None,
    shared: bool = True,
    huge_pages: bool = False,
) -> Cache:
    """Open the cache at a directory, making it if need be; None makes a private one that leaves nothing behind.

    Every process that opens the same path shares one memory tier of `memory` bytes and one disk tier of at most
    `disk` bytes (None: 8 GiB; 0: no disk tier). Sizes are ints or strings such as "512MiB". The options of all that
    have it open must agree, or ConfigMismatch says how they differ. `shared=False` opens it for this process alone.

    `huge_pages=True` puts the memory tier into pages of 2 MiB, for this process and whoever attaches; it takes a
    while at opening, in which the memory is copied once. Raises ConfigError, saying what to do, when the kernel
    refuses.
    """
    options = CacheOptions.parse(memory=memory, disk=disk, has_path=path is not None)
    where = None if path is None else Path(path).absolute()
    return Cache(where, options, shared, huge_pages)
