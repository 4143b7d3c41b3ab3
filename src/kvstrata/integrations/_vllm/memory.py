"""vLLM's KV memory as bytes of blocks: a block is the same part of each layer's tensor, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvstrata import _core
from kvstrata.codecs.base import TensorInfo
from kvstrata.errors import UnsupportedModel

__all__ = ["BlockMemory"]

Bytes = npt.NDArray[np.uint8]


class _Plane(NamedTuple):
    """Layers at equal distances in one allocation."""

    view: Bytes  # [layers, blocks, page]
    first: int  # the number of its first layer
    begin: int  # where that begins in a block


class BlockMemory:
    """The KV of all layers, `blocks` blocks of `block_bytes` each, copied from and to as bytes.

    Raises UnsupportedModel for tensors in which a block isn't one dense run of bytes on the CPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], blocks: int) -> None:
        self.layout: list[str] = []
        """What is in a block, in order: names, shapes, strides and dtypes."""
        self.layer_of: dict[str, int] = {}
        """The number of each layer; layers that share their KV have one."""
        pages: list[tuple[torch.Tensor, int]] = []
        numbers: dict[int, int] = {}
        for name, tensor in tensors.items():
            page = _page_bytes(name, tensor, blocks)
            number = self.layer_of[name] = numbers.setdefault(tensor.data_ptr(), len(pages))
            if number == len(pages):
                pages.append((tensor, page))
                self.layout.append(f"{name} {tuple(tensor.shape[1:])} {tensor.stride()[1:]} {tensor.dtype}")
        self.layers = len(pages)
        self.block_bytes = sum(page for _, page in pages)
        self.tensor = _tensor_info([tensor for tensor, _ in pages], self.block_bytes)
        """A block as one tensor, for codecs; None where its layers aren't alike, or don't hold keys and then values."""
        self._planes = _planes(pages, blocks)

    def read(self, block: int, into: memoryview) -> None:
        """Copy a block to `block_bytes` of memory."""
        target = np.frombuffer(into, np.uint8)
        for view, _, begin in self._planes:
            layers, _, page = view.shape
            np.copyto(target[begin : begin + layers * page].reshape(layers, page), view[:, block])

    def write(self, blocks: Sequence[tuple[int, memoryview]], layers: range | None = None) -> None:
        """Copy to each block, or to some layers of it, its `block_bytes` of memory."""
        for view, first, begin in self._planes:
            count, _, page = view.shape
            low, high = (0, count) if layers is None else (layers.start - first, min(layers.stop - first, count))
            low = max(low, 0)
            if low < high:
                parts = [(data[begin : begin + count * page], None, block) for block, data in blocks]
                _core.place_layers(view[:, None, None], parts, 1, low, high)  # a page being one token


def _tensor_info(tensors: list[torch.Tensor], block_bytes: int) -> TensorInfo | None:
    """Describe [blocks, heads, tokens, keys and values] of each layer, in which a head's keys come before its values.

    Kernels for some instructions keep the keys of a head in another order among themselves.
    """
    first = tensors[0]
    dtype = str(first.dtype).removeprefix("torch.")
    alike = all((tensor.shape, tensor.dtype) == (first.shape, first.dtype) for tensor in tensors)
    if not alike or first.dim() != 4 or first.shape[3] % 2 or dtype not in ("float32", "float16", "bfloat16"):
        return None
    if not first[0].is_contiguous():
        return None
    _, heads, tokens, width = first.shape
    parts = block_bytes // (first[0].nbytes * len(tensors))  # of the kernel's blocks in one of the engine's
    axes = ("layers", "parts", "heads", "kv", "tokens", "channels")
    return TensorInfo(dtype, (len(tensors), parts, heads, 2, tokens, width // 2), axes)


def _page_bytes(name: str, tensor: Any, blocks: int) -> int:
    """The bytes of one block in a layer, which follow one another; there may be several of the kernel's in one."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
        raise UnsupportedModel(
            f"the KV of layer {name} isn't one tensor in the CPU's memory; on an accelerator use vLLM's "
            "OffloadingConnector with the tier of kvstrata.integrations.vllm_tier"
        )
    inner = sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    expected = 1
    for stride, size in inner:
        if size > 1 and stride != expected:
            expected = 0
        expected *= size
    if tensor.shape[0] % blocks or expected != tensor.stride(0):
        raise UnsupportedModel(
            f"the KV of layer {name} has blocks that aren't dense: shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}, for {blocks} blocks"
        )
    return int(tensor.stride(0) * tensor.element_size() * (tensor.shape[0] // blocks))


def _planes(pages: list[tuple[torch.Tensor, int]], blocks: int) -> list[_Plane]:
    planes: list[_Plane] = []
    at = begin = 0
    while at < len(pages):
        tensor, page = pages[at]
        end = at + 1
        while end < len(pages) and _follows(pages, at, end):
            end += 1
        distance = _start(pages[at + 1][0]) - _start(tensor) if end > at + 1 else blocks * page
        memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        view = torch.as_strided(memory, (end - at, blocks, page), (distance, page, 1), _start(tensor))
        planes.append(_Plane(view.numpy(), at, begin))
        begin += (end - at) * page
        at = end
    return planes


def _start(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() - tensor.untyped_storage().data_ptr()


def _follows(pages: list[tuple[torch.Tensor, int]], first: int, number: int) -> bool:
    """Whether a layer lies behind the one before it as the second does behind the first, in the same allocation."""
    (tensor, page), (other, other_page) = pages[first], pages[number]
    step = _start(pages[first + 1][0]) - _start(tensor)
    return (
        other_page == page
        and other.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        and _start(other) - _start(tensor) == step * (number - first)
        and step > 0
    )
