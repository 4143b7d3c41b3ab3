"""The tiers of a cache in this process, one below the other, and what moves records between them: their life."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvstrata.codecs.encryption import Sealer
from kvstrata.errors import CacheClosed, ConfigMismatch, TierUnavailable
from kvstrata.movement.below import Below
from kvstrata.movement.cost import CostModel
from kvstrata.movement.engine import Engine, EngineSpace, open_engine
from kvstrata.movement.prefetch import Prefetcher
from kvstrata.movement.remotes import Remotes, RemoteSpace
from kvstrata.movement.running import Running
from kvstrata.movement.warm import HotSet
from kvstrata.movement.write_behind import WriteBehind
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.encodings import KEYS_FILE, Encoding, check_keys, keys_in_use
from kvstrata.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstrata import _core
    from kvstrata.namespace_options import SpaceOptions
    from kvstrata.settings import Settings
    from kvstrata.tiers.base import Stats

__all__ = ["TierStack"]

_MOST_HOT = 100_000  # keys that are remembered for a warm-up


class TierStack:
    """Opened with the cache. In a forked child it takes tiers of its own at the first use."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.path
        self.options = settings.options
        self.encodings: dict[str, dict[str, Encoding]] = {}  # of namespaces, by tier
        self.cost = CostModel()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._settings = settings
        self.sealer = None if settings.keys is None else Sealer(settings.keys)
        self._disk: DiskTier | None = None
        self.remotes: Remotes | None = None
        self.writer: WriteBehind | None = None
        self.hot: HotSet | None = None
        self._start_moving()
        if self.path is not None and self.options.log:
            check_keys(self.path, settings.keys)
        try:
            self.memory = MemoryTier.open(self.path, self.options, shared=settings.shared, restore=self._restore)
        except BaseException:
            self._close_below()
            raise
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether it is."""
        return self._closed

    @property
    def has_engine(self) -> bool:
        """Whether another engine than the log keeps what is on disk."""
        return self.options.disk_engine != "log"

    @property
    def below(self) -> Below:
        """The tier under the host's index; in a forked child, that of its own."""
        self.attach_again()
        return self._below

    def live_store(self) -> _core.Store:
        """Return the native store, attached to; raises CacheClosed."""
        self.check_open()
        return self.memory.store

    def live_remotes(self) -> Remotes:
        """Return the tiers that are asked after a miss; raises CacheClosed."""
        self.check_open()
        assert self.remotes is not None
        return self.remotes

    def check_open(self) -> None:
        """Raise CacheClosed when it is closed; in a forked child, attach."""
        if self._closed:
            raise CacheClosed("this cache is closed")
        self.attach_again()

    # ---- Opening

    def _set_up(self) -> None:
        """Make what this process has of its own, and open the other tiers, once the memory is there."""
        if self.path is not None:
            differences = Remotes.differences(self.path, self._settings.places)
            if differences:
                raise ConfigMismatch.of_cache(str(self.path), differences)
        if self._settings.huge_pages:
            self.memory.use_huge_pages()
        self.memory.store.keep_near(self._settings.near)
        self._open_below()
        self._open_remotes()

    def _restore(self, store: _core.Store) -> None:
        """Tell a new memory tier what lies on disk, and what elsewhere counts."""
        if self.path is not None:
            Remotes.restore_trust(store, self.path, self._settings.places)
        if self.options.log:
            self._disk = self._disk_tier(store)
            self._disk.recover()

    def _disk_tier(self, store: _core.Store) -> DiskTier:
        assert self.path is not None
        options = self.options
        return DiskTier(
            self.path,
            options.disk,
            store,
            sealer=self.sealer,
            policy=options.disk_policy,
            write_limit=options.disk_write_limit,
        )

    def _open_below(self) -> None:
        store = self.memory.store
        if self.options.log and self._disk is None:
            self._disk = self._disk_tier(store)
        self._below = Below(store, self._disk, self.cost)
        if self._disk is None:
            return
        assert self.path is not None
        keys = self._settings.keys
        if keys is not None and (data := keys_in_use(self.path, keys)) is not None:
            self._disk.save(KEYS_FILE, data)
        self.hot = HotSet(self.path, self.options.disk)
        self.writer = WriteBehind(store, self._disk, self._save_hottest)

    def _start_moving(self) -> None:
        self.running = Running()
        self.prefetcher = Prefetcher(
            lambda ns, keys: self.below.sizes(ns, keys),
            lambda ns, keys: self.below.load(ns, keys),
            self._settings.prefetch,
        )
        self.running.add(self.prefetcher)

    def _open_remotes(self) -> None:
        if self.has_engine:
            assert self.path is not None
            engine = open_engine(self.options.disk_engine, self.path, self.options.disk)
            self.remotes = Engine(self.memory.store, engine, self.path, self.cost)
        if self._settings.remotes:
            self.remotes = Remotes(self.memory.store, [url.open() for url in self._settings.remotes], self.cost)

    # ---- Of a namespace

    def open_space(self, options: SpaceOptions) -> _core.Space:
        """Open a namespace in memory, and on disk; raises what `Cache.namespace` does."""
        self.check_open()
        if not self._settings.remotes:
            options = options._replace(remote=True)  # it makes no difference
        if self._disk is None:
            return self.memory.store.open_namespace(0, *options.native())
        ns = self._disk.number_of(options.name, options.version, options.immutable)
        space = self.memory.store.open_namespace(ns, *options.native())  # refuses what the catalog must not hear of
        self._disk.open_namespace(options.name, options.version, options.immutable)
        self._disk.set_quota(ns, options.disk_quota)
        self._disk.encodings.set(ns, self.encodings.get(options.name, {}).get("disk"))
        return space

    def open_remote_space(self, options: SpaceOptions, native: Callable[[], _core.Space]) -> RemoteSpace | None:
        """Return the part of a namespace that is asked after a miss, None where there is none."""
        if not options.remote or not (self._settings.remotes or self.has_engine):
            return None
        kind, tier = (EngineSpace, "disk") if self.has_engine else (RemoteSpace, "remote")
        return kind(
            options.name,
            options.version,
            immutable=options.immutable,
            space=native,
            remotes=self.live_remotes,
            encoding=self.encodings.get(options.name, {}).get(tier, Encoding(sealer=self.sealer)),
            replaced=lambda space, key, seq: self.below.forget_older(space.id, [(key, seq)]),
        )

    @property
    def written_at_once(self) -> tuple[int, int] | None:
        """How many records, and bytes, one step of a put may have where each is written before it returns."""
        return (512, self.options.memory // 16) if self.has_engine else None

    def room_to_warm(self, quota: int) -> int:
        """Return how many bytes a warm-up may bring into a namespace with that quota without pushing itself out."""
        return (min(quota, self.options.memory) if quota else self.options.memory) * 9 // 10

    def _save_hottest(self) -> None:
        if self.hot is None or self._disk is None:
            return
        names = {ns.id: (ns.name, ns.version) for ns in self._disk.namespaces()}
        used = self.memory.store.hottest(_MOST_HOT)
        if used:
            self.hot.save(self._disk, ((*names[ns], key) for ns, key in used if ns in names))

    # ---- Life

    def flush(self, timeout: float) -> None:
        """Wait until all that this process has put has reached the other tiers; raises TierUnavailable."""
        self.check_open()
        until = time.monotonic() + timeout
        if self.writer and not self.writer.flush(timeout):
            raise TierUnavailable(f"the disk tier did not take all records within {timeout:g} s")
        if self.remotes and not self.remotes.flush(max(0.0, until - time.monotonic())):
            raise TierUnavailable(f"a remote tier did not take all records within {timeout:g} s")

    def stats(self) -> dict[str, Any]:
        """Return what each says of itself; see `Cache.stats`."""
        store = self.live_store()
        return {
            "memory": store.stats(),
            "disk": self._disk_stats(),
            "remote": self.remotes.stats() if self.remotes else [],
            "prefetch": self.prefetcher.stats(),
            "cost": self.cost.stats(),
            "holders": {name: {"limit": limit, "held_bytes": held} for name, limit, held in store.holders()},
        }

    def _disk_stats(self) -> Stats | None:
        if isinstance(self.remotes, Engine):
            return self.remotes.figures()
        return self.below.stats()

    def close(self) -> None:
        """Write what is not on disk yet, and let go of all. The last process out frees the shared memory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._pid == os.getpid():  # else never attached in this child
                self._shut()

    def _shut(self) -> None:
        self.running.stop()
        try:
            if self.remotes:
                self.remotes.close()
            if self.writer:
                with suppress(TierUnavailable):
                    self.memory.store.reap()  # what the dead had yet to write is ours to write
                self.writer.stop()
            self._close_below()
        finally:
            self.memory.close(self._last_out)

    def _last_out(self) -> None:
        """The last process is about to leave the mapping."""
        if self.remotes and self.path is not None and not self.has_engine:
            self.remotes.keep_trust(self.path, self._settings.places)

    def _close_below(self) -> None:
        if self._disk:
            self._disk.close()

    # ---- Forking

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the parent's place."""
        self._lock = threading.RLock()
        if isinstance(self.remotes, Engine):
            self.remotes.leave_to_parent()
        self.remotes = None
        self.memory.leave_to_parent()

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
            self.memory.attach_again(self._restore)
            self._set_up()
            self._pid = os.getpid()
