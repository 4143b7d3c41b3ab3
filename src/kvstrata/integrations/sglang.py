"""kvstrata as the storage of SGLang's hierarchical cache: KV pages outlive the server, and servers share them.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "kvstrata", "module_path": "kvstrata.integrations.sglang", "class_name": "KVStrataHiCache",
      "interface_v1": 1, "path": "/var/cache/kv-sglang", "memory": "4GiB", "disk": "64GiB"}'

SGLang moves pages between accelerator and its host pool; kvstrata takes them from that pool's memory and gives them
back, each copied once. docs/sglang.md has the options.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from kvstrata.errors import ConfigError, KVStrataError
from kvstrata.integrations._blocks import EngineBlocks, open_for_engine
from kvstrata.integrations._sglang_pages import Pages, bytes_of, describe_pool
from kvstrata.integrations._sglang_server import describe_server
from kvstrata.tiers.base import Stats

__all__ = ["KVStrataHiCache"]

_FACTORY = ("backend_name", "module_path", "class_name", "interface_v1")
_OPTIONS = (*_FACTORY, "salt")
_KV = PoolName.KV.value

logger = logging.getLogger(__name__)


class KVStrataHiCache(HiCacheStorage):  # type: ignore[misc]
    """A dynamic backend of SGLang's HiCache. All calls may come from any thread.

    Trouble in the cache is a page that isn't there, or wasn't stored, and is counted in `stats()`; only options that
    can't be used raise, here and where pools are registered. `extra_config` takes the arguments of `kvstrata.open`
    by their names, and `salt`: anything that sets keys apart, such as a tenant's secret or a revision of the weights.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:  # noqa: ARG002 - the factory's
        options = dict(storage_config.extra_config or {})
        if not storage_config.model_name:
            raise ConfigError("SGLang gives no model name, so pages of different models could not be told apart")
        self._config = storage_config
        self._salt = options.get("salt")
        self._zero_copy = bool(options.get("interface_v1"))
        self._cache = open_for_engine(
            {name: value for name, value in options.items() if name not in _OPTIONS}, known=("salt",)
        )
        self._lock = threading.Lock()
        self._kv: Pages | None = None
        self._flat: EngineBlocks | None = None
        self._side: dict[str, Pages] = {}
        self._transfers: dict[str, list[tuple[int, float]]] = {"prefetch": [], "backup": []}

    # ---- Pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool that holds the KV: its type, layout and page size are part of what names a page."""
        self.mem_pool_host = mem_pool_host
        facts = self._facts(_KV, mem_pool_host)
        self._kv = Pages(self._cache, facts, mem_pool_host) if self._zero_copy else None
        self._flat = EngineBlocks(self._cache, "sglang", {**facts, **describe_pool(mem_pool_host), "order": "pages"})

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a pool that a hybrid model has besides."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = _name(host_pool_name)
        self._side[name] = Pages(self._cache, self._facts(name, host_pool), host_pool)

    def _facts(self, name: str, pool: Any) -> dict[str, object]:
        config, server = self._config, describe_server()
        if getattr(pool, "dtype", None) == torch.uint8 and not (self._salt or server.get("kv_cache_dtype")):
            raise ConfigError(
                "SGLang doesn't say which type its KV of 8 bits is, as fp8_e4m3 or fp8_e5m2, so pages of different "
                "types could not be told apart; name the model and the type, among the options of kvstrata: "
                '"salt": "NAME"'
            )
        # All ranks hold the same latents, and one of them writes; what is split among heads differs by rank.
        split = not config.is_mla_model or name == PoolName.MAMBA.value or _is_split_by_heads(pool)
        return {
            "model": config.model_name,
            **{f"server {name}": value for name, value in server.items()},
            "pool": name,
            "salt": self._salt,
            "tp": (config.tp_rank, config.tp_size) if split else None,
            "pp": (config.pp_rank, config.pp_size),
            "cp": (config.attn_cp_rank, config.attn_cp_size),
            "dcp": (config.dcp_rank, config.dcp_size),
        }

    def _blocks(self) -> EngineBlocks:
        """Where the KV's pages are, by the interface that was chosen."""
        return self._kv.blocks if self._kv is not None else self._pages()

    def _pages(self) -> EngineBlocks:
        if self._flat is None:
            raise ConfigError("register_mem_pool_host() comes first: a page's layout is part of its name")
        return self._flat

    # ---- What is there

    def exists(self, key: str) -> bool:
        """Say whether a page of KV is there."""
        return self._blocks().match([key.encode()]) == 1

    def batch_exists(self, keys: Sequence[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:  # noqa: ARG002
        """Return how many pages of KV from the first on are there; loads nothing."""
        return self._blocks().match([key.encode() for key in keys])

    def batch_exists_v2(
        self,
        keys: Sequence[str],
        pool_transfers: Sequence[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Return the longest prefix that can be restored with what its other pools need, and all shorter ones."""
        kv_pages = self.batch_exists(keys, extra_info)
        hits: dict[str, int] = {PoolName.KV: kv_pages} if kv_pages else {}
        restorable = list(range(1, kv_pages + 1))
        for transfer in pool_transfers or ():
            if not restorable:
                break
            if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
                continue  # it never gates a hit, and no verdict is none
            side = self._side.get(_name(transfer.name))
            present = side.blocks.present([key.encode() for key in keys[:kv_pages]]) if side else [False] * kv_pages
            # A prefix of n pages needs all of them, or the window of so many that ends with it.
            window = kv_pages
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
            usable = {n for n in range(1, kv_pages + 1) if all(present[max(0, n - window) : n])}
            if usable:
                hits[transfer.name] = max(usable)
            restorable = [n for n in restorable if n in usable]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    # ---- From and to the pools' memory

    def batch_get_v1(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,  # noqa: ARG002
    ) -> list[bool]:
        """Copy pages into the host pool; says which of them are there, and true."""
        if self._kv is None:
            return [False] * len(keys)
        started = time.perf_counter()
        got = self._kv.get([key.encode() for key in keys], host_indices)
        self._note("prefetch", self._kv, sum(got), started)
        return got

    def batch_set_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages of the host pool, in order, up to the first that can't be; says which of them are there."""
        if self._kv is None:
            return [False] * len(keys)
        started = time.perf_counter()
        done = self._kv.set([key.encode() for key in keys], host_indices, depth=_depth(extra_info))
        self._note("backup", self._kv, sum(done), started)
        return done

    def batch_get_v2(
        self,
        transfers: Sequence[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,  # noqa: ARG002
    ) -> dict[str, list[bool]]:
        """As batch_get_v1, for several pools: by the pool's name."""
        return {transfer.name: self._move(transfer, Pages.get) for transfer in transfers}

    def batch_set_v2(
        self,
        transfers: Sequence[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,  # noqa: ARG002 - a side pool's keys need not be a run
    ) -> dict[str, list[bool]]:
        """As batch_set_v1, for several pools: by the pool's name."""
        return {transfer.name: self._move(transfer, Pages.set) for transfer in transfers}

    def _move(self, transfer: PoolTransfer, verb: Any) -> list[bool]:
        side = self._side.get(_name(transfer.name))
        keys = [key.encode() for key in transfer.keys or ()]
        if side is None or transfer.host_indices is None:
            return [False] * len(keys)
        moved: list[bool] = verb(side, keys, transfer.host_indices)
        return moved

    # ---- Page by page, for a configuration without interface_v1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | bool | None:
        """Return a page as a tensor: `target_location` filled, or new bytes; None where it isn't there.

        `target_location` may be an address, and `target_sizes` its length in bytes: then True or False is returned.
        """
        page = self.batch_get([key], [target_location], [target_sizes])[0]
        return page is not None if isinstance(target_location, int) else page

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """As `get`, for several pages."""
        wanted = _targets(keys, target_locations, target_sizes)
        pages: list[torch.Tensor | None] = [None] * len(keys)

        def take(position: int, block: memoryview) -> bool:
            page = wanted[position]
            if page is None:
                page = torch.empty(block.nbytes, dtype=torch.uint8)
            if not page.is_contiguous() or bytes_of(page).nbytes != block.nbytes:
                return False
            bytes_of(page)[:] = block
            pages[position] = page
            return True

        got = self._pages().load_each([key.encode() for key in keys], take)
        return [page if there else None for page, there in zip(pages, got, strict=True)]

    def set(
        self, key: str, value: torch.Tensor | None = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store a page; says whether it is there now."""
        return self.batch_set([key], [value], [target_location], [target_sizes])

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store pages, in order, up to the first that can't be; says whether all of them are there now."""
        given = _targets(keys, target_locations, target_sizes)
        for position, value in enumerate(values or ()):
            given[position] = given[position] if value is None else value
        if not keys or any(page is None for page in given):
            return False
        pages = [bytes_of(page.contiguous()) for page in given if page is not None]
        done = 0
        for nbytes, run in itertools.groupby(range(len(pages)), key=lambda i: pages[i].nbytes):
            places = list(run)

            def fill(position: int, memory: memoryview, places: list[int] = places) -> None:
                memory[:] = pages[places[position]]

            stored = self._pages().store([keys[i].encode() for i in places], nbytes, fill)
            done += stored
            if stored < len(places):
                break
        return done == len(keys)

    # ---- Keeping house

    def clear(self) -> bool:
        """Remove all pages of this model, layout and rank, for everybody who shares the cache."""
        try:
            for blocks in self._everything():
                blocks.clear()
        except KVStrataError as error:
            logger.warning("kvstrata could not clear its pages: %s", error)
            return False
        return True

    def stats(self) -> dict[str, Stats]:
        """Return the counters of each pool since the start, and the state of its breaker."""
        named = {_KV: self._blocks(), **{name: pages.blocks for name, pages in self._side.items()}}
        return {name: blocks.stats() for name, blocks in named.items()}

    def get_stats(self) -> Any:
        """Return what was moved since the last call, as SGLang's metrics want it; None if they are off."""
        if not self._config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            moved = {name: list(transfers) for name, transfers in self._transfers.items()}
            for transfers in self._transfers.values():
                transfers.clear()
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in moved["prefetch"]],
            backup_pgs=[pages for pages, _ in moved["backup"]],
            prefetch_bandwidth=[rate for _, rate in moved["prefetch"]],
            backup_bandwidth=[rate for _, rate in moved["backup"]],
        )

    def close(self) -> None:
        """Leave the cache; what was stored gets to the disk first."""
        self._cache.close()

    def _everything(self) -> list[EngineBlocks]:
        return [self._pages(), *(pages.blocks for pages in [self._kv, *self._side.values()] if pages is not None)]

    def _note(self, way: str, pages: Pages, count: int, started: float) -> None:
        if self._config.enable_storage_metrics and count:
            gigabytes = count * pages.nbytes / 1e9
            with self._lock:
                self._transfers[way].append((count, gigabytes / max(time.perf_counter() - started, 1e-9)))


def _name(name: Any) -> str:
    return str(getattr(name, "value", name))


def _is_split_by_heads(pool: Any) -> bool:
    return any(base.__name__ == "MHATokenToKVPoolHost" for base in type(pool).__mro__)


def _depth(extra_info: HiCacheStorageExtraInfo | None) -> int:
    """The place of a call's first page in its prefix, from 1 on; 0 where SGLang doesn't say it."""
    before = getattr(extra_info, "prefix_keys", None)
    return 0 if before is None else len(before) + 1


def _targets(keys: Sequence[str], locations: Any, sizes: Any) -> list[torch.Tensor | None]:
    """Tensors over the places given, which are tensors, or addresses with lengths; None where there is none."""
    places = list(locations) if locations is not None else [None] * len(keys)
    lengths = list(sizes) if sizes is not None else [None] * len(keys)
    return [_tensor(place, length) for place, length in zip(places, lengths, strict=True)]


def _tensor(place: Any, length: Any) -> torch.Tensor | None:
    if place is None or isinstance(place, torch.Tensor):
        return place
    return torch.frombuffer((ctypes.c_uint8 * int(length)).from_address(int(place)), dtype=torch.uint8)
