"""The cache: namespaces over tiers, and its life."""

from __future__ import annotations

import atexit
import functools
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

from kvstrata import _core
from kvstrata.codecs.base import Codec, TensorInfo
from kvstrata.codecs.encryption import Sealer
from kvstrata.config import check_name, parse_duration, parse_jitter, parse_size
from kvstrata.errors import CacheClosed, ConfigError, TierUnavailable
from kvstrata.holder import Holder
from kvstrata.movement.below import Below
from kvstrata.movement.cost import CostModel
from kvstrata.movement.engine import Engine, EngineSpace, open_engine
from kvstrata.movement.prefetch import Prefetcher
from kvstrata.movement.remotes import Remotes, RemoteSpace
from kvstrata.movement.running import Running
from kvstrata.movement.warm import HotSet, Progress, Warmed, warm
from kvstrata.movement.write_behind import WriteBehind
from kvstrata.namespace import Namespace
from kvstrata.namespace_options import SpaceOptions, checked_encodings, checked_options
from kvstrata.settings import Settings
from kvstrata.tiered_space import TieredSpace
from kvstrata.tiers.base import Key, Stats
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.encodings import KEYS_FILE, Encoding, Tail, check_keys, keys_in_use
from kvstrata.tiers.memory import MemoryTier

__all__ = ["Cache"]

_MOST_HOT = 100_000  # keys that are remembered for a warm-up


