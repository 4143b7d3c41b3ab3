"""The connector's side in a worker of vLLM: copies blocks between the engine's KV memory and the cache.

Threads of its own do it. A store reads the engine's own memory while that computes; before a block is used for
something else, the store gets a moment to end, and is withdrawn otherwise. A load that takes too long is abandoned: its
blocks are reported as failed, and computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvstrata.cache import Cache
from kvstrata.integrations._blocks import EngineBlocks
from kvstrata.integrations._vllm.groups import Group, fails_in_blocks
from kvstrata.integrations._vllm.memory import BlockMemory
from kvstrata.integrations._vllm.messages import Progress, Rank, Shard, Work
from kvstrata.integrations._vllm.metrics import Deltas, KVStrataStats, total
from kvstrata.integrations._vllm.model import model_facts, weights_identity
from kvstrata.integrations._vllm.transfers import Loading, Storing
from kvstrata.threads import thread_pool

__all__ = ["Worker"]

_LOADERS = 2  # so that one load that waits for a disk does not keep all others waiting
_FENCE_S = 0.1  # for stores whose blocks are about to be overwritten, in one step
_IDLE_S = 0.005  # for a load, when nothing is computed; a request that arrives meanwhile waits for it
_CLOSE_S = 5.0  # for stores that are left at the end


class Part(NamedTuple):
    """This rank's layers of a group."""

    memory: BlockMemory
    blocks: EngineBlocks


