"""SGLang's own host pools and cache controller, on the CPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any
from unittest.mock import MagicMock

import torch


class _Torchvision:
    """Stands for torchvision where there is none that fits the torch: SGLang imports it along with models of images."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _anything  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("torchvision") is None:
        from transformers.utils.import_utils import is_torchvision_available

        is_torchvision_available()  # it must not be taken for the real one: the answer is kept
        sys.meta_path.append(_Torchvision())  # type: ignore[arg-type]
    from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation, StorageOperation
    from sglang.srt.mem_cache.device_pool_info import MLABufferInfo
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
    from sglang.srt.mem_cache.storage import StorageBackendFactory
    from sglang.srt.mem_cache.storage.mooncake_store import test_mooncake_store
    from sglang.srt.observability.metrics_collector import StorageMetrics
    from sglang.srt.runtime_context import get_context

__all__ = [
    "PAGE", "Controller", "StorageMetrics", "backend", "config", "indices_of", "mha_pool", "mla_pool", "page_of",
    "randomize", "server", "test_mooncake_store",
]  # fmt: skip

PAGE, LAYERS, HEADS, DIM = 16, 3, 2, 32
TOKENS = 32 * PAGE
CPU = torch.device("cpu")


def mha_pool(layout: str = "page_first", dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS) -> Any:
    """SGLang's host pool of a model with K and V in heads."""
    device = MHATokenToKVPool(PAGE, PAGE, dtype, HEADS, DIM, LAYERS, "cpu", enable_memory_saver=False)
    (info,) = (described.buffer_info for described in device.get_device_pool_infos())
    with host_memory_budget_scope(1 << 30):  # else it wants 10 GiB to stay free
        return MHATokenToKVPoolHost(
            info, 0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=PAGE, start_layer=0, end_layer=LAYERS,
            host_token_capacity=tokens,
        )  # fmt: skip


def mla_pool(layout: str = "page_first") -> Any:
    """SGLang's host pool of a model with latents, which all ranks hold alike."""
    info = MLABufferInfo(
        buffers=tuple(torch.zeros(PAGE, 1, 48, dtype=torch.bfloat16) for _ in range(LAYERS)),
        data_ptrs=torch.zeros(LAYERS, dtype=torch.uint64), layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS, page_size=PAGE, kv_lora_rank=32, qk_rope_head_dim=16, kv_cache_dim=48,
        dtype=torch.bfloat16, device=CPU,
    )  # fmt: skip
    with host_memory_budget_scope(1 << 30):
        return MLATokenToKVPoolHost(
            info, 0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=PAGE, start_layer=0, end_layer=LAYERS,
            target_layer_num=LAYERS, host_token_capacity=TOKENS,
        )  # fmt: skip


def config(*, v1: bool = True, options: dict[str, Any] | None = None, **changes: Any) -> HiCacheStorageConfig:
    """What SGLang's controller would give a dynamic backend."""
    extra = {
        "backend_name": "kvstrata", "module_path": "kvstrata.integrations.sglang", "class_name": "KVStrataHiCache",
        "interface_v1": int(v1), "memory": "8MiB", **(options or {}),
    }  # fmt: skip
    facts = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": True, "model_name": "a/model",
    }  # fmt: skip
    return HiCacheStorageConfig(**{**facts, **changes}, extra_config=extra)


def server(**arguments: Any) -> Any:
    """A context in which SGLang's server was started with those arguments, as far as others can ask for them."""
    return get_context().override_server_args(**arguments)


def backend(pool: Any, given: HiCacheStorageConfig) -> Any:
    """A backend as SGLang makes it."""
    made = StorageBackendFactory.create_backend("dynamic", given, pool)
    made.register_mem_pool_host(pool)
    return made


class Controller(HiCacheController):  # type: ignore[misc]
    """SGLang's controller as far as it moves pages between host pool and storage; the rest of it needs a GPU."""

    def __init__(self, pool: Any, storage: Any, *, v1: bool = True) -> None:
        self.storage_backend = storage
        self.mem_pool_host = self.storage_host_pool = pool
        self.page_size = PAGE
        self.prefetch_sync_queue = MagicMock()
        self.page_get_func = self._page_get_zero_copy if v1 else self._generic_page_get
        self.page_set_func = self._page_set_zero_copy if v1 else self._generic_page_set

    def back_up(self, hashes: list[str], indices: torch.Tensor) -> int:
        """Pages that went to the storage."""
        operation = StorageOperation(indices, list(range(len(indices))), hash_value=hashes, prefix_keys=[])
        self._page_backup(operation)
        return int(operation.completed_tokens) // PAGE

    def prefetch(self, hashes: list[str], indices: torch.Tensor) -> int:
        """Pages that came from the storage, from the first on."""
        operation = PrefetchOperation("request", list(range(len(indices))), prefix_keys=[])
        operation.hash_value, operation.host_indices = hashes, indices
        return int(self._page_transfer(operation))


def randomize(pool: Any, seed: int = 0) -> None:
    """Fill a pool with bytes that look like nothing else."""
    flat = pool.kv_buffer.view(-1).view(torch.uint8)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def indices_of(*pages: int) -> torch.Tensor:
    """The places of pages in a pool, token by token."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages]) if pages else torch.empty(0)


def page_of(pool: Any, page: int) -> bytes:
    """The bytes of a page."""
    return bytes(pool.get_data_page(page * PAGE, flat=True).contiguous().view(torch.uint8).numpy())
