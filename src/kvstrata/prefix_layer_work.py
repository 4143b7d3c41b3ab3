"""The background of loading a prefix layer by layer: claims blocks, reads, checks and copies them, group by group."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvstrata import _core
from kvstrata.errors import CacheClosed, CorruptRecord, TierError
from kvstrata.prefix_blocks import Words, layer_sums, place_blocks
from kvstrata.prefix_loading import PrefixLoader, release
from kvstrata.record import PAGE
from kvstrata.threads import new_thread

if TYPE_CHECKING:
    from kvstrata._core import Pin
    from kvstrata.tiers.blockio import OpenSegments
    from kvstrata.tiers.partial import Part, PartLoader

__all__ = ["LayerWork", "layer_groups"]

_FIRST_READ, _LATER_READ = 32 << 10, 128 << 10
"""Bytes that a read should have at least, the first ones and the later ones: the fewer, the slower is the device."""
_FIRST_PART, _LATER_PART = 10, 8
"""Into at least so many groups the layers are cut: a group is waited for as a whole, and then computed with."""
_MOST_PINNED = 4096  # blocks; half of what a client can pin
_AT_ONCE = 32  # blocks that are loaded as a whole, or copied, in one go
_MOST_PIECES = 16  # read in one call


def layer_groups(layers: int, layer_bytes: int) -> list[int]:
    """Return how many layers are there after each group of reads; `layer_bytes` are those of one layer in a block.

    Few at first, so that computing starts early; then twice as many at a time, until a read is worth its overhead;
    never so many that the wait for a group is much of the whole; at the end one, since what is computed with the last
    group overlaps with nothing.
    """
    first = min(-(-_FIRST_READ // layer_bytes), -(-layers // _FIRST_PART))
    later = max(first, min(-(-_LATER_READ // layer_bytes), -(-layers // _LATER_PART)))
    ends = [min(first, layers)]
    while ends[-1] < layers:
        ends.append(min(layers, ends[-1] + min(later, ends[-1])))
    while len(ends) > 1 and (last := ends[-1] - ends[-2]) > 1:
        ends.insert(-1, ends[-1] - last // 2)
    return ends


class _Run:
    """Blocks that lie in the same segment and are read together."""

    def __init__(self, members: list[int]) -> None:
        self.members = members
        self.lock = threading.Lock()
        self.arrived: set[int] = set()  # groups that were read
        self.checked = 0  # so many of them, from the first on, were checked and copied


class LayerWork:
    """The part of a load that goes on in the background. Fields below `_changed` change under it."""

    def __init__(self, loader: PrefixLoader, keys: list[bytes], out: Words) -> None:
        self._loader = loader
        self._ns = loader.ns
        self._layout = loader.layout
        self._keys = keys
        self._out = out
        self._ends = layer_groups(loader.layout.layers, loader.layout.layer_bytes)
        self._pins: list[Pin | None] = []
        self._parts: dict[int, Part] = {}
        self._sums: dict[int, npt.NDArray[np.uint32]] = {}
        self._faults: dict[int, int | CorruptRecord] = {}
        self._thread = new_thread(self._run, "kvstrata-layers")
        self.below: set[int] = set()
        self._changed = threading.Condition()
        self.good = len(keys)
        self.closed = False
        self._ready = 0  # groups of which everything is there
        self._pending = [1] * len(self._ends)  # pieces of work of each group; one is that it isn't planned yet
        self._finished = self._stopped = False
        self._failure: BaseException | None = None

    # ---- For the iterator

    def start(self) -> None:
        """Begin; raises CacheClosed."""
        if not self._keys:
            self._finished = True
            return
        if not self._ns._cache.tiers.running.add(self):
            raise CacheClosed("this cache is closed")
        self._thread.start()

    def wait_for(self, layer: int, believed: int) -> tuple[int, bool]:
        """Wait for a layer, or until fewer blocks are good than is believed.

        Returns how many are, and whether there is another layer for them.
        """
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                if self._stopped and layer < self._layout.layers:
                    raise CacheClosed("this cache is closed")
                if self.closed or not self.good or layer == self._layout.layers or self.good < believed:
                    return self.good, bool(self.good) and layer < self._layout.layers and not self.closed
                if self._ready and layer < self._ends[self._ready - 1]:
                    return self.good, True
                self._changed.wait()

    def cancel(self) -> None:
        """Have everything end soon."""
        with self._changed:
            if not self._finished:
                self.closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until nothing is held any more."""
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        """End early, because the cache is being closed."""
        with self._changed:
            self._stopped = not self._finished
        self.cancel()
        self.join()

    # ---- In the background

    def _run(self) -> None:
        source: PartLoader | None = None
        files: OpenSegments | None = None
        whole: threading.Thread | None = None
        try:
            source = self._ns._cache.below.parts()
            files = source.opened() if source else None
            jobs, rest = self._plan(source, files)
            if rest:
                whole = new_thread(self._load_rest, "kvstrata-layers", rest)
                whole.start()
            if source is not None and self._parts:
                self._run_measured(source, jobs)
            else:
                for job in jobs:
                    job()
        except TierError:
            self._loader.tally.add(load_errors=1)
            self._lose(0)
        except BaseException as error:  # noqa: BLE001 - the caller of next() has to hear of it
            self._fail(error)
        finally:
            if whole is not None:
                whole.join()
            if files is not None:
                files.close()
            if source is not None:
                self._publish(source)
            release(self._pins)
            self._end()

    def _run_measured(self, source: PartLoader, jobs: list[Callable[[], None]]) -> None:
        cost = self._ns._cache.tiers.cost
        started = cost.clock()
        source.run(jobs)
        if not self.closed and self.good == len(self._keys):  # else not all was read
            cost.observe(source.name, sum(part.load.length for part in self._parts.values()), cost.clock() - started)

    def _plan(
        self, source: PartLoader | None, files: OpenSegments | None
    ) -> tuple[list[Callable[[], None]], list[int]]:
        """Claim all blocks; returns what is to be done, group by group, and the blocks to be loaded as a whole."""
        head = self._keys[:_MOST_PINNED]
        self._pins, below = self._loader.pin(head)
        pinned = [i for i, pin in enumerate(self._pins) if pin is not None]
        if source is not None and below:
            length = _core.record_bytes(len(head[0]), self._layout.value_bytes)
            for part in source.begin(self._ns._space.id, [head[i] for i in below], length):
                self._parts[below[part.position]] = part
        self.below = set(range(len(self._keys))) - set(pinned)
        rest = sorted(self.below - set(self._parts))
        for index in pinned:
            pin = self._pins[index]
            if pin is not None and len(pin) != self._layout.value_bytes:
                self._lose(index)
        by_segment: dict[int, list[int]] = {}
        for index, part in sorted(self._parts.items()):
            by_segment.setdefault(part.segment, []).append(index)
        size = max(1, min(_MOST_PIECES, len(self._parts) // (2 * source.depth if source else 1)))
        runs = [_Run(members[i : i + size]) for members in by_segment.values() for i in range(0, len(members), size)]
        runs.sort(key=lambda run: run.members[0])
        copies = [pinned[i : i + _AT_ONCE] for i in range(0, len(pinned), _AT_ONCE)]
        jobs: list[Callable[[], None]] = []
        for group in range(len(self._ends)):
            of_group = [self._job(self._read, group, run, files, source) for run in runs]
            of_group += [self._job(self._copy, group, members) for members in copies]
            with self._changed:
                self._pending[group] += len(of_group) + (1 if rest else 0) - 1
            jobs += of_group
        return jobs, rest

    def _job(self, work: Callable[..., None], *given: object) -> Callable[[], None]:
        def job() -> None:
            try:
                if not self.closed:
                    work(*given)
            except BaseException as error:  # noqa: BLE001 - the caller of next() has to hear of it
                self._fail(error)

        return job

    def _layers_of(self, group: int) -> range:
        return range(self._ends[group - 1] if group else 0, self._ends[group])

    def _copy(self, group: int, members: list[int]) -> None:
        """Copy layers of blocks that are pinned."""
        pins = [(index, pin) for index in members if index < self.good and (pin := self._pins[index]) is not None]
        place_blocks(self._out, pins, self._layout, self._layers_of(group))
        self._done(group)

    def _read(self, group: int, run: _Run, files: OpenSegments, source: PartLoader) -> None:
        """Read layers of blocks that lie in the same segment; check and copy what has come in a row."""
        members = [index for index in run.members if index < self.good]
        tail = (PAGE + self._layout.block_bytes) // PAGE * PAGE  # the page on which the trailer begins
        start, stop = self._end_of(group - 1, tail), self._end_of(group, tail)
        wanted = [(index, tail, self._parts[index].load.length) for index in members if not group]
        wanted += [(index, start, stop) for index in members if start < stop]
        if wanted:
            errors = files.fill([self._parts[index].piece(start, stop) for index, start, stop in wanted])
            for (index, _, _), error in zip(wanted, errors, strict=True):
                if error:
                    self._faults.setdefault(index, error)
                    self._lose(index)
        with run.lock:
            run.arrived.add(group)
            while run.checked in run.arrived:  # an earlier group may come later
                self._check(run.members, run.checked, source)
                self._done(run.checked)
                run.checked += 1

    def _end_of(self, group: int, tail: int) -> int:
        """To which byte of a record, a whole page, everything is there after a group."""
        if group < 0:
            return 0
        return min(-(-(PAGE + self._ends[group] * self._layout.layer_bytes) // PAGE) * PAGE, tail)

    def _check(self, members: list[int], group: int, source: PartLoader) -> None:
        """Copy layers of blocks that are what was stored, and lose the others."""
        for index in members:
            if not group and index < self.good:
                try:
                    self._sums[index] = self._sums_of(index, source)
                except CorruptRecord as corrupt:
                    self._damaged(index, corrupt.with_traceback(None))  # its frames hold views of the block
        layers, tokens = self._layers_of(group), self._layout.block_tokens
        good = [index for index in members if index < self.good]
        blocks = [(self._parts[index].buffer[PAGE:], self._sums[index], index * tokens) for index in good]
        found = _core.place_layers(self._out, blocks, tokens, layers.start, layers.stop)
        for index, layer in zip(good, found, strict=True):
            if layer >= 0:
                self._damaged(index, CorruptRecord(f"layer {layer} of a block is damaged"))

    def _damaged(self, index: int, corrupt: CorruptRecord) -> None:
        self._faults.setdefault(index, corrupt)
        self._lose(index)

    def _sums_of(self, index: int, source: PartLoader) -> npt.NDArray[np.uint32]:
        """Return the checksums of a block's layers; raises CorruptRecord unless it is the right block's record."""
        layout, part = self._layout, self._parts[index]
        record = source.header(part)
        if record.codec or record.stored_len != layout.value_bytes or record.payload_offset != PAGE:
            raise CorruptRecord("a block of another form lies in its place")
        return layer_sums(self._trailer(part), part.load.key)

    def _trailer(self, part: Part) -> memoryview:
        return part.buffer[PAGE + self._layout.block_bytes : PAGE + self._layout.value_bytes]

    def _load_rest(self, indices: list[int]) -> None:
        """Load blocks that can't come piece by piece, since others are bringing them up, or they lie elsewhere."""
        for start in range(0, len(indices), _AT_ONCE):
            wave = [index for index in indices[start : start + _AT_ONCE] if index < self.good]
            if wave and not self.closed:
                self._job(self._load_whole, wave)()
        for group in range(len(self._ends)):
            self._done(group)

    def _load_whole(self, wave: list[int]) -> None:
        pins: Sequence[Pin | None] = ()
        try:
            pins = self._ns.pin_many([self._keys[index] for index in wave])
            for index, pin in zip(wave, pins, strict=True):
                if pin is None or len(pin) != self._layout.value_bytes:
                    self._lose(index)
                    break
                place_blocks(self._out, [(index, pin)], self._layout)
        except TierError:
            self._loader.tally.add(load_errors=1)
            self._lose(wave[0])
        finally:
            release(pins)

    def _publish(self, source: PartLoader) -> None:
        """Let the blocks that came stay in memory, head first, and let go of the others."""
        for index, part in sorted(self._parts.items()):
            fault = self._faults.get(index)
            try:
                if isinstance(fault, CorruptRecord):
                    source.damaged(part, fault)
                elif fault is not None:
                    source.unread(part, fault)
                elif self.closed or index >= self.good:
                    source.abort(part)
                else:
                    source.finish(part, self._payload_crc(index))
            except TierError:
                self._loader.tally.add(load_errors=1)  # all was given out that was wanted

    def _payload_crc(self, index: int) -> int:
        """Return the checksum of a block whose layers were all compared with theirs."""
        layers = _core.crc32c_of_parts(self._sums[index], self._layout.layer_bytes)
        return _core.crc32c(self._trailer(self._parts[index]), layers)

    # ---- What came and what was lost

    def _lose(self, index: int) -> None:
        with self._changed:
            self.good = min(self.good, index)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        traceback.clear_frames(error.__traceback__)  # they hold views of blocks
        with self._changed:
            self._failure = self._failure or error
            self.closed = True
            self._changed.notify_all()

    def _done(self, group: int) -> None:
        with self._changed:
            self._pending[group] -= 1
            before = self._ready
            while self._ready < len(self._ends) and not self._pending[self._ready]:
                self._ready += 1
            if self._ready > before:  # whoever waits takes the interpreter from those that read
                self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            blocks = len(self._keys)
            if self.closed:
                self.good = 0
            good = self.good
            self._finished = True
            self._changed.notify_all()
        self._loader.tally.add(
            loads=1,
            loaded_tokens=good * self._layout.block_tokens,
            loaded_bytes=good * self._layout.block_bytes,
            short_loads=int(good < blocks),
        )
