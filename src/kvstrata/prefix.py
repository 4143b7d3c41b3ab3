"""PrefixCache: from the tokens of a prompt to the KV of its longest cached prefix, and back."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata.errors import InvalidValue, TierError, TierFull
from kvstrata.keys import KVLayout, prefix_keys

if TYPE_CHECKING:
    from kvstrata._core import Pin
    from kvstrata.cache import Cache
    from kvstrata.namespace import Namespace

__all__ = ["KVLayout", "LoadedKV", "Match", "PrefixCache"]

Tokens: TypeAlias = Sequence[int] | npt.ArrayLike
Words: TypeAlias = npt.NDArray[Any]

_BATCH_BYTES = 256 << 20
"""How much is pinned at once: enough for any queue depth, a bound on what a load claims."""

_PARALLEL_BYTES = 4 << 20
"""Below this a copy is quicker than waking another thread."""


@dataclass(frozen=True)
class LoadedKV:
    """What a load really brought.

    tokens: length of the loaded prefix, a multiple of the layout's block_tokens, maybe 0.
    kv: [layers, 2, kv_heads, tokens, head_dim], a view of `out` where one was
        given; bfloat16 as uint16 words.
    disk_blocks: how many of the blocks had to come from below memory.
    """

    tokens: int
    kv: Words
    nbytes: int
    disk_blocks: int

    @property
    def tier(self) -> str:
        """The lowest tier that had to be read: "none", "memory" or "disk"."""
        if not self.tokens:
            return "none"
        return "disk" if self.disk_blocks else "memory"


class PrefixCache:
    """The cached prefixes of one model and layout, in a namespace of the caller's: see `open` for one made for it.

    `ns` should be immutable=True and have policy="auto". Thread-safe. `threads` copy a load (default: up to 4, as many
    as this process may use).
    """

    def __init__(self, ns: Namespace, layout: KVLayout, *, threads: int | None = None) -> None:
        self.ns = ns
        self.layout = layout
        self._seed = layout.seed()
        # "auto" takes blocks that come head to tail for one use of a prefix. All others evict sooner what came sooner.
        self._head_first = ns._options.policy == "auto"
        self._copier = _Copier(threads or min(4, len(os.sched_getaffinity(0))))
        self._lock = threading.Lock()
        self._stats = dict.fromkeys(
            ("matches", "matched_tokens", "loads", "loaded_tokens", "loaded_bytes",
             "short_loads", "load_errors", "stored_blocks", "stored_bytes", "stores_cut_short"), 0
        )  # fmt: skip

    @classmethod
    def open(
        cls, cache: Cache, layout: KVLayout, *, name: str | None = None, threads: int | None = None
    ) -> PrefixCache:
        """Open the prefixes of a layout in an immutable namespace under the policy "auto".

        It is called `name`, by default what the layout is called. Raises ConfigMismatch where somebody has a namespace
        of that name open with other options.
        """
        return cls(cache.namespace(name or layout.name(), policy="auto", immutable=True), layout, threads=threads)

    def keys(self, tokens: Tokens) -> list[bytes]:
        """Return the key of each full block of `tokens`; raises InvalidValue for bad tokens."""
        return prefix_keys(tokens, self._seed, self.layout.block_tokens)

    def match(self, tokens: Tokens) -> Match:
        """Find the longest cached prefix of `tokens`; looks only at the index and loads nothing."""
        keys = self.keys(tokens)
        found = self.ns.contains_prefix(keys) if keys else 0
        match = Match(self, keys[:found])
        self._count(matches=1, matched_tokens=match.tokens)
        return match

    def store(self, tokens: Tokens, kv: Words | Sequence[tuple[Any, Any]]) -> int:
        """Store the full blocks of `tokens` that aren't there yet, head first; returns how many.

        `kv` holds exactly these tokens, as one array [layers, 2, kv_heads, tokens, head_dim] or as
        one (keys, values) pair a layer, each [kv_heads, tokens, head_dim]; numpy or torch, of the
        layout's dtype. Stops at the first block for which there is no room, so that no block is
        ever stored behind a hole. Raises InvalidValue where shapes or dtypes don't fit the layout.
        """
        keys = self.keys(tokens)
        layers = _layers_of(kv, self.layout)
        length = layers[0][0].shape[1]
        count = len(tokens) if isinstance(tokens, Sequence) else np.shape(tokens)[0]
        if length != count:
            raise InvalidValue(f"kv holds {length} tokens, but {count} tokens were given")
        present = self.ns.contains_prefix(keys)
        # In a cache of memory alone, a long prompt must not push out its own head. What is pinned for that isn't used.
        held = None if self.ns._cache.options.disk else self.ns._space.pin_many(keys[:present], uses=False)[0]
        stored = 0
        try:
            for index in range(present, len(keys)):
                stored += self._store_block(keys[index], layers, index)
                if held is not None:
                    held += self.ns._space.pin_many(keys[index : index + 1], uses=False)[0]
        except TierFull:
            self._count(stores_cut_short=1)
        finally:
            _release(held or ())
            if not self._head_first:
                for key in reversed(keys):  # most recently used is the head, so that a prefix is evicted from its tail
                    self.ns._space.present_immutable(key)
            self._count(stored_blocks=stored, stored_bytes=stored * self.layout.block_bytes)
        return stored

    def stats(self) -> dict[str, int]:
        """Return this object's counters since it was made."""
        with self._lock:
            return dict(self._stats)

    def _store_block(self, key: bytes, layers: Sequence[tuple[Words, Words]], index: int) -> bool:
        """Write one block straight into the arena; False when it was there already, behind a hole."""
        if key in self.ns:
            return False
        with self.ns._reserve(key, self.layout.block_bytes, depth=index + 1) as buffer:
            self._fill(buffer, layers, index * self.layout.block_tokens)
        return True

    def _fill(self, buffer: memoryview, layers: Sequence[tuple[Words, Words]], start: int) -> None:
        stop = start + self.layout.block_tokens
        block = np.frombuffer(buffer, self.layout.words).reshape(self.layout.block_shape)
        for target, (keys, values) in zip(block, layers, strict=True):
            target[0] = keys[:, start:stop]
            target[1] = values[:, start:stop]

    def _load(self, keys: Sequence[bytes], out: Words | None) -> LoadedKV:
        layout = self.layout
        wanted = len(keys) * layout.block_tokens
        if out is None:
            out = np.empty((layout.layers, 2, layout.kv_heads, wanted, layout.head_dim), layout.words)
        else:
            _check_out(out, layout, wanted)
        done = disk_blocks = 0
        batch = max(1, _BATCH_BYTES // layout.block_bytes)
        while done < len(keys):
            wave = keys[done : done + batch]
            try:
                got, from_disk = self._load_wave(wave, out, done)
            except TierError:
                self._count(load_errors=1)
                break
            done += got
            disk_blocks += from_disk
            if not got:
                break
        tokens = done * layout.block_tokens
        nbytes = done * layout.block_bytes
        self._count(loads=1, loaded_tokens=tokens, loaded_bytes=nbytes, short_loads=int(done < len(keys)))
        return LoadedKV(tokens, out[:, :, :, :tokens], nbytes, disk_blocks)

    def _load_wave(self, keys: Sequence[bytes], out: Words, first: int) -> tuple[int, int]:
        """Copy the leading run of `keys` that is there to block `first` of `out` and on.

        Returns the length of the run and how many of it came from below memory.
        """
        pins, below = self._pin(keys)
        copied: set[int] = set()

        def arrived(position: int, value: Pin | memoryview) -> None:
            """Copy a block while others are still being read."""
            if len(value) == self.layout.block_bytes:
                _scatter([self._place(below[position], first, value)], out)
                copied.add(below[position])

        try:
            if below:
                loaded = self.ns._load([keys[index] for index in below], arrived)
                for index, pin in zip(below, loaded, strict=True):
                    pins[index] = pin
            below = sorted([*below, *self.ns._fetch_absent(keys, pins)])
            places = []
            run = 0
            for pin in pins:
                if pin is None or len(pin) != self.layout.block_bytes:
                    break
                if run not in copied:
                    places.append(self._place(run, first, pin))
                run += 1
            self._copier.scatter(places, out)
            return run, sum(index < run for index in below)
        finally:
            _release(pins)

    def _place(self, index: int, first: int, value: Pin | memoryview) -> tuple[int, Words]:
        """The token in `out` at which block `first + index` starts, and the block as an array."""
        block = np.frombuffer(memoryview(value), self.layout.words).reshape(self.layout.block_shape)
        return (first + index) * self.layout.block_tokens, block

    def _pin(self, keys: Sequence[bytes]) -> tuple[list[Pin | None], list[int]]:
        """Pin the blocks that are in memory, in the order in which the policy evicts the head last.

        Returns a pin or None for each key, and the indices of those that lie below memory only.
        """
        if self._head_first:
            return self.ns._space.pin_many(keys)
        pins, below = self.ns._space.pin_many(keys[::-1])
        return pins[::-1], sorted(len(keys) - 1 - index for index in below)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._stats[name] += amount


class Match:
    """The longest cached prefix of some tokens, as the index saw it; nothing is loaded or claimed yet."""

    def __init__(self, prefixes: PrefixCache, keys: list[bytes]) -> None:
        self._prefixes = prefixes
        self.keys = keys

    @property
    def tokens(self) -> int:
        """How many tokens matched, a multiple of the layout's block_tokens."""
        return len(self.keys) * self._prefixes.layout.block_tokens

    def load(self, out: Words | None = None, *, max_tokens: int | None = None) -> LoadedKV:
        """Copy the prefix into `out`, or into a new array, and return what was really there.

        `out` is writable and of the layout's words, [layers, 2, kv_heads, tokens, head_dim] with room for the
        matched tokens; it may be strided. At most `max_tokens` are loaded. The result is shorter than the match
        where blocks were evicted, damaged or unreachable meanwhile; that is counted and never an error, and what
        `out` then holds behind the loaded tokens has no meaning. Raises InvalidValue for an `out` that doesn't fit.
        """
        keys = self.keys
        if max_tokens is not None:
            keys = keys[: max(0, max_tokens) // self._prefixes.layout.block_tokens]
        return self._prefixes._load(keys, out)


class _Copier:
    """Copies blocks into their places, in several threads where it is worth waking them."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def scatter(self, places: Sequence[tuple[int, Words]], out: Words) -> None:
        """Copy blocks, [layers, 2, kv_heads, block_tokens, head_dim] each, to `out`, each from its token on."""
        workers = min(self._threads, len(places))
        if workers < 2 or sum(block.nbytes for _, block in places) < _PARALLEL_BYTES:
            _scatter(places, out)
            return
        if self._pool is None or self._pid != os.getpid():  # threads don't survive a fork
            self._pool = ThreadPoolExecutor(self._threads - 1, "kvstrata-copy")
            self._pid = os.getpid()
        step = -(-len(places) // workers)
        rest = [
            self._pool.submit(_scatter, places[start : start + step], out) for start in range(step, len(places), step)
        ]
        _scatter(places[:step], out)
        for part in rest:
            part.result()


def _release(pins: Sequence[Pin | None]) -> None:
    for pin in pins:
        if pin is not None:
            pin.release()


def _scatter(places: Sequence[tuple[int, Words]], out: Words) -> None:
    for token, block in places:
        np.copyto(out[:, :, :, token : token + block.shape[3]], block)


def _check_out(out: Words, layout: KVLayout, tokens: int) -> None:
    """Raise InvalidValue unless `tokens` tokens fit into `out`."""
    if not isinstance(out, np.ndarray) or out.dtype != layout.words or not out.flags.writeable:
        raise InvalidValue(f"out must be a writable numpy array of {layout.words}")
    expected = (layout.layers, 2, layout.kv_heads, tokens, layout.head_dim)
    if out.ndim != 5 or out.shape[:3] + out.shape[4:] != expected[:3] + expected[4:] or out.shape[3] < tokens:
        raise InvalidValue(f"out has shape {out.shape}; it must be {expected}, or longer in tokens")


def _layers_of(kv: Words | Sequence[tuple[Any, Any]], layout: KVLayout) -> list[tuple[Words, Words]]:
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
