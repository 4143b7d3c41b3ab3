"""vLLM's KV connector: prefixes that were computed once, in this process or another, today or yesterday.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStrataConnector",
        "kv_connector_module_path": "kvstrata.integrations.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"path": "/var/cache/kv-vllm", "memory": "8GiB", "disk": "64GiB"}}'

docs/vllm.md has the options. It copies between vLLM's blocks in the CPU's memory and the cache. On an accelerator vLLM
itself moves blocks to the CPU, and kvstrata is a tier below that: `kvstrata.integrations.vllm_tier`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstrata.errors import ConfigError, UnknownOption
from kvstrata.integrations._blocks import let_go, share_for_engine
from kvstrata.integrations._vllm.groups import fails_in_blocks, groups_of
from kvstrata.integrations._vllm.metrics import KVStrataPromMetrics, KVStrataStats
from kvstrata.integrations._vllm.scheduler import Scheduler
from kvstrata.integrations._vllm.worker import Worker

__all__ = ["KVStrataConnector"]

_OPTIONS = ("weights", "load", "load_timeout", "prefill_tokens_per_s", "codec", "admission")
_SOURCES = CacheHitSource.HOST, CacheHitSource.DISK
_LOADS = ("ahead", "layerwise")
_LOAD_TIMEOUT_S = 30.0


class KVStrataConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """What `--kv-transfer-config` names. Raises ConfigError or UnsupportedModel at the start, and nothing later."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError(
                "a block that can't be loaded has to be computed, or its request would fail; "
                'add "kv_load_failure_policy": "recompute" to --kv-transfer-config'
            )
        groups = groups_of(kv_cache_config, vllm_config.cache_config.block_size)
        options = {"path": _default_path(), **transfer.kv_connector_extra_config}
        how = options.get("load", _LOADS[0])
        if how not in _LOADS:
            raise UnknownOption("load", how, _LOADS)
        alone = vllm_config.max_concurrent_batches == vllm_config.parallel_config.world_size == 1
        if how == "layerwise" and not alone:
            # What a step computes must not count before it is known how its loads went.
            raise ConfigError(
                '"load": "layerwise" is for one rank whose steps don\'t overlap: '
                "add --no-async-scheduling, or load ahead of the step"
            )
        if how == "layerwise" and not fails_in_blocks(groups):
            # vLLM takes back what a request has computed only for such models.
            raise ConfigError(
                '"load": "layerwise" is for models all of whose layers see all tokens; load ahead of the step, or add '
                "--disable-hybrid-kv-cache-manager"
            )
        timeout = options.get("load_timeout", _LOAD_TIMEOUT_S)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
            raise ConfigError(f"load_timeout is a number of seconds above 0, not {timeout!r}")
        weights = options.get("weights")
        namespace = {name: options[name] for name in ("codec", "admission") if name in options}
        self._cache: Any = share_for_engine(options, known=_OPTIONS)
        self._worker: Worker | None = None
        self._scheduler: Scheduler | None = None
        if role == KVConnectorRole.WORKER:
            self._worker = Worker(self._cache, vllm_config, kv_cache_config, groups, weights=weights, timeout=timeout,
                                  namespace_options=namespace)  # fmt: skip
        else:
            self._scheduler = Scheduler(
                self._cache, vllm_config, groups, layerwise=how == "layerwise",
                with_step=alone and fails_in_blocks(groups), reads=transfer.is_kv_consumer,
                writes=transfer.is_kv_producer, prefill_tokens_per_s=options.get("prefill_tokens_per_s"),
                namespace_options=namespace,
            )  # fmt: skip

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that doesn't happen is a miss later, and nothing else."""
        return False

    @property
    def _work(self) -> Any:
        return self._get_connector_metadata()

    @property
    def _here(self) -> Worker:
        assert self._worker is not None
        return self._worker

    @property
    def _plan(self) -> Scheduler:
        assert self._scheduler is not None
        return self._scheduler

    # ---- In a worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take the engine's KV memory."""
        self._here.register(kv_caches)

    def get_handshake_metadata(self) -> Any:
        """Tell the scheduler where this rank's parts of blocks are."""
        return self._here.rank()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Before blocks are written: no store may be reading them any more."""
        self._here.fence(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the step's loads."""
        self._here.start_loads(self._work)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return when a layer of what is loaded with this step is there."""
        self._here.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: blocks are stored when all layers are there."""

    def wait_for_save(self) -> None:
        """Begin to store what the step has computed, and wait for nothing."""
        self._here.start_stores(self._work)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the requests whose loads have ended, and those that have to be computed from their beginning."""
        ended, failed = self._here.finished(finished_req_ids, idle=self._work.idle)
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that have to be computed after all, where that doesn't concern a request as a whole."""
        return self._here.take_failed()

    def build_connector_worker_meta(self) -> Any:
        """Tell the scheduler which stores have ended."""
        return self._here.take_progress()

    # ---- In the scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Learn where all ranks keep their parts of blocks."""
        self._plan.meet([metadata[rank] for rank in sorted(metadata)])

    def on_new_request(self, request: Any) -> None:
        """Begin to follow a request."""
        self._plan.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens behind those can be loaded, and whether before the step that needs them."""
        return self._plan.match(request, num_computed_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Say how many tokens come from memory, and how many from disk."""
        tokens = self._plan.sources(request, num_external_tokens)
        return {source: count for source, count in zip(_SOURCES, tokens, strict=True) if count}

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan a load into the blocks that a request was given."""
        self._plan.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Return what the step brings for the workers."""
        return self._plan.work(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Hear from the workers."""
        if connector_output.invalid_block_ids:
            self._plan.failed(connector_output.invalid_block_ids)
        self._plan.failed_as_a_whole(connector_output.failed_recving)
        self._plan.heard(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. Its blocks may go: what still reads them is fenced off before they are written."""
        self._plan.ended(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, for the blocks of all groups."""
        return self.request_finished(request, [])

    def take_events(self) -> Iterable[Any]:
        """Return which blocks were stored in all ranks, medium "kvstrata"."""
        return self._plan.events()

    def has_pending_push_work(self) -> bool:
        """Whether the engine should go on for the sake of events."""
        return self._plan.telling

    def reset_cache(self) -> bool:
        """Use nothing any more of what was stored up to now: see docs/vllm.md."""
        self._plan.reset()
        return True

    # ---- In both

    def get_kv_connector_stats(self) -> KVStrataStats | None:
        """Return what was counted since it was last asked."""
        return self._worker.take_stats() if self._worker else self._plan.stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVStrataStats:
        """Return counts that came from another process."""
        return KVStrataStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> KVStrataPromMetrics:
        """Return the counters for Prometheus."""
        return KVStrataPromMetrics(*args)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether Python has to run between layers."""
        return bool(extra_config.get("load") == "layerwise")

    def shutdown(self) -> None:
        """End, in a bounded time."""
        if self._cache is None:
            return
        if self._worker is not None:
            self._worker.close()
        cache, self._cache = self._cache, None
        let_go(cache)


def _default_path() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return str(Path(base).expanduser() / "kvstrata" / "vllm")
