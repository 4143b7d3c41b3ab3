"""vLLM's offloading on the CPU, for tests and measurements of tiers below it: vLLM ships the copying for GPUs only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

__all__ = ["CPUTieringSpec"]


class CPUTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """As TieringOffloadingSpec, with a worker that copies from the CPU's memory to the CPU's memory."""

    def get_worker(self, kv_caches: Any) -> Any:
        if self.blocks_per_chunk != 1:
            raise NotImplementedError("chunks of several blocks")
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id, num_chunks=self.num_chunks, rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker,
            )  # fmt: skip
            self._worker = _Worker(kv_caches, region)
        return self._worker


class _Worker(OffloadingWorker):  # type: ignore[misc]
    """Copies at once, in the engine's thread."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion) -> None:
        self._region = region
        self._finished: list[TransferResult] = []
        self._pairs = [
            (
                cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes).numpy(),
                region.create_next_worker_view(cache.page_size_bytes).numpy(),
            )
            for cache in kv_caches.tensors
        ]

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for ours, theirs in self._pairs:
            _copy(ours, src_spec.block_ids, theirs, dst_spec.block_ids)
        return self._done(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for ours, theirs in self._pairs:
            _copy(theirs, src_spec.block_ids, ours, dst_spec.block_ids)
        return self._done(job_id)

    def _done(self, job_id: int) -> bool:
        self._finished.append(TransferResult(job_id=job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pairs = []
        self._region.cleanup()


def _copy(source: Any, sources: Any, target: Any, targets: Any) -> None:
    for ours, theirs in zip(sources, targets, strict=True):
        np.copyto(target[theirs], source[ours])
