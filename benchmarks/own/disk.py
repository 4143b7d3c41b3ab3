"""The disk tier beside the raw device: cold reads and sustained writes, at the same queue depth."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kvstrata
from benchmarks.measure import Sample, Settings, Work, interleaved
from benchmarks.own.device import RawFile, drop_page_cache
from benchmarks.table import Row

KIB, MIB = 1 << 10, 1 << 20
DEPTH = 8  # transfers at a time, as the disk tier's
BATCH = 64
SECTION = "Disk"
REMARKS = [
    f"Cold: not in memory, page cache dropped. Reads come in batches of {BATCH} random records; the device "
    "is read in one go, without a pause between batches. Bytes of values count, not those of headers.",
    "The raw device reads into, and writes from, as much memory as the records take, in pages of 4 KiB as the memory "
    "tier's are. A few buffers that stay in the processor's caches make it faster, but nobody keeps what was read: "
    "the lines without a target.",
    "Raw writes go to a file whose blocks were allocated before the clock started; kvstrata allocates as it goes.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure all of it."""
    return [*_reads(settings), *_writes(settings), *_small(settings)]


def _reads(settings: Settings) -> list[Row]:
    # How the pages of a mapping lie in physical memory decides much, and is another at each opening.
    openings = [_read_once(settings, number) for number in range(settings.repeats(5))]
    pinned, copied, bare, hot, alone, bare_alone = (
        Sample(tuple(value for sample in samples for value in sample.values)) for samples in zip(*openings, strict=True)
    )
    what = "cold read of 1 MiB, "
    peer = f"raw O_DIRECT, {DEPTH} at a time"
    return [
        Row(SECTION, f"{what}pin_many", pinned, "B/s", peer, bare, at_least=0.9),
        Row(SECTION, f"{what}get_many", copied, "B/s", peer, bare, at_least=0.9),
        Row(SECTION, f"{what}pin_many", pinned, "B/s", f"{peer}, into few buffers", hot),
        Row(SECTION, f"{what}one at a time", alone, "B/s", "raw O_DIRECT, one at a time", bare_alone),
    ]


def _read_once(settings: Settings, number: int) -> list[Sample]:
    """Bytes per second, of kvstrata pinned and copied, raw into much and little memory, and of both one at a time."""
    count = 256
    keys = [b"%032d" % i for i in range(count)]
    outs = [np.ones(MIB, np.uint8) for _ in range(BATCH)]
    rng = np.random.default_rng(number)
    order = random.Random(number)
    place = settings.directory / f"reads-{number}"
    with (
        RawFile(settings.directory / "raw", requests=count, depth=DEPTH, buffers=count) as raw,
        RawFile(settings.directory / "raw-few", requests=count, depth=DEPTH) as few,
        RawFile(settings.directory / "raw-single", requests=count, depth=1, buffers=count) as single,
        kvstrata.open(place, memory=(count + 256) * MIB, disk=(count + 512) * MIB) as cache,
    ):
        for file in (raw, few, single):
            file.write()
        for key in keys:
            cache.put(key, rng.bytes(MIB))
        cache.flush()

        def go_cold() -> None:
            cache.demote()
            drop_page_cache(place)
            order.shuffle(keys)

        def pin_many() -> None:
            for batch in _batches(keys):
                for pin in cache.pin_many(batch):
                    _there(pin).release()

        def get_many() -> None:
            for batch in _batches(keys):
                if any(value is None for value in cache.get_many(batch, out=outs[: len(batch)])):
                    raise AssertionError("a record is not on disk")

        def one() -> None:
            for key in keys[:BATCH]:
                with cache.pin(key):
                    pass

        works = [
            Work(pin_many, count, go_cold),
            Work(get_many, count, go_cold),
            Work(lambda: raw.read(_shuffled(order, count)), count),
            Work(lambda: few.read(_shuffled(order, count)), count),
            Work(one, BATCH, go_cold),
            Work(lambda: single.read(_shuffled(order, count)[:BATCH]), BATCH),
        ]
        return [_rate(sample, MIB) for sample in interleaved(*works, repeats=4)]


