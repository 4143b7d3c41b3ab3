"""A vLLM engine in a process of its own, for the tests: everything it does is done here, on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # threads that wait for one another by spinning take minutes beside other work
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # so that the connector can be looked into
    VLLM_HOST_IP="127.0.0.1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

import msgspec
import numpy as np
import torch
import vllm
import zmq
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.lora.request import LoRARequest
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, KVCacheSpec, MambaSpec
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import Request

from engines.vllm_control import BLOCK, KV_BYTES_PER_TOKEN
from kvstrata.demo.texts import handbook
from kvstrata.integrations._vllm.keys import RequestKeys, seed_of
from kvstrata.integrations.vllm import KVStrataConnector
from kvstrata.movement.cost import Prefill

BLOCK_BYTES = BLOCK * KV_BYTES_PER_TOKEN
LIMIT_S = 60.0


def connector(path: str, **options: Any) -> dict[str, Any]:
    """The value of --kv-transfer-config."""
    return {
        "kv_connector": "KVStrataConnector",
        "kv_connector_module_path": "kvstrata.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"path": path, "memory": "192MiB", "disk": "512MiB", **options},
    }


def tier(path: str, **options: Any) -> dict[str, Any]:
    """The same with vLLM's OffloadingConnector and a tier under it."""
    module = "kvstrata.integrations.vllm_tier"
    below = {"type": "KVStrataTier", "module_path": module, "path": path, "memory": "192MiB", "disk": "512MiB"}
    config = offloading([{**below, **options}])
    return {**config, "kv_connector": "KVStrataOffloadingConnector", "kv_connector_module_path": module}


