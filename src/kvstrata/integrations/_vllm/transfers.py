"""Loads and stores of vLLM's blocks under way, and how each ends early: nothing wrong is stored or left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from kvstrata.integrations._blocks import PIECE, EngineBlocks, Withdrawn

if TYPE_CHECKING:
    from kvstrata._core import Pin
    from kvstrata.integrations._vllm.memory import BlockMemory
    from kvstrata.integrations._vllm.messages import Load, Store

__all__ = ["Loading", "Storing"]

_GROUPS = 8  # of layers, which a layer-wise load brings one after the other
_TOGETHER = 4  # blocks that are copied in one call


class Storing:
    """A store under way. Blocks at the positions `_gone` aren't what they were."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ended = threading.Event()
        self.stored = 0
        self._gone: frozenset[int] = frozenset()

    def withdraw(self, fresh: set[int]) -> None:
        """Store nothing of these any more: what is copied from now on isn't taken for the block."""
        self._gone |= {position for position, block in enumerate(self.store.blocks) if block in fresh}

    def filled_by(self, read: Callable[[int, memoryview], None]) -> Callable[[int, memoryview], None]:
        """Return what copies a block by `read`, and raises Withdrawn where it was too late."""

        def fill(position: int, memory: memoryview) -> None:
            read(self.store.blocks[position], memory)
            if position in self._gone:  # looked at after copying: it is set before the block is overwritten
                raise Withdrawn

        return fill


class Loading:
    """A load under way. Once it is abandoned nothing more is written to its blocks, and soon nothing more is read."""

    def __init__(self, load: Load, blocks: EngineBlocks, memory: BlockMemory, deadline: float) -> None:
        self.load = load
        self.failed: set[int] = set()
        self.ended = threading.Event()
        self._blocks = blocks
        self._memory = memory
        self._deadline = deadline
        self._changed = threading.Condition()  # guards what follows
        self._abandoned = False
        self._writing = 0  # so many threads are writing to blocks
        self._layers = 0  # so many have come

    def run(self) -> None:
        """Load all layers of each block as it arrives."""
        got = [False] * len(self.load.keys)
        try:
            got = self._blocks.load_each(self.load.keys, self._take, wanted=self._is_wanted)
        finally:
            self._end([block for block, there in zip(self.load.blocks, got, strict=True) if not there])

    def run_at_once(self) -> None:
        """Load what is in memory, and wait for nothing: in the caller's thread, whom nobody else has to wake."""
        missing = self.load.blocks
        try:
            with self._blocks.pinned(self.load.keys, here=True) as pins:
                missing = self._write(pins, 1)
        finally:
            self._end(missing)

    def run_layerwise(self) -> None:
        """Load some layers of all blocks, and then the next ones."""
        missing = self.load.blocks
        try:
            with ExitStack() as held:
                missing = self._write(self._pin(held), _GROUPS)
        finally:
            self._end(missing)

    def _pin(self, held: ExitStack) -> list[Pin | None]:
        pins: list[Pin | None] = [None] * len(self.load.keys)
        for start in range(0, len(pins), PIECE):
            if not self._is_wanted():
                break
            piece = slice(start, start + PIECE)
            pins[piece] = held.enter_context(self._blocks.pinned(self.load.keys[piece]))
        return pins

    def _write(self, pins: Sequence[Pin | None], groups: int) -> list[int]:
        """Copy what is pinned to the engine's blocks, in so many groups of layers; returns the blocks that it isn't."""
        there: list[tuple[int, memoryview]] = []
        missing: list[int] = []
        for block, pin in zip(self.load.blocks, pins, strict=True):
            if pin is not None and len(pin) == self._memory.block_bytes:
                there.append((block, memoryview(pin)))
            else:
                missing.append(block)
        runs = [there[i : i + _TOGETHER] for i in range(0, len(there), _TOGETHER)]
        step = -(-self._memory.layers // groups)
        for first in range(0, self._memory.layers, step):
            layers = range(first, min(first + step, self._memory.layers))
            with self._while_wanted() as wanted:
                if not wanted:
                    return self.load.blocks
                self._write_layers(runs, layers, len(there))
            if layers.stop < self._memory.layers:
                with self._changed:
                    self._layers = layers.stop
                    self._changed.notify_all()
        for _, data in there:
            data.release()
        return missing

    def _write_layers(self, runs: Sequence[Sequence[tuple[int, memoryview]]], layers: range, blocks: int) -> None:
        nbytes = blocks * self._memory.block_bytes * len(layers) // self._memory.layers
        self._blocks.copiers.share(lambda run: self._memory.write(run, layers), runs, nbytes)

    def wait_for(self, layer: int) -> None:
        """Return when a layer has come, all has ended, or it has been abandoned, since it takes too long."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._layers > layer or self.ended.is_set(), self._deadline - time.monotonic()
            )
            there = self._layers > layer
        if not there:
            self.abandon(time.monotonic())

    def abandon(self, now: float) -> bool:
        """End it if its time is over; returns whether it was. All of its blocks count as failed then."""
        if now < self._deadline:
            return False
        with self._changed:
            if not self.ended.is_set():
                self._abandoned = True
                self._changed.wait_for(lambda: not self._writing)
                self.failed = set(self.load.blocks)
                self.ended.set()
        return True

    def _is_wanted(self) -> bool:
        return not self._abandoned  # without the lock: it may take a piece until it is seen

    def _take(self, position: int, data: memoryview) -> bool:
        if data.nbytes != self._memory.block_bytes:
            return False
        with self._while_wanted() as wanted:
            if wanted:
                self._memory.write([(self.load.blocks[position], data)])
            return wanted

    @contextmanager
    def _while_wanted(self) -> Iterator[bool]:
        """Say whether blocks may still be written; it isn't abandoned before that has ended."""
        with self._changed:
            wanted = not self._abandoned
            self._writing += wanted
        try:
            yield wanted
        finally:
            with self._changed:
                self._writing -= wanted
                self._changed.notify_all()

    def _end(self, missing: list[int]) -> None:
        with self._changed:
            if not self._abandoned:
                self.failed = set(missing)
                self._layers = self._memory.layers
                self.ended.set()
            self._changed.notify_all()