def _writes(settings: Settings) -> list[Row]:
    count = settings.size(256)
    repeats = settings.repeats(12)
    rng = np.random.default_rng(0)
    values = [rng.bytes(MIB) for _ in range(count)]
    numbers = itertools.count()
    peer = f"raw O_DIRECT, {DEPTH} at a time"
    found = []
    for what, capacity, target in (
        ("sustained write of 1 MiB, put and flush", (count * (repeats + 4) + 512) * MIB, 0.85),
        ("the same, the disk tier full", 4 * count * MIB, None),
    ):
        path = settings.directory / f"writes-{next(numbers)}"
        with kvstrata.open(path, memory=(count + 256) * MIB, disk=capacity) as cache:

            def write(cache: kvstrata.Cache = cache) -> None:
                for value in values:
                    cache.put(b"%032d" % next(numbers), value)
                cache.flush()

            for _ in range(4 if target is None else 0):
                write()
            raw = _NewFile(settings.directory / "raw", count, count)
            few = _NewFile(settings.directory / "raw-few", count, DEPTH)
            works = [Work(file.write, 1, file.make, file.remove) for file in (raw, few)]
            samples = interleaved(Work(write), *works, repeats=repeats)
        ours, theirs, hotter = (_rate(sample, count * MIB) for sample in samples)
        found.append(Row(SECTION, what, ours, "B/s", peer, theirs, at_least=target))
        if target is not None:
            found.append(Row(SECTION, what, ours, "B/s", f"{peer}, from few buffers", hotter))
    return found


def _small(settings: Settings) -> list[Row]:
    count = settings.size(32_768)
    keys = [b"%032d" % i for i in range(count)]
    value = random.Random(0).randbytes(KIB)
    order = random.Random(0)
    place = settings.directory / "small"
    with (
        RawFile(settings.directory / "raw-small", request=4 * KIB, requests=count, depth=DEPTH) as raw,
        kvstrata.open(place, memory="512MiB", disk="1GiB") as cache,
    ):
        raw.write()

        def write() -> None:
            for batch in _batches(keys):
                cache.put_many(dict.fromkeys(batch, value))
            cache.flush()

        write()
        chosen = keys[: 32 * BATCH]

        def go_cold() -> None:
            cache.demote()
            drop_page_cache(place)
            chosen[:] = order.sample(keys, len(chosen))

        def read() -> None:
            for batch in _batches(chosen):
                if None in cache.get_many(batch):
                    raise AssertionError("a record is not on disk")

        reading, bare_reading = interleaved(
            Work(read, len(chosen), go_cold),
            Work(lambda: raw.read(order.sample(range(count), len(chosen))), len(chosen)),
            repeats=settings.repeats(12),
        )
        writing, bare_writing = interleaved(Work(write, count), Work(raw.write, count), repeats=settings.repeats(8))
    peer = f"raw O_DIRECT, 4 KiB, {DEPTH} at a time"
    return [
        Row(SECTION, f"cold read of 1 KiB, get_many of {BATCH}, each", reading, "s", peer, bare_reading),
        Row(
            SECTION,
            f"overwrite of 1 KiB, put_many of {BATCH} and flush, each",
            writing,
            "s",
            peer,
            bare_writing,
        ),
    ]


class _NewFile:
    """A raw file that is made anew for each round."""

    def __init__(self, path: Path, count: int, buffers: int) -> None:
        self._path = path
        self._count = count
        self._buffers = buffers

    def make(self) -> None:
        self._file = RawFile(self._path, requests=self._count, depth=DEPTH, buffers=self._buffers)

    def write(self) -> None:
        self._file.write()

    def remove(self) -> None:
        self._file.close()


def _there(pin: Any) -> Any:
    if pin is None:
        raise AssertionError("a record is not on disk")
    return pin


def _batches(keys: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [keys[i : i + BATCH] for i in range(0, len(keys), BATCH)]


def _shuffled(order: random.Random, count: int) -> list[int]:
    return order.sample(range(count), count)


def _rate(seconds: Sample, nbytes: int) -> Sample:
    return seconds.map(lambda took: nbytes / took)