def offloading(tiers: list[dict[str, Any]], cpu_bytes: int = 128 << 20) -> dict[str, Any]:
    """vLLM's OffloadingConnector over those tiers."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CPUTieringSpec",
            "spec_module_path": "engines.vllm_offloading",
            "cpu_bytes_to_use": cpu_bytes,
            "secondary_tiers": tiers,
        },
    }


def import_all() -> None:
    """Import what vLLM imports only when an engine is made."""
    for name in ("engine.core", "engine.llm_engine", "worker.cpu_worker", "attention.backends.cpu_attn"):
        importlib.import_module(f"vllm.v1.{name}")
    importlib.import_module("vllm.model_executor.models.llama")
    importlib.import_module("vllm.model_executor.model_loader.default_loader")


class Engine:
    """An engine with SmolLM2 in fp32, in which equal prompts mean equal tokens."""

    def __init__(self, model: str, *, kv_tokens: int = 8192, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "dtype": "float32", "enforce_eager": True, "block_size": BLOCK, "max_model_len": 2048,
            "kv_cache_memory_bytes": kv_tokens * KV_BYTES_PER_TOKEN, "disable_log_stats": False, "seed": 0,
        }  # fmt: skip
        self._document: list[int] | None = None
        self.llm = vllm.LLM(model, **defaults | options)
        self.core: Any = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]

    def prompt(self, start: int, length: int, question: str = "What follows from this?") -> list[int]:
        """Tokens of the demo's document from one on, and a question about them."""
        if self._document is None:
            text = handbook()
            self._document = self.llm.get_tokenizer().encode(text)
        tail = self.llm.get_tokenizer().encode(f"\n\nQuestion: {question}\nAnswer:")
        return [*self._document[start : start + length], *tail]

    def tokens(self, *prompts: list[int], count: int = 8, salt: str = "", lora: str = "") -> list[list[int]]:
        """The greedy continuations of prompts that come at the same time."""
        given: list[Any] = [
            {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})} for prompt in prompts
        ]
        adapter = LoRARequest(Path(lora).name, 1 + sum(lora.encode()), lora) if lora else None
        outputs = self.llm.generate(given, _sampling(count), use_tqdm=False, lora_request=adapter)
        self.settle()
        return [list(output.outputs[0].token_ids) for output in outputs]

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    # ---- Its connector

    @property
    def worker(self) -> Any:
        return get_kv_transfer_group()._worker

    @property
    def tier(self) -> Any:
        """The tier, where vLLM's own connector is used; else None."""
        scheduler = getattr(self.core.scheduler.connector, "connector_scheduler", None)
        return scheduler and scheduler.manager.secondary_tiers[0]

    @property
    def sides(self) -> list[Any]:
        """All that count."""
        if self.tier:
            return [self.tier._blocks] if self.tier._blocks else []
        scheduled = (blocks for parts in self.core.scheduler.connector._scheduler._ranks for blocks in parts)
        return [*(blocks for _, blocks in self.worker.parts.values()), *scheduled]

    @property
    def cache(self) -> Any:
        return self.sides[0].cache

    def settle(self) -> None:
        """Wait until everything that was computed is stored."""
        deadline = time.monotonic() + LIMIT_S
        while self.core.scheduler.has_requests():
            assert time.monotonic() < deadline, "the engine goes on with nothing to do"
            self.llm.llm_engine.step()
        if self.core.scheduler.connector is not None and not self.tier and has_kv_transfer_group():
            self.worker._storer.submit(lambda: None).result(LIMIT_S)

    def counts(self) -> dict[str, int]:
        """What the connector has counted up to now."""
        total: dict[str, int] = {}
        for blocks in self.sides:
            for name, value in blocks.stats().items():
                if isinstance(value, int):
                    total[name] = total.get(name, 0) + value
        return total

    def keys(self, prompt: list[int]) -> list[bytes]:
        """The keys of a prompt's blocks, without an adapter and a salt."""
        if self.tier:
            return [make_offload_key(name, 0) for name in self._hashes(prompt)]
        seed = seed_of(adapter="", salt="", generation="")
        return RequestKeys(seed, BLOCK).upto(prompt, len(prompt) // BLOCK)

    def _hashes(self, prompt: list[int]) -> list[Any]:
        """vLLM's own names of a prompt's blocks."""
        parameters = vllm.SamplingParams(max_tokens=1)
        request = Request("keys", prompt, parameters, None, block_hasher=self.core.request_block_hasher)
        return list(request.block_hashes)

    def kv(self, prompt: list[int]) -> list[float]:
        """Some of the numbers of a prompt's first block, as the engine has it."""
        (request_blocks,) = self.core.scheduler.kv_cache_manager.coordinator.single_type_managers
        name = self._hashes(prompt)[0]
        (block,) = request_blocks.block_pool.get_cached_block(name, [0])
        memory = self.worker.parts[0].memory
        data = bytearray(memory.block_bytes)
        memory.read(block.block_id, memoryview(data))
        return [float(number) for number in np.frombuffer(data, np.float32)[::97]]

    def bytes_on_disk(self) -> int:
        """How many bytes the blocks of this engine have there."""
        ns = self.sides[0].ns
        return int(self.cache.stats()["namespaces"][ns.name]["disk_bytes"])

    def to_disk(self) -> None:
        """Leave everything on disk only."""
        self.cache.flush()
        self.cache.demote()

    def windows(self) -> list[int | None]:
        """Of each group of layers, how many tokens these see; None: all."""
        return [group.window for group in self.core.scheduler.connector._scheduler._groups]

    def spoil_unused(self) -> None:
        """Write nonsense to the block that vLLM puts where nobody looks."""
        memory = self.worker.parts[0].memory
        memory.write([(0, memoryview(np.full(memory.block_bytes // 4, 5, np.float32)).cast("B"))])

    def remove(self, key: bytes, group: int) -> None:
        """Remove a record."""
        assert self.worker.parts[group].blocks.delete([key]) == 1

    def computes_at(self, tokens_per_s: float | None) -> None:
        """Let the connector take the model to be that fast."""
        self.core.scheduler.connector._scheduler._prefill = Prefill(tokens_per_s)

    def damage(self, key: bytes, group: int = 0) -> None:
        """Change a byte in the middle of a record on disk."""
        ns = self.sides[group].ns
        nbytes = BLOCK_BYTES if self.tier else self.worker.parts[group].memory.block_bytes
        (at,) = self.cache.tiers.memory.store.find_on_disk(ns._space.id, [key])
        path = self.cache.below.tier._segments.path_of(at[2])
        with Path(path).open("r+b") as file:
            file.seek(at[3] + nbytes // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            os.fsync(file.fileno())

    def break_loads(self, broken: bool) -> None:
        """Let the cache find blocks and not be able to load them."""
        space = self.worker.parts[0].blocks.ns
        if broken:
            self._real = space._space
            space._space = _Unreadable(space._space)
        else:
            space._space = self._real

    def metrics(self, wanted: str = "vllm:kvstrata_loaded_blocks") -> dict[str, float]:
        """kvstrata's counters as Prometheus gets them, once the wanted one counts."""
        found: dict[str, float] = {}
        deadline = time.monotonic() + LIMIT_S
        while not found.get(wanted) and time.monotonic() < deadline:
            self.llm.generate([{"prompt_token_ids": [5, 6]}], _sampling(1), use_tqdm=False)  # a step, which brings them
            found = {item.name: item.value for item in self.llm.get_metrics() if "kvstrata" in item.name}  # type: ignore
        return found

    def events_of(self, prompt: list[int]) -> list[dict[str, Any]]:
        """What vLLM publishes of the blocks of a prompt that are stored, anywhere."""
        address = self.llm.llm_engine.vllm_config.kv_events_config.endpoint
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.subscribe("")
            socket.connect(address)
            decoder = msgspec.msgpack.Decoder(KVEventBatch)
            while not socket.poll(50):  # until it is connected
                self.tokens(list(range(100, 100 + BLOCK + 1)))
                self.forget()
            while socket.poll(500):
                socket.recv_multipart()
            self.tokens(prompt, count=1)
            self.tokens([5, 6, 7])  # a step more, which hears from the worker
            events: list[Any] = []
            while socket.poll(500):
                events += decoder.decode(socket.recv_multipart()[-1]).events
        return [msgspec.structs.asdict(event) for event in events if isinstance(event, BlockStored)]

    def reset_all(self) -> None:
        """Reset the engine's own cache and the connector."""
        assert self.llm.reset_prefix_cache(reset_connector=True)

    def preemptions(self) -> int:
        """How often a request lost its blocks."""
        return int(next(item.value for item in self.llm.get_metrics() if item.name == "vllm:num_preemptions"))  # type: ignore

    def evicted(self) -> int:
        """How many records have left the cache's memory."""
        return int(self.cache.stats()["memory"]["evictions"])

    def flush(self) -> None:
        """Wait until everything is on disk."""
        self.cache.flush()

    def attach(self, *, overlapping: bool = False, spec: str | None = None, **changes: Any) -> None:
        """Make another connector as vLLM does at its start, with other settings or another kind of layers."""
        config = copy.copy(self.llm.llm_engine.vllm_config)
        config.kv_transfer_config = dataclasses.replace(config.kv_transfer_config, **changes)
        if overlapping:  # steps, as on accelerators
            config.scheduler_config = copy.copy(config.scheduler_config)
            config.scheduler_config.async_scheduling = True
        layers = copy.deepcopy(self.core.scheduler.kv_cache_config)
        if spec is not None:
            layers.kv_cache_groups[-1].kv_cache_spec = _SPECS[spec]
        KVStrataConnector(config, KVConnectorRole.SCHEDULER, layers)


_SPECS: dict[str, KVCacheSpec] = {
    "recurrent": MambaSpec(block_size=BLOCK, shapes=((1,),), dtypes=(torch.float32,)),
    "chunked": ChunkedLocalAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32, attention_chunk_size=64
    ),
    "larger blocks": FullAttentionSpec(block_size=2 * BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32),
}


class _Unreadable:
    """The native part of a namespace from which nothing can be pinned."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def pin_many(self, keys: Sequence[bytes], **options: Any) -> tuple[list[None], list[int]]:
        return [None] * len(keys), []


def _sampling(count: int) -> Any:
    return vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
