"""Sessions: a conversation's tokens under a name, with the KV that no full block holds.

A session is a record of its own, overwritten each time it is saved: the tokens, and the KV behind the last full block.
The full blocks are those of the prefix, stored once and shared with all other prompts that begin alike.

    u32 version, u32 tokens, u32 of each token, zeros up to a multiple of 64 bytes, KV of the rest as
    [layers, 2, kv_heads, rest, head_dim]; all little endian
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import blake3
import numpy as np
import numpy.typing as npt

from kvstrata.keys import KVLayout, block_tokens_array
from kvstrata.prefix_blocks import Layers, Words, check_out
from kvstrata.prefix_loading import LoadedKV, PrefixLoader

if TYPE_CHECKING:
    from kvstrata.namespace import Namespace

__all__ = ["Session", "SessionStore"]

_VERSION = 1
_HEAD = struct.Struct("<II")
_ALIGN = 64


class Session:
    """A conversation as it was saved: `tokens`, [n] u32, are all whose KV was."""

    def __init__(self, tokens: npt.NDArray[np.uint32], rest: Words, keys: list[bytes], loader: PrefixLoader) -> None:
        self.tokens = tokens
        self._rest = rest
        self._keys = keys
        self._loader = loader

    def begins(self, tokens: Sequence[int] | npt.ArrayLike) -> bool:
        """Tell whether a prompt starts with this session."""
        count = len(self.tokens)
        return bool(np.array_equal(block_tokens_array(tokens)[:count], self.tokens))

    def load(self, out: Words | None = None) -> LoadedKV:
        """Copy the KV of all tokens into `out`, or into a new array, and return what was really there.

        `out` is as for `Match.load`, with room for all tokens. The result is shorter, a multiple of the layout's
        block_tokens, where blocks were evicted or damaged meanwhile. Raises InvalidValue for an `out` that doesn't fit.
        """
        layout, count = self._loader.layout, len(self.tokens)
        if out is None:
            out = np.empty((layout.layers, 2, layout.kv_heads, count, layout.head_dim), layout.words)
        check_out(out, layout, count)
        loaded = self._loader.load(self._keys, out)
        if loaded.tokens < len(self._keys) * layout.block_tokens:
            return loaded
        out[:, :, :, loaded.tokens : count] = self._rest
        return LoadedKV(count, out[:, :, :, :count], loaded.nbytes + self._rest.nbytes, loaded.disk_blocks)


class SessionStore:
    """The sessions of one layout, in a namespace of the caller's, which isn't immutable. Thread-safe."""

    def __init__(self, ns: Namespace, layout: KVLayout) -> None:
        self._ns = ns
        self._layout = layout
        self._seed = layout.seed()

    def save(self, name: str | bytes, tokens: npt.NDArray[np.uint32], layers: Layers, ttl: float | None) -> None:
        """Write what `layers` hold behind the last full block of `tokens`, and the tokens; raises TierFull."""
        rest = len(tokens) % self._layout.block_tokens
        start = self._rest_at(len(tokens))
        value = bytearray(start + rest * self._layout.token_bytes)
        _HEAD.pack_into(value, 0, _VERSION, len(tokens))
        value[_HEAD.size : _HEAD.size + 4 * len(tokens)] = tokens.tobytes()
        words = self._words(memoryview(value)[start:], rest)
        for number, (keys, values) in enumerate(layers):
            words[number, 0] = keys[:, len(tokens) - rest :]
            words[number, 1] = values[:, len(tokens) - rest :]
        self._ns.put(self._key(name), value, ttl=ttl)

    def read(self, name: str | bytes) -> tuple[npt.NDArray[np.uint32], Words] | None:
        """Return the tokens and the rest's KV, [layers, 2, kv_heads, rest, head_dim]; None where there is none."""
        value = self._ns.get(self._key(name))
        if value is None or len(value) < _HEAD.size:
            return None
        version, count = _HEAD.unpack_from(value)
        rest = count % self._layout.block_tokens
        start = self._rest_at(count)
        if version != _VERSION or len(value) != start + rest * self._layout.token_bytes:
            return None
        tokens = np.frombuffer(value, "<u4", count, _HEAD.size)
        return tokens, self._words(memoryview(value)[start:], rest)

    def forget(self, name: str | bytes) -> bool:
        """Remove a session; returns whether it was there."""
        return self._ns.delete(self._key(name))

    def _words(self, part: memoryview, rest: int) -> Words:
        layout = self._layout
        return np.ndarray((layout.layers, 2, layout.kv_heads, rest, layout.head_dim), layout.words, part)

    def _key(self, name: str | bytes) -> bytes:
        """A digest under the layout's seed: other weights have other sessions, and so have other tenants."""
        data = name.encode() if isinstance(name, str) else name
        return blake3.blake3(b"session\0" + data, key=self._seed).digest()

    @staticmethod
    def _rest_at(tokens: int) -> int:
        return -(-(_HEAD.size + 4 * tokens) // _ALIGN) * _ALIGN
