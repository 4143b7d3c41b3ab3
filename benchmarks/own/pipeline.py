"""Loading a prefix layer by layer while computing, beside loading and computing alone, and one after the other.

    python -m benchmarks pipeline

Computing is a loop of matrix products in numpy, on one thread, as long for each layer as loading all of them takes,
divided by their number; how many products that is, is measured in the same run.
"""

from __future__ import annotations

import threading
import time

import numpy as np

import kvstrata
from benchmarks.measure import Sample, Settings, Work, interleaved
from benchmarks.own.device import RawFile, drop_page_cache
from benchmarks.table import Row
from kvstrata import KVLayout, PrefixCache

MIB = 1 << 20
LAYERS = 30
READ = 128 << 10
SECTION = "Loading layer by layer"
REMARKS = [
    f"Layer by layer: a prefix of {LAYERS} layers, its blocks of 32 tokens all on disk, read with O_DIRECT; after each "
    "layer, products of matrices in numpy, on one thread, which together take about as long as the load. "
    "The larger of the two alone is taken from the same round.",
    '"Bare reads" are reads of 128 KiB, 8 at a time, of as many bytes, with which nothing is done: what overlapping '
    "costs on this machine before anything is copied, checked or kept.",
]
LAYOUTS = {"64 KiB of a layer in a block": 8, "24 KiB of a layer in a block": 3}


def rows(settings: Settings) -> list[Row]:
    """Measure it for two sizes of blocks."""
    return [row for number, what in enumerate(LAYOUTS) for row in _rows(settings, what, LAYOUTS[what], number)]


def _rows(settings: Settings, what: str, kv_heads: int, number: int) -> list[Row]:
    layout = KVLayout(model="bench", dtype="bfloat16", layers=LAYERS, kv_heads=kv_heads, head_dim=64, block_tokens=32)
    blocks = settings.size(256 * MIB) // layout.block_bytes
    tokens = list(range(blocks * layout.block_tokens))
    shape = (LAYERS, 2, kv_heads, len(tokens), layout.head_dim)
    kv = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    out = np.ones_like(kv)
    place = settings.directory / f"pipeline-{number}"
    with (
        kvstrata.open(place, memory="768MiB", disk="2GiB") as cache,
        RawFile(settings.directory / "raw", request=READ, requests=blocks * layout.block_bytes // READ) as raw,
    ):
        raw.write()
        prefixes = PrefixCache.open(cache, layout)
        if prefixes.store(tokens, kv) != blocks:
            raise AssertionError("there was no room for all blocks")
        cache.flush()

        def go_cold() -> None:
            cache.demote()
            drop_page_cache(place)

        def load() -> None:
            if prefixes.match(tokens).load(out).disk_blocks != blocks:
                raise AssertionError("a block was not on disk")

        compute = _Products()
        alone = interleaved(Work(load, 1, go_cold), repeats=settings.repeats(4))[0].median
        compute.calibrate(alone / LAYERS)

        def by_layers() -> None:
            layers = prefixes.match(tokens).load_layers(out)
            for _ in layers:
                compute()
            if layers.loaded.disk_blocks != blocks:
                raise AssertionError("a block was not on disk")

        def layers_alone() -> None:
            for _ in prefixes.match(tokens).load_layers(out):
                pass

        def compute_alone() -> None:
            for _ in range(LAYERS):
                compute()

        def one_after_the_other() -> None:
            load()
            compute_alone()

        def bare_reads() -> None:
            raw.read(range(raw.requests))

        def bare_reads_and_compute() -> None:
            reading = threading.Thread(target=bare_reads)
            reading.start()
            compute_alone()
            reading.join()

        works = [by_layers, load, compute_alone, one_after_the_other, layers_alone, bare_reads, bare_reads_and_compute]
        pipelined, loading, computing, serial, unused, bare, bare_pipelined = interleaved(
            *(Work(work, 1, go_cold) for work in works), repeats=settings.repeats(16)
        )
        if not np.array_equal(out, kv):
            raise AssertionError("what was loaded is not what was stored")
    larger = Sample(tuple(map(max, loading.values, computing.values)))
    larger_bare = Sample(tuple(map(max, bare.values, computing.values)))
    head = f"{blocks * layout.block_bytes // MIB} MiB, {what}: "
    return [
        Row(
            SECTION,
            f"{head}load_layers and compute",
            pipelined,
            "s",
            "the larger of both alone",
            larger,
            at_least=1 / 1.15,
        ),
        Row(SECTION, f"{head}load_layers and compute", pipelined, "s", "load, then compute", serial),
        Row(SECTION, f"{head}load_layers alone", unused, "s", "load alone", loading),
        Row(SECTION, f"{head}compute alone", computing, "s", "load alone", loading),
        Row(SECTION, f"{head}bare reads and compute", bare_pipelined, "s", "the larger of both alone", larger_bare),
    ]


class _Products:
    """So many products of matrices; one thread computes them, and numpy lets others run meanwhile."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        # Of integers, numpy multiplies by itself, on one thread; a BLAS would take all that there are.
        self._left, self._right = (rng.integers(0, 9, (96, 96), np.int32) for _ in range(2))
        self._result = np.empty((96, 96), np.int32)
        self._count = 1

    def calibrate(self, seconds: float) -> None:
        """Make a call take about that long."""
        self._count = 20
        took = sorted(self._timed() for _ in range(21))[10]
        self._count = max(1, round(seconds / took * self._count))

    def _timed(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def __call__(self) -> None:
        for _ in range(self._count):
            np.matmul(self._left, self._right, out=self._result)