class Worker:
    """One rank. Calls come from the engine's thread; `timeout` bounds a load in seconds."""

    def __init__(self, cache: Cache, vllm_config: Any, kv_cache_config: Any, groups: Sequence[Group], *,
                 weights: str | None, timeout: float, namespace_options: Mapping[str, Any]) -> None:  # fmt: skip
        self._cache = cache
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._groups = groups
        self._fails_in_blocks = fails_in_blocks(groups)
        self.parts: dict[int, Part] = {}
        """What this rank has, by the numbers of groups; with pipeline parallelism it may have layers of some only."""
        self._weights = weights
        self._timeout = timeout
        self._namespace_options = namespace_options
        self._loader = thread_pool(_LOADERS, "kvstrata-load")
        self._storer = thread_pool(1, "kvstrata-store")
        self._loading: dict[str, list[Loading]] = {}  # of each request, which waits for all of them
        self._with_step: list[Loading] = []
        self._storing: list[Storing] = []
        self._failed: set[int] = set()
        self._spoiled = False  # the step computes with blocks that could not be loaded, and will be repeated
        self._heads: dict[str, dict[int, int]] = {}  # of requests: blocks of each group stored, in the storer's thread
        self._deltas = Deltas()
        self.events = bool(vllm_config.kv_events_config and vllm_config.kv_events_config.enable_kv_cache_events)

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Take the engine's KV memory; raises UnsupportedModel where its blocks can't be copied."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        common = {
            **model_facts(self._vllm_config, self._weights or weights_identity(self._cache, self._vllm_config)),
            "block": f"{self._vllm_config.cache_config.block_size} {self._kv_cache_config.kv_cache_layout}",
            "tp rank": get_tp_group().rank_in_group,
            "pp rank": get_pp_group().rank_in_group,
        }
        layers = self._vllm_config.compilation_config.static_forward_context
        for number, group in enumerate(self._groups):
            # Groups lie in the same memory, in different blocks of it. What is in none shares the KV of another layer.
            alone = len(self._groups) == 1
            tensors = {name: tensor for name, tensor in kv_caches.items() if alone or name in group.layers}
            if not tensors:
                continue
            memory = BlockMemory(tensors, self._kv_cache_config.num_blocks)
            facts = {
                **common,
                "layers": memory.layout,
                "window": group.window,
                "backends": sorted({_backend(layers[name]) for name in tensors if name in layers}),
            }
            blocks = EngineBlocks(self._cache, "vllm", facts, tensor=memory.tensor, **self._namespace_options)
            self.parts[number] = Part(memory, blocks)

    def rank(self) -> Rank:
        """Tell the scheduler where this rank's parts of blocks are."""
        return Rank([
            Shard(number, blocks.name, memory.block_bytes, memory.tensor)
            for number, (memory, blocks) in self.parts.items()
        ])  # fmt: skip

    # ---- Each step

    def fence(self, work: Work) -> None:
        """Before the step writes to blocks: see to it that no store reads them any more."""
        until = time.monotonic() + _FENCE_S
        for storing in self._storing:
            if not storing.ended.is_set() and not work.fresh.isdisjoint(storing.store.blocks):
                storing.ended.wait(max(0.0, until - time.monotonic()))
                storing.withdraw(work.fresh)

    def start_loads(self, work: Work) -> None:
        """Begin the step's loads; those that come with it as a whole have ended then."""
        for load in work.loads:
            loads = self._with_step if load.with_step else self._loading.setdefault(load.request, [])
            if load.group in self.parts:
                memory, blocks = self.parts[load.group]
                loading = Loading(load, blocks, memory, time.monotonic() + self._timeout)
                loads.append(loading)
                if work.layerwise:
                    self._loader.submit(loading.run_layerwise)
                elif load.with_step:
                    loading.run_at_once()
                else:
                    self._loader.submit(loading.run)

    def wait_for_layer(self, name: str) -> None:
        """Return when a layer is there, or it is known to be missing."""
        if not self._with_step:
            return
        memory = self.parts[0].memory
        layer = memory.layer_of.get(name, memory.layers - 1)
        for loading in self._with_step:
            loading.wait_for(layer)

    def start_stores(self, work: Work) -> None:
        """Begin to store what the step has computed."""
        self._end_step()
        spoiled, self._spoiled = self._spoiled, False
        for store in work.stores:
            if store.group not in self.parts:
                continue
            storing = Storing(store)
            self._storing.append(storing)
            if spoiled:
                self.parts[store.group].blocks.unstored(len(store.keys))
                storing.ended.set()  # with nothing stored, which those hear who wait for it
            else:
                self._storer.submit(self._store, storing)

    def finished(self, requests: set[str], *, idle: bool) -> tuple[set[str], set[str]]:
        """Return the requests whose loads have ended, and those of them that have to be computed from the beginning.

        `requests` are done and forgotten; what is still being loaded for them is given up. An engine that is `idle`
        asks again and again: it is kept waiting for a load a moment, in which the cores are left to that.
        """
        for request in requests:
            self._storer.submit(self._heads.pop, request, None)
            for loading in self._loading.get(request, ()):
                loading.abandon(float("inf"))
        if idle:
            under_way = [loading for loads in self._loading.values() for loading in loads]
            if under_way and not any(loading.ended.is_set() for loading in under_way):
                under_way[0].ended.wait(_IDLE_S)
        now = time.monotonic()
        ended: set[str] = set()
        failed: set[str] = set()
        for request, loads in list(self._loading.items()):
            if all(loading.ended.is_set() or loading.abandon(now) for loading in loads):
                del self._loading[request]
                ended.add(request)
                missing = set().union(*(loading.failed for loading in loads))
                if self._fails_in_blocks:
                    self._failed |= missing
                elif missing:
                    failed.add(request)
        return ended, failed

    def take_failed(self) -> set[int]:
        """Return the blocks that could not be loaded since it was last asked, where requests don't fail as a whole.

        Where tokens are drafted vLLM asks before it drafts, whose layers may be the last ones, and before it stores.
        """
        self._end_step()
        failed, self._failed = self._failed, set()
        return failed

    def take_stats(self) -> KVStrataStats | None:
        """Return what was counted since it was last asked."""
        return self._deltas.of(total(blocks.stats() for _, blocks in self.parts.values()))

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
        for loading in [*(loading for loads in self._loading.values() for loading in loads), *self._with_step]:
            loading.abandon(float("inf"))
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._storer.shutdown(wait=True, cancel_futures=True)

    def _end_step(self) -> None:
        loads, self._with_step = self._with_step, []
        for loading in loads:
            loading.wait_for(self.parts[0].memory.layers - 1)
            self._failed |= loading.failed
            self._spoiled |= bool(loading.failed)

    # ---- In the storer's thread

    def _store(self, storing: Storing) -> None:
        store = storing.store
        memory, blocks = self.parts[store.group]
        heads = self._heads.setdefault(store.request, {})
        windowed = self._groups[store.group].window is not None  # then what lies behind a hole is of use
        try:
            if windowed or store.first <= heads.get(store.group, 0):  # else a block before is missing
                storing.stored = blocks.store(
                    store.keys,
                    memory.block_bytes,
                    storing.filled_by(memory.read),
                    depth=store.first + 1,
                    holes=windowed,
                )
                heads[store.group] = store.first + storing.stored
            else:
                blocks.unstored(len(store.keys))
        finally:
            storing.ended.set()


def _backend(layer: Any) -> str:
    """How a layer's backend reads and writes KV, as far as its name says; on the CPU by which instructions, too."""
    backend = layer.get_attn_backend().get_name() if hasattr(layer, "get_attn_backend") else type(layer).__name__
    return f"{backend} {getattr(layer, 'isa', '')}"
