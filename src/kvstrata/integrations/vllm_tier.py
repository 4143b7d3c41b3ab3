"""A tier under vLLM's OffloadingConnector: vLLM moves blocks to the CPU's memory, kvstrata shares and keeps them.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStrataOffloadingConnector",
        "kv_connector_module_path": "kvstrata.integrations.vllm_tier", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 8589934592, "secondary_tiers": [{"type": "KVStrataTier",
                "module_path": "kvstrata.integrations.vllm_tier",
                "path": "/var/cache/kv-vllm-tier", "memory": "8GiB", "disk": "64GiB"}]}}'

The connector is vLLM's own and tells the tier vLLM's settings, on which KV depends.

Keys are vLLM's own hashes. They are the same in every process unless vLLM begins them with a random number: what it
does with an algorithm that isn't cryptographic, and older releases always, when PYTHONHASHSEED isn't set.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, wait
from typing import Any

import blake3
import numpy as np
import torch
import vllm
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import LookupResult, Medium, OffloadingCounterMetadata, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstrata.cache import Cache
from kvstrata.errors import ConfigError
from kvstrata.integrations._blocks import EngineBlocks, let_go, share_for_engine
from kvstrata.integrations._vllm.metrics import COUNTERS, Deltas
from kvstrata.integrations._vllm.model import LAYOUT_VERSION, model_facts, settings_of, weights_identity
from kvstrata.threads import thread_pool

__all__ = ["KVStrataOffloadingConnector", "KVStrataTier"]

log = logging.getLogger("kvstrata.vllm")
_OPTIONS = ("weights", "codec", "admission")
_UNTOLD = (
    "OffloadingConnector doesn't tell a tier vLLM's settings, so KV can't be told from that of other settings; use "
    '"kv_connector": "KVStrataOffloadingConnector", "kv_connector_module_path": "kvstrata.integrations.vllm_tier", or '
    'give a name that changes with weights and settings, in the entry of secondary_tiers: "weights": "NAME"'
)
_SEED = "set it to the same value for all processes that share the cache: export PYTHONHASHSEED=0"


class KVStrataOffloadingConnector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's OffloadingConnector, whose tiers see vLLM's settings while they are made."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with set_current_vllm_config(vllm_config):
            super().__init__(vllm_config, role, kv_cache_config)


class KVStrataTier(SecondaryTierManager):  # type: ignore[misc]
    """What `secondary_tiers` names. Its options are those of `kvstrata.open`, and `weights`, `codec`, `admission`.

    Raises ConfigError at the start, and nothing later. Everything but `drain_jobs` and `shutdown` returns at once.
    """

    medium = Medium.STORAGE

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str,
        backpressure_detector: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if not hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED") and "PYTHONHASHSEED" not in os.environ:
            raise ConfigError(f"vLLM's hashes differ from process to process where PYTHONHASHSEED isn't set; {_SEED}")
        if "path" not in options:
            raise ConfigError('a tier needs a directory: "path": "/var/cache/kv" in its entry of secondary_tiers')
        vllm_config, name = get_current_vllm_config_or_none(), options.get("weights")
        if vllm_config is None and not name:
            raise ConfigError(_UNTOLD)
        self._chunks: Any = np.asarray(primary_kv_view).view(np.uint8).reshape(-1, self._block_size_bytes)
        self._cache: Cache | None = share_for_engine(options, known=_OPTIONS)
        self._model = _model_facts(self._cache, offloading_spec.config.model.name, vllm_config, name)
        self._namespace = {name: options[name] for name in ("codec", "admission") if name in options}
        self._blocks: EngineBlocks | None = None  # once it is known how vLLM makes hashes
        self._off = False
        self._threads = thread_pool(1, "kvstrata-store"), thread_pool(2, "kvstrata-load")
        self._under_way: set[Future[None]] = set()
        self._results: queue.SimpleQueue[tuple[TransferJob, JobResult]] = queue.SimpleQueue()
        self._unreadable: dict[str, set[bytes]] = {}  # what each request was promised and could not be given
        self._deltas = Deltas()
        self._lookups = _RemoteLookups(self) if self._cache.tiers.remotes is not None else None

    # ---- Requests

    def on_new_request(self, req_context: Any) -> Any:
        """Have the blocks that are new stored."""
        self._begin()
        self._unreadable[req_context.req_id] = set()
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        """Forget a request."""
        self._unreadable.pop(req_context.req_id, None)
        if self._lookups:
            self._lookups.cleanup(req_context.req_id)

    def lookup(self, key: Any, req_context: Any) -> Any:
        """Say whether a chunk is there; where tiers elsewhere are asked, in a later step.

        A chunk that could not be read counts as absent for its request, which would wait for it again and again.
        """
        if self._begin() is None or key in self._unreadable.get(req_context.req_id, ()):
            return LookupResult.MISS
        there = self._lookups.lookup(key, req_context) if self._lookups else self.present([key])[0]
        return LookupResult.RETRY if there is None else LookupResult.HIT if there else LookupResult.MISS

    def present(self, keys: list[bytes]) -> list[bool]:
        """Say of each chunk whether it is there."""
        return self._blocks.present(keys) if self._blocks else [False] * len(keys)

    def on_schedule_end(self, context: Any) -> None:
        """Ask tiers elsewhere for what was looked up in this step."""
        if self._lookups:
            self._lookups.flush()

    def _begin(self) -> EngineBlocks | None:
        """Open the namespace of vLLM's hashes, once they are what they will be; None if they are of no use."""
        if self._blocks is None and not self._off and self._cache is not None:
            if _hashes_are_random():
                self._off = True
                log.error("kvstrata is switched off: vLLM's hashes begin with a random number in each process. "
                          "PYTHONHASHSEED isn't set; %s", _SEED)  # fmt: skip
                return None
            facts = self._model | _facts(self._offloading_spec.config)
            self._blocks = EngineBlocks(self._cache, "vllm-tier", facts, **self._namespace)
        return self._blocks

    # ---- Transfers

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Copy chunks from vLLM's memory, behind its back: it keeps them until told."""
        self._submit(0, job_metadata, self._store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Copy chunks to vLLM's memory."""
        self._submit(1, job_metadata, self._load)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return what has ended since it was last asked."""
        results = []
        while not self._results.empty():
            job, result = self._results.get()
            results.append(result)
            unreadable = self._unreadable.get(job.req_context.req_id)
            if job.is_promotion and not result.success and unreadable is not None:
                unreadable.update(set(job.keys).difference(result.successful_keys or ()))
        return results

    def has_pending_work(self) -> bool:
        """Whether something is under way, or wasn't told yet."""
        return bool(self._under_way) or not self._results.empty()

    def drain_jobs(self) -> None:
        """Return when nothing is under way."""
        wait(list(self._under_way))

    def _submit(self, which: int, job: TransferJob, run: Callable[[EngineBlocks, TransferJob], list[bool]]) -> None:
        started = time.monotonic()

        def work() -> None:
            got = [False] * len(job.keys)
            try:
                if self._blocks is not None:
                    got = run(self._blocks, job)
            finally:
                there = tuple(key for key, ok in zip(job.keys, got, strict=True) if ok)
                self._results.put((job, JobResult(
                    job.job_id, all(got), there if job.is_promotion and there and not all(got) else None,
                    time.monotonic() - started, len(there) * self._block_size_bytes,
                )))  # fmt: skip

        future = self._threads[which].submit(work)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)

    def _store(self, blocks: EngineBlocks, job: TransferJob) -> list[bool]:
        keys = list(job.keys)
        end = job.req_context.get_offload_key_position(keys[0]) if keys else None

        def fill(position: int, memory: memoryview) -> None:
            np.copyto(np.frombuffer(memory, np.uint8), self._chunks[job.chunk_ids[position]])

        depth = -(-end // self._tokens_per_chunk) if end else 0
        done = blocks.store(keys, self._block_size_bytes, fill, depth=depth)
        return [position < done for position in range(len(keys))]

    def _load(self, blocks: EngineBlocks, job: TransferJob) -> list[bool]:
        keys: Collection[bytes] = job.keys

        def take(position: int, memory: memoryview) -> bool:
            if memory.nbytes != self._block_size_bytes:
                return False
            np.copyto(self._chunks[job.chunk_ids[position]], np.frombuffer(memory, np.uint8))
            return True

        return blocks.load_each(list(keys), take)

    @property
    def _tokens_per_chunk(self) -> int:
        config = self._offloading_spec.config
        return int(max(group.tokens_per_block for group in config.groups) * config.cache.blocks_per_chunk)

    # ---- Figures, and the end

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return the counters for Prometheus."""
        return {
            f"vllm:kvstrata_{name}": OffloadingCounterMetadata(documentation=text) for name, text in COUNTERS.items()
        }

    def get_stats(self) -> Any:
        """Return what was counted since it was last asked."""
        counted = self._deltas.of(self._blocks.stats()) if self._blocks else None
        if counted is None:
            return None
        stats = OffloadingConnectorStats()
        for name, amount in counted.data.items():
            stats.increase_counter(f"vllm:kvstrata_{name}", amount)
        return stats

    def shutdown(self) -> None:
        """Finish what is under way, and let go of vLLM's memory and of the cache."""
        if self._cache is None:
            return
        if self._lookups:
            self._lookups.shutdown()
        for threads in self._threads:
            threads.shutdown(wait=True, cancel_futures=True)
        self._chunks = None
        cache, self._cache, self._blocks = self._cache, None, None
        let_go(cache)


class _RemoteLookups(AsyncLookupManager):  # type: ignore[misc]
    """Asks in the background: tiers elsewhere take their time."""

    def __init__(self, tier: KVStrataTier) -> None:
        super().__init__(tier_type=tier.tier_type)
        self._tier = tier

    def batch_lookup(self, keys: list[Any], req_context: Any) -> Iterable[bool]:
        """Say of each chunk whether it is there."""
        return self._tier.present(keys)


def _hashes_are_random() -> bool:
    """Whether vLLM's hashes begin with a number of this process's own."""
    if "PYTHONHASHSEED" in os.environ:
        return False
    return bool(kv_cache_utils.get_none_hash_seed() != kv_cache_utils.DEFAULT_NONE_HASH_SEED)


def _model_facts(cache: Cache, model: str, vllm_config: Any, name: str | None) -> dict[str, object]:
    """What KV depends on by model and settings. Without vLLM's own, `name` has to stand for what isn't in a file."""
    if vllm_config is not None:
        return model_facts(vllm_config, name or weights_identity(cache, vllm_config))
    return {
        "layout version": LAYOUT_VERSION, "vllm": vllm.__version__, "weights": name, "config": settings_of(model)
    }  # fmt: skip


def _facts(config: Any) -> dict[str, object]:
    """What a chunk depends on besides its hash and the model: all ranks' parts of it lie in one."""
    parallel = config.parallel
    seed = kv_cache_utils.get_none_hash_seed()
    return {
        "hashes": blake3.blake3(seed.encode()).hexdigest(),
        "kv dtype": config.model.dtype,
        "groups": [(group.tokens_per_block, group.layer_names) for group in config.groups],
        "bytes": config.worker_kv_bytes_per_block,
        "tokens": (config.cache.tokens_per_hash, config.cache.blocks_per_chunk),
        "layout": (config.kv_cache_layout, config.canonical_layout, config.replicated_layout),
        "sizes": (parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size),
        "platform": _platform(),
    }


def _platform() -> str:
    """What a backend's choice of layout may depend on."""
    if current_platform.is_cpu():
        return f"cpu {torch.backends.cpu.get_cpu_capability()} {torch.cpu._is_amx_tile_supported()}"
    return f"{current_platform.device_type} {current_platform.get_device_capability()}"
