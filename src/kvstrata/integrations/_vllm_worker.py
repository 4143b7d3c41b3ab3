"""The connector's side in a worker of vLLM: copies blocks between the engine's KV memory and the cache.

Threads of its own do it. A store reads the engine's own memory while that computes; before a block is used for
something else, the store gets a moment to end, and is withdrawn otherwise. A load that takes too long is abandoned: its
blocks are reported as failed, and computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstrata.cache import Cache
from kvstrata.integrations._blocks import EngineBlocks
from kvstrata.integrations._vllm_memory import BlockMemory
from kvstrata.integrations._vllm_messages import Progress, Shard, Work
from kvstrata.integrations._vllm_metrics import Deltas, KVStrataStats
from kvstrata.integrations._vllm_model import model_facts, weights_identity
from kvstrata.integrations._vllm_transfers import Loading, Storing

__all__ = ["Worker"]

_LOADERS = 2  # so that one load that waits for a disk does not keep all others waiting
_FENCE_S = 0.1  # for stores whose blocks are about to be overwritten, in one step
_CLOSE_S = 5.0  # for stores that are left at the end


class Worker:
    """One rank. Calls come from the engine's thread; `timeout` bounds a load in seconds."""

    def __init__(self, cache: Cache, vllm_config: Any, kv_cache_config: Any, *, weights: str | None, timeout: float,
                 namespace_options: Mapping[str, Any]) -> None:  # fmt: skip
        self._cache = cache
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._weights = weights
        self._timeout = timeout
        self._namespace_options = namespace_options
        self._loader = ThreadPoolExecutor(_LOADERS, "kvstrata-load")
        self._storer = ThreadPoolExecutor(1, "kvstrata-store")
        self._loading: list[Loading] = []
        self._layerwise: list[Loading] = []
        self._storing: list[Storing] = []
        self._failed: set[int] = set()
        self._spoiled = False  # the step computes with blocks that could not be loaded, and will be repeated
        self._heads: dict[str, int] = {}  # of requests: how many blocks are stored, in the storer's thread
        self._deltas = Deltas()
        self.events = bool(vllm_config.kv_events_config and vllm_config.kv_events_config.enable_kv_cache_events)

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Take the engine's KV memory; raises UnsupportedModel where its blocks can't be copied."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        self.memory = BlockMemory(kv_caches, self._kv_cache_config.num_blocks)
        layers = self._vllm_config.compilation_config.static_forward_context
        facts = {
            **model_facts(self._vllm_config, self._weights or weights_identity(self._cache, self._vllm_config)),
            "block": f"{self._vllm_config.cache_config.block_size} {self._kv_cache_config.kv_cache_layout}",
            "layers": self.memory.layout,
            "backends": sorted({_backend(layers[name]) for name in kv_caches if name in layers}),
            "tp rank": get_tp_group().rank_in_group,
            "pp rank": get_pp_group().rank_in_group,
        }
        tensor = self.memory.tensor
        self.blocks = EngineBlocks(self._cache, "vllm", facts, tensor=tensor, **self._namespace_options)

    def shard(self) -> Shard:
        """Tell the scheduler where this rank's parts of blocks are."""
        return Shard(self.blocks.name, self.memory.block_bytes, self.memory.tensor)

    # ---- Each step

    def fence(self, work: Work) -> None:
        """Before the step writes to blocks: see to it that no store reads them any more."""
        until = time.monotonic() + _FENCE_S
        for storing in self._storing:
            if not storing.ended.is_set() and not work.fresh.isdisjoint(storing.store.blocks):
                storing.ended.wait(max(0.0, until - time.monotonic()))
                storing.withdraw(work.fresh)

    def start_loads(self, work: Work) -> None:
        """Begin the step's loads."""
        for load in work.loads:
            loading = Loading(load, self.blocks, self.memory, time.monotonic() + self._timeout)
            (self._layerwise if work.layerwise else self._loading).append(loading)
            self._loader.submit(loading.run_layerwise if work.layerwise else loading.run)

    def wait_for_layer(self, name: str) -> None:
        """Return when a layer is there, or all that is missing of it was reported."""
        if not self._layerwise:
            return
        layer = self.memory.layer_of.get(name, self.memory.layers - 1)
        for loading in self._layerwise:
            loading.wait_for(layer)
        if layer == self.memory.layers - 1:
            self._end_layerwise()

    def start_stores(self, work: Work) -> None:
        """Begin to store what the step has computed."""
        self._end_layerwise()  # of layers that asked for nothing
        spoiled, self._spoiled = self._spoiled, False
        for store in work.stores:
            if spoiled:
                self.blocks.unstored(len(store.keys))
                continue
            storing = Storing(store)
            self._storing.append(storing)
            self._storer.submit(self._store, storing)

    def finished(self, requests: set[str]) -> set[str]:
        """Return the requests whose loads have ended, well or not; `requests` are done and forgotten."""
        for request in requests:
            self._storer.submit(self._heads.pop, request, None)
        now = time.monotonic()
        ended = [loading for loading in self._loading if loading.ended.is_set() or loading.abandon(now)]
        for loading in ended:
            self._loading.remove(loading)
            self._failed |= loading.failed
        return {loading.load.request for loading in ended}

    def take_failed(self) -> set[int]:
        """Return the blocks that could not be loaded since it was last asked."""
        failed, self._failed = self._failed, set()
        return failed

    def take_stats(self) -> KVStrataStats | None:
        """Return what was counted since it was last asked."""
        return self._deltas.of(self.blocks.stats())

    def take_progress(self) -> Progress | None:
        """Return which stores have ended since it was last asked, where somebody wants events of them."""
        ended = {storing.store.number: [storing.stored] for storing in self._storing if storing.ended.is_set()}
        if ended:
            self._storing = [storing for storing in self._storing if storing.store.number not in ended]
        return Progress(ended) if ended and self.events else None

    def close(self) -> None:
        """End: what is computed is stored, as far as that takes a moment."""
        until = time.monotonic() + _CLOSE_S
        for storing in self._storing:
            if not storing.ended.wait(max(0.0, until - time.monotonic())):
                storing.withdraw(set(storing.store.blocks))
        for loading in [*self._loading, *self._layerwise]:
            loading.abandon(float("inf"))
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._storer.shutdown(wait=True, cancel_futures=True)

    def _end_layerwise(self) -> None:
        loads, self._layerwise = self._layerwise, []
        for loading in loads:
            loading.wait_for(self.memory.layers - 1)
            self._failed |= loading.failed
            self._spoiled |= bool(loading.failed)

    # ---- In the storer's thread

    def _store(self, storing: Storing) -> None:
        store = storing.store
        try:
            if store.first <= self._heads.get(store.request, 0):  # else a block before is missing
                fill = storing.filled_by(self.memory.read)
                storing.stored = self.blocks.store(store.keys, self.memory.block_bytes, fill, depth=store.first + 1)
                self._heads[store.request] = store.first + storing.stored
            else:
                self.blocks.unstored(len(store.keys))
        finally:
            storing.ended.set()


def _backend(layer: Any) -> str:
    """How a layer's backend reads and writes KV, as far as its name says; on the CPU by which instructions, too."""
    backend = layer.get_attn_backend().get_name() if hasattr(layer, "get_attn_backend") else type(layer).__name__
    return f"{backend} {getattr(layer, 'isa', '')}"
