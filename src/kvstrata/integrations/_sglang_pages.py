"""Pages of one of SGLang's host pools, in a namespace of their own, copied straight between the two."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kvstrata.cache import Cache
from kvstrata.integrations._blocks import EngineBlocks, Fill, Take

__all__ = ["Pages", "bytes_of", "describe_pool"]


def describe_pool(pool: Any) -> dict[str, object]:
    """What the bytes of a pool's pages depend on, as far as the pool itself says it."""
    names = ("dtype", "layout", "page_size", "storage_format_tag", "start_layer", "end_layer", "layer_num", "head_num")
    facts: dict[str, object] = {name: getattr(pool, name, None) for name in names}
    return {**facts, "class": type(pool).__name__}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, of whatever type: a view of them."""
    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


class Pages:
    """The pages of one host pool.

    A record is the buffers of a page back to back, in the order in which the pool lists them; of a pool that doesn't
    list any, its flat page. `facts` are all that the bytes depend on besides what the pool says. Thread-safe.
    """

    def __init__(self, cache: Cache, facts: Mapping[str, object], pool: Any) -> None:
        self._pool = pool
        self.page_size: int = getattr(pool, "logical_page_size", None) or getattr(pool, "page_size", None) or 1
        buffers = self._list(torch.arange(self.page_size))
        self._flat = buffers is None
        sizes = [bytes_of(pool.get_dummy_flat_data_page()).nbytes] if buffers is None else [n for _, n in buffers[0]]
        self.nbytes = sum(sizes)
        order = "flat" if buffers is None else "buffers"
        self.blocks = EngineBlocks(cache, "sglang", {**facts, **describe_pool(pool), "order": order, "sizes": sizes})

    def set(self, keys: Sequence[bytes], indices: torch.Tensor, *, depth: int = 0) -> list[bool]:
        """Store the pages that begin at every `page_size`-th of `indices`; says which of them are there now.

        It ends at the first that can't be stored.
        """
        if indices.numel() != len(keys) * self.page_size:
            return [False] * len(keys)
        fill = self._fill_flat(indices) if self._flat else self._fill_buffers(self._buffers(indices))
        done = self.blocks.store(keys, self.nbytes, fill, depth=depth)
        return [position < done for position in range(len(keys))]

    def get(self, keys: Sequence[bytes], indices: torch.Tensor) -> list[bool]:
        """Copy pages to where `set` would take them from; a page for which it says False may hold anything."""
        if indices.numel() != len(keys) * self.page_size:
            return [False] * len(keys)
        return self.blocks.load_each(
            keys, self._take_flat(indices) if self._flat else self._take_buffers(self._buffers(indices))
        )

    # ---- Page by page, through the pool's own methods

    def _fill_flat(self, indices: torch.Tensor) -> Fill:
        def fill(position: int, memory: memoryview) -> None:
            page = self._pool.get_data_page(int(indices[position * self.page_size]), flat=True)
            memory[:] = bytes_of(page.contiguous())

        return fill

    def _take_flat(self, indices: torch.Tensor) -> Take:
        def take(position: int, block: memoryview) -> bool:
            page = self._pool.get_dummy_flat_data_page()
            target = bytes_of(page)
            if target.nbytes != block.nbytes:
                return False
            target[:] = block
            self._pool.set_from_flat_data_page(int(indices[position * self.page_size]), page)
            return True

        return take

    # ---- Straight from and to the pool's memory

    def _list(self, indices: torch.Tensor) -> list[list[tuple[int, int]]] | None:
        """Address and length of the buffers of each page; None if the pool, in its layout, doesn't list them."""
        try:
            listed = self._pool.get_page_buffer_meta(indices)
        except (AttributeError, NotImplementedError, ValueError):
            return None
        pages = indices.numel() // self.page_size
        addresses, sizes = listed or ([], [])  # a pool that only hands out numbers has no memory
        each = len(addresses) // pages
        buffers = list(zip(addresses, sizes, strict=True))
        return [buffers[page * each : (page + 1) * each] for page in range(pages)]

    def _buffers(self, indices: torch.Tensor) -> list[list[tuple[int, int]]]:
        return (self._list(indices) or []) if indices.numel() else []

    def _fill_buffers(self, buffers: list[list[tuple[int, int]]]) -> Fill:
        def fill(position: int, memory: memoryview) -> None:
            at = _address(memory) if memory.nbytes else 0
            for source, nbytes in buffers[position]:
                ctypes.memmove(at, source, nbytes)
                at += nbytes

        return fill

    def _take_buffers(self, buffers: list[list[tuple[int, int]]]) -> Take:
        def take(position: int, block: memoryview) -> bool:
            if block.nbytes != sum(nbytes for _, nbytes in buffers[position]):
                return False
            at = _address(block) if block.nbytes else 0
            for target, nbytes in buffers[position]:
                ctypes.memmove(target, at, nbytes)
                at += nbytes
            return True

        return take


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