class Cache(Namespace):
    """What `kvstrata.open` returns. Used directly, it is its namespace "default"."""

    def __init__(self, settings: Settings) -> None:
        path, options, keys = settings.path, settings.options, settings.keys
        self.path = path
        self.options = options
        self._opened: weakref.WeakSet[Namespace] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._huge_pages = settings.huge_pages
        self._near = settings.near
        self._keys = keys
        self._sealer = None if keys is None else Sealer(keys)
        self._encodings: dict[str, dict[str, Encoding]] = {}  # of namespaces, by tier
        self._disk: DiskTier | None = None
        self._remote_urls = list(settings.remotes)
        self._remotes: Remotes | None = None
        self._writer: WriteBehind | None = None
        self._hot: HotSet | None = None
        self._in_flight = settings.prefetch
        self.cost = CostModel()
        self._start_moving()
        if path is not None and options.log:
            check_keys(path, keys)
        try:
            self._memory = MemoryTier.open(path, options, shared=settings.shared, restore=self._restore)
        except BaseException:
            self._close_below()
            raise
        try:
            self._set_up()
            super().__init__(self, SpaceOptions("default"), 0, 0.0)
        except BaseException:
            self._shut()
            raise
        _open_caches.add(self)

    def _set_up(self) -> None:
        """Make what this process has of its own, and open the other tiers, once the memory is there."""
        if self._huge_pages:
            self._memory.use_huge_pages()
        self._memory.store.keep_near(self._near)
        self._open_below()
        self._open_remotes()

    def _restore(self, store: _core.Store) -> None:
        """Tell a new memory tier what lies on disk, and what elsewhere counts."""
        if self._remote_urls and self.path is not None:
            Remotes.restore_trust(store, self.path)
        if self.options.log:
            assert self.path is not None
            self._disk = self._disk_tier(store)
            self._disk.recover()

    def _disk_tier(self, store: _core.Store) -> DiskTier:
        assert self.path is not None
        options = self.options
        return DiskTier(
            self.path,
            options.disk,
            store,
            sealer=self._sealer,
            policy=options.disk_policy,
            write_limit=options.disk_write_limit,
        )

    def _open_below(self) -> None:
        store = self._memory.store
        if self.options.log and self._disk is None:
            self._disk = self._disk_tier(store)
        self._below = Below(store, self._disk, self.cost)
        if self._disk is None:
            return
        assert self.path is not None
        if self._keys is not None and (data := keys_in_use(self.path, self._keys)) is not None:
            self._disk.save(KEYS_FILE, data)
        self._hot = HotSet(self.path, self.options.disk)
        self._writer = WriteBehind(store, self._disk, self._save_hottest)

    @property
    def below(self) -> Below:
        """The tier under the host's index; in a forked child, that of its own."""
        self.attach_again()
        return self._below

    def _start_moving(self) -> None:
        self.running = Running()
        self.prefetcher = Prefetcher(
            lambda ns, keys: self.below.sizes(ns, keys), lambda ns, keys: self.below.load(ns, keys), self._in_flight
        )
        self.running.add(self.prefetcher)

    def _open_remotes(self) -> None:
        if self._has_engine:
            assert self.path is not None
            engine = open_engine(self.options.disk_engine, self.path, self.options.disk)
            self._remotes = Engine(self._memory.store, engine, self.path, self.cost)
        if self._remote_urls:
            self._remotes = Remotes(self._memory.store, [url.open() for url in self._remote_urls], self.cost)

    def _remote_space(self, namespace: TieredSpace) -> RemoteSpace | None:
        if not self._remote_urls and not self._has_engine:
            return None
        options = namespace._options
        kind, tier = (EngineSpace, "disk") if self._has_engine else (RemoteSpace, "remote")
        return kind(
            options.name,
            options.version,
            immutable=options.immutable,
            space=namespace._native,
            remotes=self._live_remotes,
            encoding=self._encodings.get(options.name, {}).get(tier, Encoding(sealer=self._sealer)),
            replaced=lambda space, key, seq: self.below.forget_older(space.id, [(key, seq)]),
        )

    @property
    def written_at_once(self) -> tuple[int, int] | None:
        """How many records, and bytes, one step of a put may have where each is written before it returns."""
        return (512, self.options.memory // 16) if self._has_engine else None

    @property
    def _has_engine(self) -> bool:
        return self.options.disk_engine != "log"

    def _live_remotes(self) -> Remotes:
        self._check_open()
        assert self._remotes is not None
        return self._remotes

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
        disk_quota: int | str | None = None,
        guarantee: int | str | None = None,
        ttl: float | None = None,
        ttl_jitter: float = 0.0,
        immutable: bool = False,
        admission: Literal["all", "reused", "frequent"] = "all",
        write: Literal["behind", "through", "back"] = "behind",
        remote: bool = True,
        codec: str | Codec | Mapping[str, str | Codec] | None = None,
        tensor: TensorInfo | None = None,
    ) -> Namespace:
        """Open a partition of the cache's keys.

        A higher `version` than the last one makes all older records unreachable; a lower one raises VersionConflict.
        `quota` bounds its bytes in memory, and `guarantee` says how many of them no other namespace takes from it,
        whatever that stores; at most 3/4 of the memory can be guaranteed. `disk_quota` bounds its bytes on disk, those
        of whole records; who opens it last decides. (The exception to a guarantee is a value that finds room
        enough, but only in pieces too small.) `ttl` is the time to live of its records in seconds; with `ttl_jitter`,
        0 to 1, each lives up to that part shorter, so that what was stored together doesn't expire together.
        `immutable` promises that a key implies its value, as content digests do: such records are stored once and can
        be recovered from the disk even when the index is lost. With `admission="reused"` only what is used again, or
        put again after it had gone, is written to the disk: what is wanted once costs no writes there, and what was
        used by nobody is gone with the last process. "frequent" asks for four puts and uses, as counted by a sketch of
        what was wanted lately. `write` says when records go to the disk: "behind" the put, soon
        after it; "through", before the put returns, which raises TierUnavailable when the disk doesn't take them;
        or "back", not before they are to leave memory, or flush() or close() is called: then what is overwritten
        often is seldom written, and a crash of the machine takes more. With `remote=False` it stays on this host,
        whatever the cache was opened with; do that in all processes alike.

        `codec` encodes values below memory, where they are always as they were put: one for all tiers, or one for each,
        as in {"memory": "raw", "disk": "planes", "remote": "int8"}; docs/codecs.md says which there are. Lossy ones
        want to know what values are: `tensor`; values that aren't such tensors are stored raw. It is this process's
        affair: records say themselves how they are encoded.

        Who has it open already must have the same
        policy, quota, guarantee, immutable, admission and, as to "back", write, or ConfigMismatch is raised.
        """
        options = checked_options(
            self.options,
            name,
            version=version,
            policy=policy,
            quota=quota,
            disk_quota=disk_quota,
            guarantee=guarantee,
            immutable=immutable,
            admission=admission,
            write=write,
            remote=remote,
        )
        ttl_ms, jitter = parse_duration(ttl), parse_jitter(ttl_jitter)
        encodings = checked_encodings(codec, tensor, self._sealer)
        with self._lock:
            self._encodings[name] = encodings
            return Namespace(self, options, ttl_ms, jitter, through=write == "through" and not self._has_engine)

    def set_tail(self, name: str, tail: Tail) -> None:
        """Say what stands behind the tensors of a namespace, whose values are longer, when a codec has changed them."""
        for encoding in self._encodings.get(name, {}).values():
            encoding.tail = tail

    def holder(self, name: str, *, limit: int | str) -> Holder:
        """Return the holder of that name, who can keep records in memory, `limit` bytes at most.

        All holders together can keep half of the memory. Who opens one that is there already must have the same limit,
        or ConfigMismatch is raised.
        """
        check_name(name, "holder")
        return Holder(self, name, parse_size(limit, option="limit"))

    def _open_space(self, options: SpaceOptions) -> _core.Space:
        self._check_open()
        ns = 0
        if self._disk:
            ns = self._disk.open_namespace(options.name, options.version, options.immutable).id
            self._disk.set_quota(ns, options.disk_quota)
            self._disk.encodings.set(ns, self._encodings.get(options.name, {}).get("disk"))
        return self._memory.store.open_namespace(ns, *options.native())

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
        versions = {ns.name: ns.version for ns in self.below.namespaces()}
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
        known = {ns.name: ns.id for ns in self.below.namespaces()}
        unknown = [name for name in keys if name not in known]
        if unknown:
            raise ConfigError(
                f"there is no namespace {unknown[0]!r} on the disk of this cache; where it is only elsewhere, open it "
                "with its version, and call its own warm()"
            )
        store = self._memory.store
        groups = [
            (store.space(known[name]), functools.partial(self.below.load, known[name]), wanted)
            for name, wanted in keys.items()
        ]
        return warm(store, groups, room=self.room_to_warm(0), time_limit=time_limit, progress=progress)

    def room_to_warm(self, quota: int) -> int:
        """Return how many bytes a warm-up may bring into a namespace with that quota without pushing itself out."""
        return (min(quota, self.options.memory) if quota else self.options.memory) * 9 // 10

    def _save_hottest(self) -> None:
        if self._hot is None or self._disk is None:
            return
        names = {ns.id: (ns.name, ns.version) for ns in self._disk.namespaces()}
        used = self._memory.store.hottest(_MOST_HOT)
        if used:
            self._hot.save(self._disk, ((*names[ns], key) for ns, key in used if ns in names))

    # ---- Life

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until all that this process has put has reached the other tiers.

        Raises TierUnavailable after `timeout` seconds.
        """
        self._check_open()
        until = time.monotonic() + timeout
        if self._writer and not self._writer.flush(timeout):
            raise TierUnavailable(f"the disk tier did not take all records within {timeout:g} s")
        if self._remotes and not self._remotes.flush(max(0.0, until - time.monotonic())):
            raise TierUnavailable(f"a remote tier did not take all records within {timeout:g} s")

    def demote(self) -> int:
        """Take out of memory what lies on disk too, where nobody has it pinned; returns the bytes that became free."""
        self._check_open()
        return self._memory.store.demote_all()

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes: those of memory tier and index, of disk and remote tiers, and per namespace.

        Under "memory", "near_hits" are those of the hits that this process served from values that it keeps
        itself ("near_values" of them, in "near_bytes"). Sizes are in bytes, and parts from 0 to 1:
        "memory_utilisation" is the part of "memory_bytes" that holds records ("memory_record_bytes"); what
        "memory_used_bytes" is more than these is lost to rounding, or is keys and records that only a pin
        keeps. "memory_fragmentation" is the part of the free memory that lies outside the largest free piece.
        "debt_keys" is about how many keys may have a row on disk that the index doesn't know, "debt_fill" how
        full the filter is that counts them, and "debt_fp_rate" the part of other keys for which a put or delete
        pays a transaction for nothing.
        """
        self._check_open()
        namespaces = {}
        below = self.below.usage()
        for namespace in list(self._opened):
            records, used = namespace._space.usage
            on_disk, disk_bytes = below.get(namespace._space.id, (0, 0))
            namespaces[namespace.name] = {
                "records": records, "memory_bytes": used, "version": namespace.version,
                "disk_records": on_disk, "disk_bytes": disk_bytes,
            }  # fmt: skip
        return {
            "memory": self._memory.store.stats(),
            "disk": self._disk_stats(),
            "remote": self._remotes.stats() if self._remotes else [],
            "prefetch": self.prefetcher.stats(),
            "cost": self.cost.stats(),
            "namespaces": namespaces,
            "holders": {
                name: {"limit": limit, "held_bytes": held} for name, limit, held in self._memory.store.holders()
            },
        }

    def _disk_stats(self) -> Stats | None:
        if isinstance(self._remotes, Engine):
            return self._remotes.figures()
        return self.below.stats()

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
            if self._remotes:
                self._remotes.close()
            if self._writer:
                with suppress(TierUnavailable):
                    self._memory.store.reap()  # what the dead had yet to write is ours to write
                self._writer.stop()
            self._close_below()
        finally:
            self._memory.close(self._last_out)

    def _last_out(self) -> None:
        """The last process is about to leave the mapping."""
        if self._remotes and self.path is not None and not self._has_engine:
            self._remotes.keep_trust(self.path)

    def _close_below(self) -> None:
        if self._disk:
            self._disk.close()

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
            if namespace._remote is not None:
                namespace._remote.forget_parent()
        if isinstance(self._remotes, Engine):
            self._remotes.leave_to_parent()
        self._remotes = None
        self._memory.leave_to_parent()

    def attach_again(self) -> None:
        """In a forked child: take a place of its own, unless it has one."""
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            if self.options.disk_engine == "lsm":
                raise TierUnavailable("disk_engine='lsm' is for one process: a forked child can't use its cache")
            self._disk = None
            self._start_moving()
            self._memory.attach_again(self._restore)
            self._set_up()
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
