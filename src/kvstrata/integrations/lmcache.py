"""kvstrata as an L2 adapter of LMCache's server: its KV outlives the server, and servers share it.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "kvstrata.integrations.lmcache",
      "class_name": "KVStrataL2",
      "adapter_params": {"path": "/var/cache/kv-lmcache", "memory": "1GiB", "disk": "64GiB"}}'

docs/lmcache.md has the options.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import blake3
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import EncodedObjectKey, KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from kvstrata._core import copy_into
from kvstrata.config import parse_duration, parse_size
from kvstrata.errors import ConfigError
from kvstrata.integrations._blocks import EngineBlocks, open_for_engine
from kvstrata.integrations._lmcache_locks import Locks
from kvstrata.threads import thread_pool

__all__ = ["KVStrataL2"]

_OPTIONS = ("salt", "lock_limit", "lock_timeout", "threads")
_FORMAT = 1  # of names and values here; one more when they change
_LAYOUT_BYTES = 16  # behind an object in its record: a digest of its layout, which isn't part of LMCache's key
_HELD_AT_ONCE = 16  # records that are brought up for their locks before it is looked who still wants them
_TOLD_UNCHECKED = 4096  # of what listeners were told of, it is looked what has left when it is so much, or has doubled
_SURVEY_S = 1.0  # how old the figures of usage may be

logger = logging.getLogger(__name__)


class KVStrataL2(L2AdapterInterface):  # type: ignore[misc]
    """An L2 adapter of LMCache. All calls may come from any thread, and none waits for tiers but `delete` and lists.

    Trouble in the cache is an object that isn't there, or wasn't stored, and is counted; only options that can't be
    used raise. `params` takes the arguments of `kvstrata.open` by their names, and: `salt`, anything that sets keys
    apart; `lock_limit`, how many bytes may be locked at a time (half of the memory); `lock_timeout`, after how many
    seconds a lock ends that nobody lets go (300); `threads`, how many lookups and loads run at a time (2).
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: L1MemoryDesc | None = None) -> None:  # noqa: ARG002
        threads = params.get("threads", 2)
        if type(threads) is not int or threads < 1:
            raise ConfigError(f"threads must be an int from 1 on, not {threads!r}")
        given = {name: value for name, value in params.items() if name not in _OPTIONS}
        cache = open_for_engine(given, known=_OPTIONS)
        try:
            limit = params.get("lock_limit")
            timeout_ms = parse_duration(params.get("lock_timeout", 300), option="lock_timeout")
            locks = Locks(cache.options.memory // 2 if limit is None else parse_size(limit), timeout_ms / 1000)
            blocks = EngineBlocks(cache, "lmcache", {"format": _FORMAT, "salt": params.get("salt")})
            super().__init__(max_capacity_bytes=cache.options.disk or cache.options.memory)
        except BaseException:
            cache.close()
            raise
        self._cache = cache
        self._blocks = blocks
        self._locks = locks
        self._stored_fd, self._looked_up_fd, self._loaded_fd = (create_event_notifier() for _ in range(3))
        self._storing = thread_pool(1, "kvstrata-l2-store")
        self._fetching = thread_pool(threads, "kvstrata-l2-fetch")
        self._holding = thread_pool(1, "kvstrata-l2-hold")
        self._ids = itertools.count()
        self._mutex = threading.Lock()
        self._stored: dict[int, L2StoreResult] = {}
        self._looked_up: dict[int, Bitmap] = {}
        self._loaded: dict[int, Bitmap] = {}
        self._told: dict[bytes, int] = {}  # what listeners were told is here, with its size
        self._told_limit = _TOLD_UNCHECKED
        self._usage: tuple[float, AdapterUsage] | None = None
        self._closed = False

    def get_store_event_fd(self) -> int:
        """Return what becomes readable when a store is done."""
        return int(self._stored_fd.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Return what becomes readable when a lookup is done."""
        return int(self._looked_up_fd.fileno())

    def get_load_event_fd(self) -> int:
        """Return what becomes readable when a load is done."""
        return int(self._loaded_fd.fileno())

    # ---- Store

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Begin to store objects, in order; what is there already stays as it is."""
        task = next(self._ids)
        self._storing.submit(self._store, task, keys, objects)
        return task

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Return what became of stores since the last call; one that could not store all of its objects has failed."""
        with self._mutex:
            done = dict(self._stored)
            self._stored.clear()
        return done

    def _store(self, task: int, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> None:
        result = L2StoreResult(False, 0)
        try:
            names = [_name(key) for key in keys]
            sources = [memoryview(obj.byte_array) for obj in objects]
            written: list[int] = []
            done = 0
            for nbytes, run in itertools.groupby(range(len(names)), key=lambda i: sources[i].nbytes):
                places = list(run)

                def fill(position: int, memory: memoryview, places: list[int] = places, nbytes: int = nbytes) -> None:
                    at = places[position]
                    copy_into(sources[at], memory[:nbytes])
                    memory[nbytes:] = _layout(objects[at])
                    written.append(at)

                stored = self._blocks.store([names[i] for i in places], nbytes + _LAYOUT_BYTES, fill)
                done += stored
                if stored < len(places):
                    break
            fresh = [at for at in written if at < done]
            result = L2StoreResult(done == len(names), sum(sources[at].nbytes for at in fresh))
            self._tell_stored([keys[at] for at in fresh], [names[at] for at in fresh])
        except Exception:
            logger.exception("kvstrata could not store objects of LMCache")
        finally:
            self._finish(self._stored, task, result, self._stored_fd)

    # ---- Lookup and lock

    def submit_lookup_and_lock_task(
        self,
        keys: list[ObjectKey],
        group_layout_descs: dict[int, MemoryLayoutDesc],  # noqa: ARG002 - what serializers store has another
    ) -> int:
        """Begin to look which objects are there, and to lock those."""
        task = next(self._ids)
        self._fetching.submit(self._look_up, task, keys)
        return task

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Return, once, which objects of a lookup are there and locked; None while it isn't done."""
        with self._mutex:
            return self._looked_up.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Take one lock off each of the objects."""
        self._locks.unlock([_name(key) for key in keys])

    def _look_up(self, task: int, keys: Sequence[ObjectKey]) -> None:
        locked: list[bytes] = []
        bitmap = Bitmap(len(keys))
        try:
            self._locks.expire()
            names = [_name(key) for key in keys]
            pins, below = self._blocks.pin_here(names)
            absent = [i for i, (pin, size) in enumerate(zip(pins, below, strict=True)) if pin is None and not size]
            asked = [names[i] for i in absent]
            elsewhere = set(itertools.compress(asked, self._blocks.present_elsewhere(asked)))
            for i, (name, pin) in enumerate(zip(names, pins, strict=True)):
                if pin is None and not below[i] and name not in elsewhere:
                    continue
                if self._locks.lock(name, below[i] if pin is None else len(pin), pin):
                    locked.append(name)
                    bitmap.set(i)
            self._tell_gone([name for name in asked if name not in elsewhere])
        except Exception:
            logger.exception("kvstrata could not look up objects of LMCache")
            self._locks.unlock(locked)
            locked, bitmap = [], Bitmap(len(keys))
        finally:
            self._finish(self._looked_up, task, bitmap, self._looked_up_fd)
        if locked:
            self._holding.submit(self._hold, locked)

    def _hold(self, names: Sequence[bytes]) -> None:
        """Bring what is locked into memory, as long as it is: on disk it could be evicted.

        LMCache locks all that it finds, also what it has itself, and soon lets go of that: the rest of it isn't read.
        """
        for start in range(0, len(names), _HELD_AT_ONCE):
            wanted = self._locks.unpinned(names[start : start + _HELD_AT_ONCE])
            if not wanted or self._closed:
                continue
            for name, pin in zip(wanted, self._blocks.pin(wanted), strict=True):
                if pin is not None:
                    self._locks.attach(name, pin)

    # ---- Load

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Begin to copy objects into those given."""
        task = next(self._ids)
        self._fetching.submit(self._load, task, keys, objects)
        return task

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Return, once, which objects of a load are there and true; None while it isn't done."""
        with self._mutex:
            return self._loaded.pop(task_id, None)

    def _load(self, task: int, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> None:
        bitmap = Bitmap(len(keys))
        try:
            names = [_name(key) for key in keys]
            foreign: list[bytes] = []

            def take(at: int, block: memoryview) -> bool:
                nbytes = block.nbytes - _LAYOUT_BYTES
                try:
                    target, layout = memoryview(objects[at].byte_array), _layout(objects[at])
                except Exception as error:  # noqa: BLE001 - whatever LMCache raises, the others can be loaded
                    logger.warning("an object of LMCache's can't be loaded to: %s", repr(error))
                    return False
                if nbytes != target.nbytes or block[nbytes:] != layout:
                    foreign.append(names[at])
                    return False
                copy_into(block[:nbytes], target)
                return True

            got = self._blocks.load_each(names, take, self._locks.views(names))
            for at in itertools.compress(range(len(keys)), got):
                bitmap.set(at)
            self._blocks.delete(foreign)  # else nobody could store the right one
            self._tell_gone([name for name, there in zip(names, got, strict=True) if not there])
            self._notify_keys_accessed(list(itertools.compress(keys, got)))
        except Exception:
            logger.exception("kvstrata could not load objects of LMCache")
            bitmap = Bitmap(len(keys))
        finally:
            self._finish(self._loaded, task, bitmap, self._loaded_fd)

    def _finish(self, results: dict[int, Any], task: int, result: Any, notifier: Any) -> None:
        with self._mutex:
            results[task] = result
        notifier.notify()

    # ---- What listeners are told

    def _tell_stored(self, keys: list[ObjectKey], names: list[bytes]) -> None:
        if not keys:
            return
        sizes = self._blocks.record_sizes(names)
        with self._mutex:
            self._told.update(zip(names, sizes, strict=True))
            self._usage = None
            many = len(self._told) > self._told_limit
        self._notify_keys_stored(keys, sizes)
        if many:
            self.get_usage()
            with self._mutex:
                self._told_limit = max(_TOLD_UNCHECKED, 2 * len(self._told))

    def _tell_gone(self, names: Sequence[bytes], there: Collection[bytes] = ()) -> None:
        """Tell listeners which objects have left: of those that they were told of, and those that were `there`."""
        with self._mutex:
            known = [name for name in names if name in self._told or name in there]
        gone = list(itertools.compress(known, self._blocks.absent(known)))
        with self._mutex:
            sizes = [self._told.pop(name, 0) for name in gone]
            self._usage = None if gone else self._usage
        if gone:
            self._notify_keys_deleted([_key(name).to_object_key() for name in gone], sizes)

    # ---- Eviction, lists, usage

    def delete(self, keys: list[ObjectKey]) -> None:
        """Remove objects, but for those that are locked."""
        names = [name for name in map(_name, keys) if name not in self._locks]
        there = set(itertools.compress(names, self._blocks.record_sizes(names)))
        self._blocks.delete(names)
        self._tell_gone(names, there)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """Return a page of what is there, on this host and by name; sizes are those of records.

        Raises ValueError for a page size that isn't positive, or a cursor that isn't from here.
        """
        if page_size <= 0:
            raise ValueError(f"page_size must be positive, not {page_size}")
        after = b"" if cursor is None else bytes.fromhex(cursor)
        prefix = b"" if model_name is None else f"{model_name}@".encode()
        names = sorted(name for name in self._blocks.keys(prefix) if name > after)
        page, rest = names[:page_size], names[page_size:]
        sizes = self._blocks.record_sizes(page)
        entries = tuple(KeyEntry(_key(name), size) for name, size in zip(page, sizes, strict=True) if size)
        return KeyListPage(entries, page[-1].hex() if rest else None)

    def get_usage(self) -> AdapterUsage:
        """Return how many bytes the records on this host take, whoever stored them; at most a second old."""
        with self._mutex:
            told = list(self._told)
            if self._usage is not None and time.monotonic() - self._usage[0] < _SURVEY_S:
                return self._usage[1]
        names = self._blocks.keys()
        sizes = self._blocks.record_sizes(names)
        by_salt: dict[str, int] = {}
        for name, size in zip(names, sizes, strict=True):
            salt = _key(name).cache_salt
            by_salt[salt] = by_salt.get(salt, 0) + size
        self._tell_gone(list({*told} - {*names}))
        usage = AdapterUsage(sum(sizes), self._max_capacity_bytes, MappingProxyType(by_salt))
        with self._mutex:
            self._usage = time.monotonic(), usage
        return usage

    def report_status(self) -> dict[str, Any]:
        """Return whether the cache answers, and the counters since the start."""
        stats = self._blocks.stats()
        return {
            "is_healthy": not self._closed and stats["breaker"] == "closed",
            "type": "KVStrataL2",
            "path": None if self._cache.path is None else str(self._cache.path),
            "max_capacity_bytes": self._max_capacity_bytes,
            **self._locks.stats(),
            **stats,
        }

    def close(self) -> None:
        """End what is running, let go of all locks, and leave the cache; what was stored gets to the disk first."""
        if self._closed:
            return
        self._closed = True
        for pool in (self._storing, self._fetching, self._holding):
            pool.shutdown(wait=True, cancel_futures=True)
        self._locks.clear()
        for notifier in (self._stored_fd, self._looked_up_fd, self._loaded_fd):
            notifier.close()
        self._cache.close()


def _name(key: ObjectKey) -> bytes:
    """The key of an object's record: LMCache keeps "@" out of model names and salts."""
    return f"{key.model_name}@{key.kv_rank:x}@{key.object_group_id:x}@{key.cache_salt}@{key.chunk_hash.hex()}".encode()


def _key(name: bytes) -> EncodedObjectKey:
    model, rank, group, salt, digest = name.decode().split("@")
    return EncodedObjectKey(digest, model, int(rank, 16), int(group, 16), salt)


def _layout(obj: MemoryObj) -> bytes:
    """A digest of what an object's bytes mean."""
    meta = obj.metadata
    shapes = meta.shapes or [meta.shape]
    dtypes = meta.dtypes or [meta.dtype]
    text = repr([meta.fmt.name, [tuple(shape) for shape in shapes], [str(dtype) for dtype in dtypes]])
    return blake3.blake3(text.encode()).digest(_LAYOUT_BYTES)
