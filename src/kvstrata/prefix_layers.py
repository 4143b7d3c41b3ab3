"""Loading a prefix layer by layer: the model computes with the first ones while the last ones are being read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from kvstrata.errors import PrefixShortened, TierUnavailable
from kvstrata.prefix_blocks import Words, check_out
from kvstrata.prefix_layer_work import LayerWork
from kvstrata.prefix_loading import LoadedKV, PrefixLoader

__all__ = ["LayerLoad"]


class LayerLoad(Iterator[tuple[int, Words]]):
    """The layers of a prefix, one after the other: (layer, words), words being [2, kv_heads, tokens, head_dim].

    Words are a view of `out`, checked: a layer of a block that comes from below memory is compared with its own
    checksum before it is given out, and what is in memory was checked when it came there. Reading starts at once and
    goes on in the background, however slowly layers are taken.

    Blocks that are found to be missing or damaged before the first layer is given out make the prefix shorter, as with
    `Match.load`. When that happens later, the next step raises PrefixShortened, once: layers that were given out
    before are right for its `tokens` tokens, too, but what was computed with more of them is not to be used. Iteration
    may go on after that, with the layers that are left for the tokens that are left. When it has ended, the first
    `tokens` tokens of `out` are there in all layers.

    Removing blocks meanwhile (delete, clear) may or may not have an effect on a load that has begun.

    `close()`, also at the end of a with statement, ends it early and lets go of everything: pins, memory that was
    claimed, reads under way. Exhausted or left to the garbage collector it does that by itself. Threads may share one;
    each layer goes to one of them. In a forked child it raises TierUnavailable, and CacheClosed when the cache was
    closed under it.
    """

    def __init__(self, loader: PrefixLoader, keys: Sequence[bytes], out: Words | None) -> None:
        layout = loader.layout
        wanted = len(keys) * layout.block_tokens
        if out is None:
            out = np.empty((layout.layers, 2, layout.kv_heads, wanted, layout.head_dim), layout.words)
        else:
            check_out(out, layout, wanted)
        self._layout = layout
        self._out = out
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._layer = 0
        self._told = len(keys)  # blocks that the caller believes in
        self._work = LayerWork(loader, list(keys), out)
        self._work.start()

    def __iter__(self) -> LayerLoad:
        return self

    def __next__(self) -> tuple[int, Words]:
        if self._pid != os.getpid():
            raise TierUnavailable("this load belongs to the process that forked this one")
        with self._lock:
            good, more = self._work.wait_for(self._layer, self._told if self._layer else -1)
            if self._layer and good < self._told and not self._work.closed:
                self._told = good
                raise PrefixShortened(good * self._layout.block_tokens, self._layer)
            if not more:
                self._work.join()
                raise StopIteration
            self._told = good
            layer = self._layer
            self._layer += 1
        return layer, self._out[layer, :, :, : good * self._layout.block_tokens]

    @property
    def tokens(self) -> int:
        """Tokens that are there in all layers, once iteration has ended; before, those that may be, and never fewer.

        After an early close it is 0.
        """
        return self._work.good * self._layout.block_tokens

    @property
    def loaded(self) -> LoadedKV:
        """What was loaded, as `Match.load` returns it, once iteration has ended."""
        blocks = self._work.good
        tokens = blocks * self._layout.block_tokens
        below = sum(index < blocks for index in self._work.below)
        return LoadedKV(tokens, self._out[:, :, :, :tokens], blocks * self._layout.block_bytes, below)

    def close(self) -> None:
        """End it, and return when nothing is held or read any more."""
        if self._pid != os.getpid():
            return
        if self._layer < self._layout.layers:
            self._work.cancel()
        self._work.join()

    def __enter__(self) -> LayerLoad:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        work = getattr(self, "_work", None)
        if work is not None and self._layer < self._layout.layers:
            work.cancel()
