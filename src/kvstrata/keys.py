"""Names for prefix blocks: chained, keyed digests of tokens under a fingerprint of the layout.

A block's key depends on every token up to its end and on everything that changes the KV:

    seed = BLAKE3-derive-key(context, canonical encoding of the KVLayout)     32 bytes
    d[-1] = 32 zero bytes
    d[i]  = BLAKE3(d[i-1] || tokens of block i as little-endian u32 || what else it depends on, key=seed)

So equal keys mean equal KV, in every process and on every machine. Without the salt, the seed
can't be computed: tenants with different salts neither share blocks nor can probe each other's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import blake3
import msgspec
import numpy as np
import numpy.typing as npt

from kvstrata.errors import ConfigError, InvalidValue

__all__ = ["DEFAULT_BLOCK_TOKENS", "LAYOUT_VERSION", "KVLayout", "block_tokens_array", "prefix_keys"]

LAYOUT_VERSION = 2
"""Raised whenever the bytes of a block or the derivation of its key change meaning."""

DEFAULT_BLOCK_TOKENS = 32
"""Tokens in a block unless the layout says otherwise; `benchmarks/own/ttft.py --blocks` compares sizes."""

MAX_BLOCK_TOKENS = 4096

_CONTEXT = "kvstrata 2026-11-24 prefix block fingerprint"
_ROOT = bytes(32)
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
}


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What a block holds and everything that its content depends on besides the tokens.

    A block is the contiguous array [layers, 2 (keys, values), kv_heads, block_tokens, head_dim]
    of `dtype`, little endian, and behind it a checksum for each layer (docs/format.md). Two layouts
    that differ in any field have no key in common.

    model: identity of the weights, from their content (not their path).
    attention, rope, adapter: free-form but canonical text; "" where there is none.
    tp_rank, tp_size: which shard of the heads this is.
    salt: the caller's secret between tenants; never stored, only digested.
    """

    model: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    attention: str = ""
    rope: str = ""
    adapter: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    salt: bytes = b""

    def __post_init__(self) -> None:
        """Refuse what can't be a layout; raises ConfigError."""
        for name in ("model", "dtype", "attention", "rope", "adapter"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"KVLayout.{name} must be a str, not {getattr(self, name)!r}")
        if not self.model:
            raise ConfigError("KVLayout.model must name the weights; without it models would share keys")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"KVLayout.dtype={self.dtype!r} is not one of {', '.join(_DTYPES)}")
        for name in ("layers", "kv_heads", "head_dim", "block_tokens", "tp_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
                raise ConfigError(f"KVLayout.{name} must be a positive int, not {value!r}")
        if self.block_tokens > MAX_BLOCK_TOKENS:
            raise ConfigError(f"KVLayout.block_tokens={self.block_tokens} is over {MAX_BLOCK_TOKENS}")
        rank = self.tp_rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.tp_size:
            raise ConfigError(f"KVLayout.tp_rank must be an int in 0..{self.tp_size - 1}, not {rank!r}")
        if not isinstance(self.salt, bytes):
            raise ConfigError("KVLayout.salt must be bytes")

    @property
    def words(self) -> np.dtype[Any]:
        """The numpy dtype that carries one element; bfloat16 travels as its 16-bit words."""
        return _DTYPES[self.dtype]

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[layers, 2, kv_heads, block_tokens, head_dim]."""
        return (self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of KV for one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.words.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of KV in a block."""
        return self.token_bytes * self.block_tokens

    @property
    def layer_bytes(self) -> int:
        """Bytes of KV of one layer in a block."""
        return self.block_bytes // self.layers

    @property
    def value_bytes(self) -> int:
        """Bytes of a block's value: its KV, a CRC32C for each layer, and one over these."""
        return self.block_bytes + 4 * (self.layers + 1)

    def seed(self) -> bytes:
        """The 32-byte key of every digest under this layout."""
        return blake3.blake3(self._encoded(), derive_key_context=_CONTEXT).digest()

    def name(self) -> str:
        """A namespace name for this layout, the same for every salt: "kv-" and 16 hex digits."""
        return "kv-" + msgspec.structs.replace(self, salt=b"").seed()[:8].hex()

    def _encoded(self) -> bytes:
        """Canonical bytes: the version, then each field in sorted order as length-prefixed name and value."""
        parts = [struct.pack("<I", LAYOUT_VERSION)]
        for name in sorted(self.__struct_fields__):
            value = getattr(self, name)
            data = value if isinstance(value, bytes) else str(value).encode()
            for item in (name.encode(), data):
                parts += (struct.pack("<Q", len(item)), item)
        return b"".join(parts)


def block_tokens_array(tokens: Sequence[int] | npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Return `tokens` (any one-dimensional sequence or array of integers) as little-endian u32.

    Raises InvalidValue for another shape, non-integers, and values outside 0..2**32-1.
    """
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidValue(f"tokens can't be read as integers: {error}") from None
    if array.ndim != 1:
        raise InvalidValue(f"tokens must have one dimension, not shape {array.shape}")
    if array.size == 0:
        return np.empty(0, "<u4")
    if array.dtype.kind not in "iu":
        raise InvalidValue(f"tokens must be integers below 2**32, not {_kind(array)}")
    if array.dtype != np.uint32:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= 1 << 32:
            raise InvalidValue(f"tokens must be in 0..2**32-1, not {low if low < 0 else high}")
    return np.ascontiguousarray(array, "<u4")


def prefix_keys(
    tokens: Sequence[int] | npt.ArrayLike,
    seed: bytes,
    block_tokens: int,
    *,
    after: bytes = _ROOT,
    extra: Mapping[int, bytes] | None = None,
) -> list[bytes]:
    """Return one 32-byte key for each full block of `tokens`, head first; a rest gets none.

    `seed` is a layout's `seed()`. `after` is the key of the block before, where `tokens` go on from there. `extra`
    says, by the number of a block among these, what else than its tokens it depends on. Raises InvalidValue for tokens
    that are none, ConfigError for a seed that isn't 32 bytes or a block size below 1.
    """
    if len(seed) != 32:
        raise ConfigError(f"a seed has 32 bytes, not {len(seed)}")
    if block_tokens < 1:
        raise ConfigError(f"block_tokens must be at least 1, not {block_tokens}")
    words = block_tokens_array(tokens).data.cast("B")
    size = 4 * block_tokens
    digest = after
    keys: list[bytes] = []
    for start in range(0, len(words) - size + 1, size):
        hasher = blake3.blake3(digest, key=seed).update(words[start : start + size])
        if extra and (more := extra.get(len(keys))):
            hasher.update(more)  # of any length: what stands before it has always the same
        digest = hasher.digest()
        keys.append(digest)
    return keys


def _kind(array: npt.NDArray[Any]) -> str:
    """What an array holds, in words for a message."""
    if array.dtype.kind == "O":
        kinds = {type(item).__name__ for item in array[:64]}
        return "objects of type " + ", ".join(sorted(kinds))
    return array.dtype.name
