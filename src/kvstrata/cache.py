"""The cache: namespaces over tiers, and its life."""

from __future__ import annotations

import atexit
import functools
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kvstrata import _core
from kvstrata.config import CacheOptions, check_name, parse_duration, parse_jitter, parse_size
from kvstrata.errors import CacheClosed, ConfigError, TierUnavailable, UnknownOption
from kvstrata.holder import Holder
from kvstrata.movement.cost import CostModel
from kvstrata.movement.prefetch import DEFAULT_IN_FLIGHT, Prefetcher
from kvstrata.movement.running import Running
from kvstrata.movement.warm import HotSet, Progress, Warmed, warm
from kvstrata.movement.write_behind import WriteBehind
from kvstrata.namespace import Namespace, SpaceOptions
from kvstrata.tiers.base import Arrived, Key, Tier
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.partial import PartLoader

__all__ = ["Cache", "open"]

_MOST_HOT = 100_000  # keys that are remembered for a warm-up


class Cache(Namespace):
    """What `kvstrata.open` returns. Used directly, it is its namespace "default"."""

    def __init__(
        self, path: Path | None, options: CacheOptions, shared: bool, huge_pages: bool, in_flight: int
    ) -> None:
        self.path = path
        self.options = options
        self._opened: weakref.WeakSet[Namespace] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._huge_pages = huge_pages
        self._below: Tier | None = None
        self._writer: WriteBehind | None = None
        self._hot: HotSet | None = None
        self._in_flight = in_flight
        self.cost = CostModel()
        self._start_moving()
        try:
            self._memory = MemoryTier.open(path, options, shared=shared, restore=self._restore)
        except BaseException:
            self._close_below()
            raise
        try:
            if huge_pages:
                self._memory.use_huge_pages()
            self._open_below()
            super().__init__(self, SpaceOptions("default"), 0, 0.0)
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
        assert self.path is not None
        if self._below is None:
            self._below = DiskTier(self.path, self.options.disk, self._memory.store)
        self._hot = HotSet(self.path, self.options.disk)
        self._writer = WriteBehind(self._memory.store, self._below, self._save_hottest)

    def _start_moving(self) -> None:
        self.running = Running()
        self.prefetcher = Prefetcher(self.sizes_below, self.load, self._in_flight)
        self.running.add(self.prefetcher)

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
        write: Literal["behind", "through", "back"] = "behind",
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
        used by nobody is gone with the last process. `write` says when records go to the disk: "behind" the put, soon
        after it; "through", before the put returns, which raises TierUnavailable when the disk doesn't take them;
        or "back", not before they are to leave memory, or flush() or close() is called: then what is overwritten
        often is seldom written, and a crash of the machine takes more. Who has it open already must have the same
        policy, quota, guarantee, immutable, admission and, as to "back", write, or ConfigMismatch is raised.
        """
        check_name(name, "namespace")
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 2**32:
            raise ConfigError(f"version must be an int from 1 on, not {version!r}")
        if name == "default" and version != 1:
            raise ConfigError("the namespace 'default', which is the cache itself, has no versions; use another name")
        if policy not in _core.policy_names():
            raise UnknownOption("policy", policy, _core.policy_names())
        if admission not in ("all", "reused"):
            raise UnknownOption("admission", admission, ["all", "reused"])
        if write not in ("behind", "through", "back"):
            raise UnknownOption("write", write, ["behind", "through", "back"])
        if write == "through" and not self.options.disk:
            raise ConfigError("write='through' needs a disk tier: kvstrata.open('/some/directory', disk=...)")
        quota_bytes = 0 if quota is None else parse_size(quota, option="quota")
        if quota is not None and quota_bytes == 0:
            raise ConfigError("quota must be more than 0 bytes; None means no limit")
        guaranteed = 0 if guarantee is None else parse_size(guarantee, option="guarantee")
        if guaranteed > self.options.memory // 4 * 3:
            raise ConfigError(f"guarantee={guarantee!r} is more than 3/4 of the memory, {self.options.memory:,} bytes")
        if quota_bytes and guaranteed > quota_bytes:
            raise ConfigError(f"guarantee={guarantee!r} is more than the quota, {quota!r}")
        options = SpaceOptions(
            name, version, policy, quota_bytes, guaranteed, bool(immutable), admission == "reused", write == "back"
        )
        ttl_ms, jitter = parse_duration(ttl), parse_jitter(ttl_jitter)
        with self._lock:
            return Namespace(self, options, ttl_ms, jitter, through=write == "through")

    def holder(self, name: str, *, limit: int | str) -> Holder:
        """Return the holder of that name, who can keep records in memory, `limit` bytes at most.

        All holders together can keep half of the memory. Who opens one that is there already must have the same limit,
        or ConfigMismatch is raised.
        """
        check_name(name, "holder")
        return Holder(self, name, parse_size(limit, option="limit"))

    def _open_space(self, options: SpaceOptions) -> _core.Space:
        self._check_open()
        ns = self._below.open_namespace(options.name, options.version, options.immutable).id if self._below else 0
        return self._memory.store.open_namespace(ns, *options)

    # ---- The tier below, for namespaces

    def load(self, ns: int, keys: list[Key], arrived: Arrived | None = None) -> list[_core.Pin | memoryview | None]:
        """Bring records up from the tier below; None where that can't be done."""
        if self._below is None:
            return [None] * len(keys)
        started = self.cost.clock()
        values = self._below.load(ns, keys, arrived)
        sizes = [len(value) for value in values if value is not None]
        if len(sizes) == len(keys):  # else it has failed, or waited for somebody else
            self.cost.observe(self._below.name, sum(sizes), self.cost.clock() - started)
        return values

    def load_seconds(self, nbytes: int) -> float:
        """Return what a load of that many bytes from the tier below is estimated to take."""
        return self.cost.seconds(self._below.name, nbytes) if self._below else 0.0

    def parts(self) -> PartLoader | None:
        """Return what loads records of the tier below piece by piece, if that is possible there."""
        self._check_open()
        return self._below.parts() if isinstance(self._below, DiskTier) else None

    def sizes_below(self, ns: int, keys: Sequence[Key]) -> list[int]:
        """Return for each key the bytes of its record if that lies in the tier below only; 0 for others."""
        if self._below is None:
            return [0] * len(keys)
        return [0 if at is None else at[4] for at in self._memory.store.find_on_disk(ns, keys)]

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

    # ---- Warm-up

    def warm(
        self,
        keys: Sequence[Key] | None = None,
        *,
        hottest: int | None = None,
        time_limit: float | None = None,
        progress: Progress | None = None,
    ) -> Warmed:
        """Bring records from the disk into memory: `keys`, or of all namespaces the N that were used last, `hottest=N`.

        Which were used last, in whichever process, is saved once a minute and when a process closes the cache. See
        `Namespace.warm` for the rest. Raises ConfigError unless just one of `keys` and `hottest` is given.
        """
        if (keys is None) == (hottest is None):
            raise ConfigError("warm() takes keys, or hottest=N")
        if keys is not None:
            return super().warm(keys, time_limit=time_limit, progress=progress)
        if isinstance(hottest, bool) or not isinstance(hottest, int) or hottest < 1:
            raise ConfigError(f"hottest must be an int from 1 on, not {hottest!r}")
        self._check_open()
        versions = {ns.name: ns.version for ns in self._below.namespaces()} if self._below else {}
        wanted: dict[str, list[Key]] = {}
        for name, version, key in self._hot.load(hottest) if self._hot else ():
            if version == versions.get(name):
                wanted.setdefault(name, []).append(key)
        return self.warm_namespaces(wanted, time_limit=time_limit, progress=progress)

    def warm_namespaces(
        self,
        keys: Mapping[str, Sequence[Key]],
        *,
        time_limit: float | None = None,
        progress: Progress | None = None,
    ) -> Warmed:
        """Bring keys of namespaces, given by name, from the disk into memory, whoever has these namespaces open."""
        self._check_open()
        known = {ns.name: ns.id for ns in self._below.namespaces()} if self._below else {}
        unknown = [name for name in keys if name not in known]
        if unknown:
            raise ConfigError(f"there is no namespace {unknown[0]!r} on the disk of this cache")
        store = self._memory.store
        groups = [
            (store.space(known[name]), functools.partial(self.load, known[name]), wanted)
            for name, wanted in keys.items()
        ]
        return warm(store, groups, room=self.room_to_warm(0), time_limit=time_limit, progress=progress)

    def room_to_warm(self, quota: int) -> int:
        """Return how many bytes a warm-up may bring into a namespace with that quota without pushing itself out."""
        return (min(quota, self.options.memory) if quota else self.options.memory) * 9 // 10

    def _save_hottest(self) -> None:
        if self._hot is None or self._below is None:
            return
        names = {ns.id: (ns.name, ns.version) for ns in self._below.namespaces()}
        used = self._memory.store.hottest(_MOST_HOT)
        if used:
            self._hot.save(self._below, ((*names[ns], key) for ns, key in used if ns in names))

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
            "prefetch": self.prefetcher.stats(),
            "cost": self.cost.stats(),
            "namespaces": namespaces,
            "holders": {
                name: {"limit": limit, "held_bytes": held} for name, limit, held in self._memory.store.holders()
            },
        }

    def live_store(self) -> _core.Store:
        """Return the native store, attached to; raises CacheClosed."""
        self._check_open()
        return self._memory.store

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
        self.running.stop()
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
            self._start_moving()
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
    prefetch: int | str = DEFAULT_IN_FLIGHT,
) -> Cache:
    """Open the cache at a directory, making it if need be; None makes a private one that leaves nothing behind.

    Every process that opens the same path shares one memory tier of `memory` bytes and one disk tier of at most
    `disk` bytes (None: 8 GiB; 0: no disk tier). Sizes are ints or strings such as "512MiB". The options of all that
    have it open must agree, or ConfigMismatch says how they differ. `shared=False` opens it for this process alone.

    `huge_pages=True` puts the memory tier into pages of 2 MiB, for this process and whoever attaches; it takes a
    while at opening, in which the memory is copied once. Raises ConfigError, saying what to do, when the kernel
    refuses.

    `prefetch` is how many bytes this process reads ahead at a time for `Namespace.prefetch`; 0: it does nothing.
    """
    options = CacheOptions.parse(memory=memory, disk=disk, has_path=path is not None)
    where = None if path is None else Path(path).absolute()
    return Cache(where, options, shared, huge_pages, parse_size(prefetch, option="prefetch"))
