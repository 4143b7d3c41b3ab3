"""Transformers caches over one buffer with head-room: filled by loads, extended in place."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from kvstrata.keys import KVLayout

__all__ = [
    "CACHE_ARGUMENT", "BufferPool", "HeadroomLayer", "KVBuffer", "cache_of_output", "cache_of_row", "cache_over",
    "static_copy",
]  # fmt: skip

CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What models call the cache that they are given."""

_GRAIN = 64


class KVBuffer:
    """KV of `rows` sequences of up to `capacity` tokens, in memory for `slots` tokens in all.

    `tensor` is [layers, 2, rows, kv_heads, capacity, head_dim] on the device. `host` is where loads write, of the same
    shape and of the layout's words: the same memory on the CPU, a staging area for another device.
    """

    def __init__(self, layout: KVLayout, slots: int, device: torch.device, *, staged: bool = False) -> None:
        self.slots = slots
        self._layout = layout
        self._flat: npt.NDArray[Any] = np.empty(slots * layout.token_bytes // layout.words.itemsize, layout.words)
        self._flat.fill(0)  # faults the pages in now instead of during a request
        signed = self._flat.view(np.dtype(f"i{layout.words.itemsize}"))
        self._words = torch.from_numpy(signed).view(getattr(torch, layout.dtype))
        self._staged = staged or device.type != "cpu"
        self._device = torch.empty_like(self._words, device=device) if self._staged else self._words
        self.shape(1, slots)

    def shape(self, rows: int, capacity: int) -> None:
        """Be of another shape, of at most `slots` tokens; what is in it loses its meaning."""
        layout = self._layout
        shape = (layout.layers, 2, rows, layout.kv_heads, capacity, layout.head_dim)
        count = rows * capacity * layout.token_bytes // layout.words.itemsize
        self.capacity = capacity
        self.host = self._flat[:count].reshape(shape)
        self.tensor = self._device[:count].view(shape)
        self._staging = self._words[:count].view(shape)

    def loaded(self, row: int, start: int, stop: int) -> None:
        """Bring the columns of a row that a load wrote from `host` to the device, where these differ."""
        if self._staged:
            self.tensor[:, :, row, :, start:stop].copy_(self._staging[:, :, row, :, start:stop])


class BufferPool:
    """Keeps the largest idle buffer, so that requests don't fault in fresh pages. Thread-safe."""

    def __init__(self, layout: KVLayout, device: torch.device, slots: int) -> None:
        self._layout = layout
        self._device = device
        self._lock = threading.Lock()
        self._idle: KVBuffer | None = KVBuffer(layout, slots, device) if slots else None

    def take(self, tokens: int, rows: int = 1) -> KVBuffer:
        """Return a buffer for `rows` sequences of at least `tokens` tokens, nobody else's until it is given back."""
        capacity = _rounded(tokens)
        with self._lock:
            buffer, self._idle = self._idle, None
            if buffer is None or buffer.slots < rows * capacity:
                self._idle, buffer = buffer, None
        if buffer is None:
            return self.make(tokens, rows)
        buffer.shape(rows, capacity)
        return buffer

    def make(self, tokens: int, rows: int = 1) -> KVBuffer:
        """Return a new buffer for `rows` sequences of at least `tokens` tokens, to keep."""
        capacity = _rounded(tokens)
        buffer = KVBuffer(self._layout, rows * capacity, self._device)
        buffer.shape(rows, capacity)
        return buffer

    def give(self, buffer: KVBuffer) -> None:
        """Take back a buffer that nothing looks into any more."""
        with self._lock:
            if self._idle is None or self._idle.slots < buffer.slots:
                self._idle = buffer


class HeadroomLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose keys and values are the head of a larger tensor, so that it grows without copying.

    Beyond the tensor's end, or once `keys` or `values` were replaced, it is a plain DynamicLayer. It keeps all tokens
    also where attention looks at a window of them only: that is up to the mask.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """`keys` and `values` are [rows, kv_heads, capacity, head_dim]; the first `tokens` of them are valid."""
        super().__init__()
        self._room = (keys, values)
        self.device, self.dtype = keys.device, keys.dtype
        self.is_initialized = True
        self._show(tokens)

    @property
    def in_place(self) -> bool:
        """Whether keys and values still are the head of the tensors given; an empty head has no address."""
        return all(
            shown is not None
            and (not shown.numel() or (shown.data_ptr() == room.data_ptr() and shown.stride() == room.stride()))
            for shown, room in zip((self.keys, self.values), self._room, strict=True)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, kv_heads, new, head_dim] and return all keys and values."""
        held = self.get_seq_length()
        end = held + key_states.shape[-2]
        keys, values = self._room
        fits = end <= keys.shape[-2] and key_states.dtype == keys.dtype and key_states.shape[0] == keys.shape[0]
        if not (fits and self.in_place):
            self.is_initialized = held > 0  # an empty one may still become one of more rows
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return updated
        keys[:, :, held:end] = key_states
        values[:, :, held:end] = value_states
        return self._show(end)

    def _show(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (room[:, :, :tokens] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values


def cache_over(buffer: KVBuffer, tokens: int) -> DynamicCache:
    """Return a DynamicCache over all rows of `buffer` that starts with its first `tokens` columns."""
    cache = DynamicCache()
    cache.layers = [HeadroomLayer(layer[0], layer[1], tokens) for layer in buffer.tensor]
    return cache


def cache_of_row(buffer: KVBuffer, row: int, start: int, tokens: int) -> DynamicCache:
    """Return a DynamicCache over one row from column `start` on, which has `tokens` tokens there."""
    cache = DynamicCache()
    part = buffer.tensor[:, :, row : row + 1, :, start:]
    cache.layers = [HeadroomLayer(layer[0], layer[1], tokens) for layer in part]
    return cache


def cache_of_output(output: Any) -> Any:
    """Return the cache that a forward pass has filled; None where it kept none."""
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)


def static_copy(cache: DynamicCache, capacity: int, copies: int) -> StaticCache:
    """Return a StaticCache of `capacity` columns that starts with what `cache` holds, each of its rows `copies` times.

    Unlike a dynamic one it takes its rows from an empty cache, too, so they have to be as many from the start.
    """
    layers = []
    held: list[Any] = cache.layers
    for layer in held:
        keys, values = (part.repeat_interleave(copies, dim=0) for part in (layer.keys, layer.values))
        static: Any = StaticLayer(capacity)
        static.lazy_initialization(keys, values)
        static.update(keys, values)
        layers.append(static)
    made = StaticCache.__new__(StaticCache)
    Cache.__init__(made, layers=layers)
    return made


def _rounded(tokens: int) -> int:
    return -(-tokens // _GRAIN) * _GRAIN
