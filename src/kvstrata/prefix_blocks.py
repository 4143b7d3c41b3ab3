"""What a block of a prefix holds, and what callers hand in and out: arrays that have to fit the layout.

A block's value is its KV, [layers, 2, kv_heads, block_tokens, head_dim], and a trailer behind it: the CRC32C of each
layer, and one over these, continued from that of the key. The record's own checksum is of the whole value, so it
can't tell whether a layer is in order while others are still missing; these can. docs/format.md has the bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata import _core
from kvstrata.errors import CorruptRecord, InvalidValue
from kvstrata.keys import KVLayout

if TYPE_CHECKING:
    from kvstrata._core import Pin

__all__ = ["Layers", "Words", "as_layers", "check_out", "fill_block", "layer_sums", "place_blocks", "trailer_of"]

Words: TypeAlias = npt.NDArray[Any]
Layers: TypeAlias = list[tuple[Words, Words]]
"""(keys, values) of each layer, [kv_heads, tokens, head_dim] each."""


def fill_block(value: memoryview, key: bytes, layers: Layers, start: int, layout: KVLayout) -> None:
    """Write the value of the block that starts at token `start` of `layers`."""
    stop = start + layout.block_tokens
    block: Words = np.frombuffer(value, layout.words, layout.block_bytes // layout.words.itemsize)
    block = block.reshape(layout.block_shape)
    size = layout.layer_bytes
    sums = np.empty(layout.layers + 1, "<u4")
    for number, (keys, values) in enumerate(layers):
        block[number, 0] = keys[:, start:stop]
        block[number, 1] = values[:, start:stop]
        sums[number] = _core.crc32c(value[number * size : (number + 1) * size])  # while it is in the cache
    sums[-1] = _sum_of_sums(sums, key)
    value[layout.block_bytes :] = sums.tobytes()


def place_blocks(
    out: Words, blocks: Sequence[tuple[int, Pin | memoryview]], layout: KVLayout, layers: range | None = None
) -> None:
    """Copy values of blocks, (index, value), to their places in `out`: those layers, by default all.

    They were checked when they came into memory.
    """
    first, stop = (0, layout.layers) if layers is None else (layers.start, layers.stop)
    tokens = layout.block_tokens
    _core.place_layers(out, [(value, None, index * tokens) for index, value in blocks], tokens, first, stop)


def trailer_of(kv: memoryview, key: bytes, layout: KVLayout) -> bytes:
    """Return what stands behind the KV of the block with that key."""
    size = layout.layer_bytes
    sums = np.empty(layout.layers + 1, "<u4")
    for number in range(layout.layers):
        sums[number] = _core.crc32c(kv[number * size : (number + 1) * size])
    sums[-1] = _sum_of_sums(sums, key)
    return sums.tobytes()


def layer_sums(trailer: Any, key: bytes) -> npt.NDArray[np.uint32]:
    """Return the checksums of the layers; raises CorruptRecord unless this is the trailer of that block."""
    sums = np.frombuffer(trailer, "<u4")
    if int(sums[-1]) != _sum_of_sums(sums, key):
        raise CorruptRecord("the checksums of its layers are damaged, or another block's")
    return sums[:-1].copy()


def _sum_of_sums(sums: npt.NDArray[np.uint32], key: bytes) -> int:
    return _core.crc32c(sums[:-1].tobytes(), _core.crc32c(key))


def check_out(out: Words, layout: KVLayout, tokens: int) -> None:
    """Raise InvalidValue unless `tokens` tokens fit into `out`."""
    if not isinstance(out, np.ndarray) or out.dtype != layout.words or not out.flags.writeable:
        raise InvalidValue(f"out must be a writable numpy array of {layout.words}")
    expected = (layout.layers, 2, layout.kv_heads, tokens, layout.head_dim)
    if out.ndim != 5 or out.shape[:3] + out.shape[4:] != expected[:3] + expected[4:] or out.shape[3] < tokens:
        raise InvalidValue(f"out has shape {out.shape}; it must be {expected}, or longer in tokens")


def as_layers(kv: Words | Sequence[tuple[Any, Any]], layout: KVLayout) -> Layers:
    """Return (keys, values) of each layer as words, [kv_heads, tokens, head_dim]; raises InvalidValue."""
    shape = getattr(kv, "shape", None)
    if shape is not None:
        if len(shape) != 5 or tuple(shape[:2]) != (layout.layers, 2):
            raise InvalidValue(
                f"kv has shape {tuple(shape)}; the layout says "
                f"[{layout.layers}, 2, {layout.kv_heads}, tokens, {layout.head_dim}]"
            )
        array = _as_words(kv, layout)
        pairs = [(layer[0], layer[1]) for layer in array]
    else:
        if len(kv) != layout.layers:
            raise InvalidValue(f"kv has {len(kv)} layers; the layout says {layout.layers}")
        pairs = [(_as_words(keys, layout), _as_words(values, layout)) for keys, values in kv]
    tokens = pairs[0][0].shape[1] if pairs[0][0].ndim == 3 else -1
    expected = (layout.kv_heads, tokens, layout.head_dim)
    for index, pair in enumerate(pairs):
        for name, array in zip(("keys", "values"), pair, strict=True):
            if array.shape != expected:
                raise InvalidValue(
                    f"the {name} of layer {index} have shape {array.shape}; the layout says "
                    f"[{layout.kv_heads}, tokens, {layout.head_dim}], with as many tokens in every layer"
                )
    return pairs


def _as_words(array: Any, layout: KVLayout) -> Words:
    """View a numpy array or torch tensor as the layout's words, without a copy where it is in host memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if str(array.dtype) != f"torch.{layout.dtype}":
            raise InvalidValue(f"kv is of {array.dtype}; the layout says {layout.dtype}")
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[layout.words.itemsize]
        words: Words = array.detach().cpu().view(integers).numpy()
        return words.view(layout.words)
    if not isinstance(array, np.ndarray):
        raise InvalidValue(f"kv must be of numpy arrays or torch tensors, not {type(array).__name__}")
    if array.dtype != layout.words and array.dtype.name != layout.dtype:
        raise InvalidValue(f"kv is of {array.dtype}; the layout says {layout.dtype} (as {layout.words})")
    return array.view(layout.words)
