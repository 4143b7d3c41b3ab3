"""A transformers cache over one buffer with head-room: filled by a load, extended in place."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvstrata.keys import KVLayout

__all__ = ["BufferPool", "HeadroomLayer", "KVBuffer", "cache_over"]

_GRAIN = 64


class KVBuffer:
    """KV of up to `capacity` tokens: `tensor`, [layers, 2, 1, kv_heads, capacity, head_dim], on the device.

    `host` is where loads write, [layers, 2, kv_heads, capacity, head_dim] of the layout's words: the
    same memory on the CPU, a staging area for another device.
    """

    def __init__(self, layout: KVLayout, capacity: int, device: torch.device, *, staged: bool = False) -> None:
        self.capacity = capacity
        shape = (layout.layers, 2, layout.kv_heads, capacity, layout.head_dim)
        self.host: npt.NDArray[Any] = np.empty(shape, layout.words)
        self.host.fill(0)  # faults the pages in now instead of during a request
        dtype = getattr(torch, layout.dtype)
        signed = self.host.view(np.dtype(f"i{layout.words.itemsize}"))
        self._words = torch.from_numpy(signed).view(dtype).unsqueeze(2)
        self._staged = staged or device.type != "cpu"
        self.tensor = torch.empty_like(self._words, device=device) if self._staged else self._words

    def loaded(self, tokens: int) -> None:
        """Bring the first `tokens` tokens from `host` to the device, where these differ."""
        if self._staged:
            self.tensor[..., :tokens, :].copy_(self._words[..., :tokens, :])


class BufferPool:
    """Keeps the largest idle buffer, so that requests don't fault in fresh pages. Thread-safe."""

    def __init__(self, layout: KVLayout, device: torch.device, tokens: int) -> None:
        self._layout = layout
        self._device = device
        self._lock = threading.Lock()
        self._idle: KVBuffer | None = KVBuffer(layout, tokens, device) if tokens else None

    def take(self, tokens: int) -> KVBuffer:
        """Return a buffer for at least `tokens` tokens, nobody else's until it is given back."""
        with self._lock:
            if self._idle is not None and self._idle.capacity >= tokens:
                buffer, self._idle = self._idle, None
                return buffer
        return self.make(tokens)

    def make(self, tokens: int) -> KVBuffer:
        """Return a new buffer for at least `tokens` tokens, to keep."""
        return KVBuffer(self._layout, -(-tokens // _GRAIN) * _GRAIN, self._device)

    def give(self, buffer: KVBuffer) -> None:
        """Take back a buffer that nothing looks into any more."""
        with self._lock:
            if self._idle is None or self._idle.capacity < buffer.capacity:
                self._idle = buffer


class HeadroomLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A DynamicLayer whose keys and values are the head of a larger tensor, so that it grows without copying.

    Beyond the tensor's end, or once `keys` or `values` were replaced, it is a plain DynamicLayer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """`keys` and `values` are [1, kv_heads, capacity, head_dim]; the first `tokens` of them are valid."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = (keys, values)
        self.device, self.dtype = keys.device, keys.dtype
        self.is_initialized = True
        self._show(tokens)

    @property
    def in_place(self) -> bool:
        """Whether keys and values still are the head of the tensors given."""
        return all(
            shown is not None and shown.data_ptr() == room.data_ptr() and shown.stride() == room.stride()
            for shown, room in zip((self.keys, self.values), self._room, strict=True)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, kv_heads, new, head_dim] and return all keys and values."""
        held = self.get_seq_length()
        end = held + key_states.shape[-2]
        keys, values = self._room
        fits = end <= keys.shape[-2] and key_states.dtype == keys.dtype and key_states.shape[0] == 1
        if not (fits and self.in_place):
            return super().update(key_states, value_states, *args, **kwargs)
        keys[:, :, held:end] = key_states
        values[:, :, held:end] = value_states
        return self._show(end)

    def _show(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (room[:, :, :tokens] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values


def cache_over(buffer: KVBuffer, tokens: int) -> DynamicCache:
    """Return a DynamicCache over `buffer` that starts with its first `tokens` tokens."""
    cache = DynamicCache()
    cache.layers = [HeadroomLayer(layer[0], layer[1], tokens) for layer in buffer.tensor]
    return cache
