"""The cache: namespaces over tiers."""

from __future__ import annotations

import atexit
import functools
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from kvstrata.codecs.base import Codec, TensorInfo
from kvstrata.config import check_name, parse_duration, parse_jitter, parse_size
from kvstrata.errors import ConfigError
from kvstrata.holder import Holder
from kvstrata.movement.below import Below
from kvstrata.movement.warm import Progress, Warmed, warm
from kvstrata.namespace import Namespace
from kvstrata.namespace_options import SpaceOptions, checked_encodings, checked_options
from kvstrata.settings import Settings
from kvstrata.tier_stack import TierStack
from kvstrata.tiers.base import Key
from kvstrata.tiers.encodings import Tail

__all__ = ["Cache"]


class Cache(Namespace):
    """What `kvstrata.open` returns. Used directly, it is its namespace "default"."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.path
        self.options = settings.options
        self.tiers = TierStack(settings)
        self._opened: weakref.WeakSet[Namespace] = weakref.WeakSet()
        self._lock = threading.RLock()
        try:
            super().__init__(self, SpaceOptions("default"), 0, 0.0)
        except BaseException:
            self.tiers.close()
            raise
        _open_caches.add(self)

    def __repr__(self) -> str:
        return f"<kvstrata cache at {self.path or 'no path (private)'}{', closed' if self.tiers.closed else ''}>"

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
        encodings = checked_encodings(codec, tensor, self.tiers.sealer)
        with self._lock:
            self.tiers.encodings[name] = encodings
            return Namespace(self, options, ttl_ms, jitter, through=write == "through" and not self.tiers.has_engine)

    def set_tail(self, name: str, tail: Tail) -> None:
        """Say what stands behind the tensors of a namespace, whose values are longer, when a codec has changed them."""
        for encoding in self.tiers.encodings.get(name, {}).values():
            encoding.tail = tail

    def holder(self, name: str, *, limit: int | str) -> Holder:
        """Return the holder of that name, who can keep records in memory, `limit` bytes at most.

        All holders together can keep half of the memory. Who opens one that is there already must have the same limit,
        or ConfigMismatch is raised.
        """
        check_name(name, "holder")
        return Holder(self, name, parse_size(limit, option="limit"))

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
        self.tiers.check_open()
        versions = {ns.name: ns.version for ns in self.below.namespaces()}
        wanted: dict[str, list[Key]] = {}
        for name, version, key in self.tiers.hot.load(hottest) if self.tiers.hot else ():
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
        store = self.tiers.live_store()
        known = {ns.name: ns.id for ns in self.below.namespaces()}
        unknown = [name for name in keys if name not in known]
        if unknown:
            raise ConfigError(
                f"there is no namespace {unknown[0]!r} on the disk of this cache; where it is only elsewhere, open it "
                "with its version, and call its own warm()"
            )
        groups = [
            (store.space(known[name]), functools.partial(self.below.load, known[name]), wanted)
            for name, wanted in keys.items()
        ]
        return warm(store, groups, room=self.tiers.room_to_warm(0), time_limit=time_limit, progress=progress)

    # ---- Life

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until all that this process has put has reached the other tiers.

        Raises TierUnavailable after `timeout` seconds.
        """
        self.tiers.flush(timeout)

    def demote(self) -> int:
        """Take out of memory what lies on disk too, where nobody has it pinned; returns the bytes that became free."""
        return self.tiers.live_store().demote_all()

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
        stats = self.tiers.stats()
        namespaces = {}
        below = self.below.usage()
        for namespace in list(self._opened):
            records, used = namespace._space.usage
            on_disk, disk_bytes = below.get(namespace._space.id, (0, 0))
            namespaces[namespace.name] = {
                "records": records, "memory_bytes": used, "version": namespace.version,
                "disk_records": on_disk, "disk_bytes": disk_bytes,
            }  # fmt: skip
        return {**stats, "namespaces": namespaces}

    @property
    def below(self) -> Below:
        """The tier under the host's index."""
        return self.tiers.below

    def close(self) -> None:
        """Write what is not on disk yet, and let go of the cache. The last process out frees the shared memory."""
        with self._lock:  # no namespace is being opened meanwhile
            _open_caches.discard(self)
            self.tiers.close()

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
        self.tiers.leave_to_parent()


class _Forked:
    """Stands for a namespace's native part in a forked child until it is used."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        namespace = self._namespace
        current: object = namespace._space
        if current is self:
            namespace._space = namespace._cache.tiers.open_space(namespace._options)
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
