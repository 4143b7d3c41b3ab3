"""Copying the blocks of a prefix to where they are wanted, from whichever tier they lie in."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstrata.copying import Copiers
from kvstrata.errors import TierError
from kvstrata.keys import KVLayout
from kvstrata.movement.cost import Prefill, worth_loading
from kvstrata.prefix_blocks import Words, check_out, place_blocks

if TYPE_CHECKING:
    from kvstrata._core import Pin
    from kvstrata.namespace import Namespace

__all__ = ["LoadedKV", "PrefixLoader", "StoredHead", "Tally", "release"]

_BATCH_BYTES, _BATCH_BLOCKS = 256 << 20, 1024
"""How much is pinned at once: enough for any queue depth, a bound on what a load claims."""

_MOST_KEPT = 4096
"""Blocks that a store keeps until its end; half of what a client can pin."""

_PROBE_EVERY, _PROBE_BLOCKS = 16, 8
"""Of so many times that something is skipped because its tier is slow, once so many blocks of it are loaded."""


@dataclass(frozen=True)
class LoadedKV:
    """What a load really brought.

    tokens: length of the loaded prefix, maybe 0; a multiple of the layout's block_tokens, but for a whole session.
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


class Tally:
    """Numbers by name, for all threads."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._numbers = dict.fromkeys(names, 0)

    def add(self, **amounts: int) -> None:
        """Add to numbers."""
        with self._lock:
            for name, amount in amounts.items():
                self._numbers[name] = self._numbers.get(name, 0) + amount

    def snapshot(self) -> dict[str, int]:
        """Return all numbers."""
        with self._lock:
            return dict(self._numbers)


class PrefixLoader:
    """Loads blocks of one layout from a namespace. Thread-safe."""

    def __init__(self, ns: Namespace, layout: KVLayout, tally: Tally, threads: int | None, prefill: Prefill) -> None:
        self.ns = ns
        self.layout = layout
        self.tally = tally
        self.prefill = prefill
        self._skips = itertools.count(1)
        # "auto" takes blocks that come head to tail for one use of a prefix. All others evict sooner what came sooner.
        self.head_first = ns._options.policy == "auto"
        self._copiers = Copiers(threads)

    def worthwhile(self, keys: list[bytes], elsewhere: Mapping[int, str]) -> list[bytes]:
        """Return the head of a prefix that is sooner loaded than computed: all of it where no prefill rate is known.

        What lies in memory counts as there; `elsewhere` names the tiers of blocks that aren't on this host. Now and
        then some more is loaded, to find out whether that is still slow.
        """
        token_s = self.prefill.token_s
        if token_s is None or not keys:
            return keys
        cache, disk = self.ns._cache, self.ns._cache.below
        places: list[tuple[str, int] | None] = [
            (disk.name, size) if size else None for size in disk.sizes(self.ns._space.id, keys)
        ]
        for index, tier in elsewhere.items():
            if index < len(keys) and places[index] is None and not self.ns._space.contains(keys[index]):
                places[index] = tier, self.layout.value_bytes
        count = worth_loading(places, cache.tiers.cost.seconds, token_s * self.layout.block_tokens)
        if count < len(keys) and next(self._skips) % _PROBE_EVERY == 0:
            below = [index for index in range(count, len(keys)) if places[index]][:_PROBE_BLOCKS]
            count = below[-1] + 1
            self.tally.add(probes=1)
        blocks = len(keys) - count
        skipped = [place[0] for place in places[count:] if place is not None]
        from_disk = skipped.count(disk.name)
        if blocks:
            self.tally.add(
                skips=1,
                skipped_tokens=blocks * self.layout.block_tokens,
                skipped_tokens_memory=(blocks - len(skipped)) * self.layout.block_tokens,
                skipped_tokens_disk=from_disk * self.layout.block_tokens,
                skipped_tokens_remote=(len(skipped) - from_disk) * self.layout.block_tokens,
            )
        return keys[:count]

    def load(self, keys: Sequence[bytes], out: Words | None) -> LoadedKV:
        """Copy the leading run of blocks that is there to `out`, or to a new array."""
        layout = self.layout
        wanted = len(keys) * layout.block_tokens
        if out is None:
            out = np.empty((layout.layers, 2, layout.kv_heads, wanted, layout.head_dim), layout.words)
        else:
            check_out(out, layout, wanted)
        done = disk_blocks = 0
        batch = max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // layout.block_bytes))
        while done < len(keys):
            wave = keys[done : done + batch]
            try:
                got, from_disk = self._load_wave(wave, out, done)
            except TierError:
                self.tally.add(load_errors=1)
                break
            done += got
            disk_blocks += from_disk
            if not got:
                break
        tokens = done * layout.block_tokens
        nbytes = done * layout.block_bytes
        self.tally.add(loads=1, loaded_tokens=tokens, loaded_bytes=nbytes, short_loads=int(done < len(keys)))
        return LoadedKV(tokens, out[:, :, :, :tokens], nbytes, disk_blocks)

    def _load_wave(self, keys: Sequence[bytes], out: Words, first: int) -> tuple[int, int]:
        """Copy the leading run of `keys` that is there to block `first` of `out` and on.

        Returns the length of the run and how many of it came from below memory.
        """
        pins, below = self.pin(keys)
        layout = self.layout
        copied: set[int] = set()

        def arrived(position: int, value: Pin | memoryview) -> None:
            """Copy a block while others are still being read."""
            if len(value) == layout.value_bytes:
                place_blocks(out, [(first + below[position], value)], layout)
                copied.add(below[position])

        try:
            if below:
                loaded = self.ns._load([keys[index] for index in below], arrived)
                for index, pin in zip(below, loaded, strict=True):
                    pins[index] = pin
            below = sorted([*below, *self.ns._fetch_absent(keys, pins)])
            left = []
            run = 0
            for pin in pins:
                if pin is None or len(pin) != layout.value_bytes:
                    break
                if run not in copied:
                    left.append((first + run, pin))
                run += 1
            self._copiers.share(lambda block: place_blocks(out, [block], layout), left, len(left) * layout.value_bytes)
            return run, sum(index < run for index in below)
        finally:
            release(pins)

    def pin(self, keys: Sequence[bytes]) -> tuple[list[Pin | None], list[int]]:
        """Pin the blocks that are in memory, in the order in which the policy evicts the head last.

        Returns a pin or None for each key, and the indices of those that lie below memory only.
        """
        if self.head_first:
            return self.ns._space.pin_many(keys)
        pins, below = self.ns._space.pin_many(keys[::-1])
        return pins[::-1], sorted(len(keys) - 1 - index for index in below)


class StoredHead:
    """What has been stored of a prefix so far: in a cache of memory alone, a long one must not push out its own head.

    Blocks that are added stay until the end of the `with` block, where there is no disk for them to go to; that isn't
    taken for a use of theirs.
    """

    def __init__(self, ns: Namespace) -> None:
        self._ns = ns
        self._pins: list[Pin | None] | None = None if ns._cache.options.disk else []

    def add(self, keys: Sequence[bytes]) -> None:
        """Keep blocks that were stored, or were there."""
        if self._pins is not None:
            keys = keys[: _MOST_KEPT - len(self._pins)]
            self._pins += self._ns._space.pin_many(keys, uses=False)[0]

    def __enter__(self) -> StoredHead:
        return self

    def __exit__(self, *_: object) -> None:
        release(self._pins or ())


def release(pins: Sequence[Pin | None]) -> None:
    """Let go of pins."""
    for pin in pins:
        if pin is not None:
            pin.release()
