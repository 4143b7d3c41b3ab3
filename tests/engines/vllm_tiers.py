"""A tier as vLLM makes it at its start, under vLLM's manager of tiers and without an engine, for the tests."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from engines.vllm_control import BLOCK
from kvstrata.integrations.vllm_tier import KVStrataTier

CHUNKS, CHUNK_BYTES = 8, 4096
KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(4)]
STEPS = 10  # in which every lookup has to end; two are enough

_STEP = ScheduleEndContext(new_req_ids=[], preempted_req_ids=())


def settings(model: str, **options: Any) -> VllmConfig:
    """What vLLM makes of its arguments."""
    return EngineArgs(model, **{"dtype": "float32", "max_model_len": 2048, **options}).create_engine_config()


class Tier:
    """A tier of chunks that hold their numbers. `config`: vLLM's settings, where the connector tells them."""

    def __init__(
        self, model: str, path: str, *, hash_name: str = "sha256", config: VllmConfig | None = None, **options: Any
    ) -> None:
        groups = (SimpleNamespace(tokens_per_block=BLOCK, layer_names=("layer",)),)
        sizes = SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)
        spec = SimpleNamespace(
            model=SimpleNamespace(name=model, dtype="float32"), groups=groups, worker_kv_bytes_per_block=CHUNK_BYTES,
            cache=SimpleNamespace(tokens_per_hash=BLOCK, blocks_per_chunk=1), parallel=sizes, kv_cache_layout="LBHNC",
            canonical_layout=False, replicated_layout=False,
        )  # fmt: skip
        memory = memoryview(bytearray(CHUNKS * CHUNK_BYTES)).cast("b", (CHUNKS, CHUNK_BYTES))
        np.asarray(memory)[:] = np.arange(CHUNKS, dtype=np.int8)[:, None]
        region = SimpleNamespace(create_kv_memoryview=lambda: memory, cleanup=lambda: None)
        with set_current_vllm_config(config) if config else contextlib.nullcontext():
            self.tier = KVStrataTier(
                SimpleNamespace(config=spec), memory, "KVStrataTier", path=path, memory="8MiB", **options
            )
        self.manager = TieringOffloadingManager(CPUPrimaryTierOffloadingManager(CHUNKS, region), [self.tier])
        self._hash_name = hash_name

    def begin(self) -> str:
        """Let a request come, as vLLM does when it has chosen how to make hashes; returns what is logged."""
        told = io.StringIO()
        handler = logging.StreamHandler(told)
        logging.getLogger("kvstrata.vllm").addHandler(handler)
        self.arrive("one")
        logging.getLogger("kvstrata.vllm").removeHandler(handler)
        self.close()
        return told.getvalue()

    def name(self) -> str:
        """The name of the namespace, which everything that KV depends on is in; ends the tier."""
        self.arrive("one")
        assert self.tier._blocks is not None
        found = self.tier._blocks.name
        self.close()
        return found

    def arrive(self, name: str) -> ReqContext:
        """Let a request come."""
        kv_cache_utils.init_none_hash(get_hash_fn_by_name(self._hash_name))
        request = ReqContext(name)
        self.manager.on_new_request(request)
        return request

    def store(self) -> None:
        """Store KEYS, leave them on disk only, and let vLLM's own memory forget them."""
        request = self.arrive("writer")
        assert self.manager.prepare_store(KEYS, request) is not None
        self.manager.complete_store(KEYS, request, True)
        self.tier.drain_jobs()
        self.manager.on_schedule_end(_STEP)
        self.manager.on_request_finished(request)
        self.cache.flush()
        self.cache.demote()
        self.manager.reset_cache()

    def look_up(self, name: str) -> list[str]:
        """What a request is told of KEYS in the end: HIT, MISS, or what it still waits for after STEPS."""
        request = self.arrive(name)
        for _ in range(STEPS):
            answers = [self.manager.lookup(key, request) for key in KEYS]
            if {*answers} <= {LookupResult.HIT, LookupResult.MISS}:
                break
            self.manager.on_schedule_end(_STEP)
            self.tier.drain_jobs()
        self.manager.on_request_finished(request)
        return [answer.name for answer in answers]

    def answer_at_once(self) -> str:
        """What the tier says of a chunk in the step that asks for it."""
        return self.tier.lookup(KEYS[0], self.arrive("asking")).name

    def break_reads(self, broken: bool) -> None:
        """Let the disk fail so often that it isn't asked any more, until it is time to see whether it's back."""
        breaker = self.cache.below.tier._reading
        breaker._clock = (lambda: 0.0) if broken else time.monotonic
        while broken and breaker.state == "closed":
            breaker.failure("EIO", "a read failed")

    @property
    def cache(self) -> Any:
        return self.tier._cache

    def close(self) -> None:
        """End it."""
        self.manager.shutdown()


def forget_default_seed() -> None:
    """Be a vLLM whose hashes always begin with a random number."""
    del kv_cache_utils.DEFAULT_NONE_HASH_SEED
