"""The memory tier: copies beside numpy.copyto, pins of any size, longest prefixes wherever records lie."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import kvstrata
from benchmarks.measure import Sample, Settings, Work, interleaved
from benchmarks.peers import open_peers
from benchmarks.table import Row

KIB, MIB = 1 << 10, 1 << 20
COPYTO = "numpy.copyto"
PREFIX_KEYS = 8192
REMARKS = [
    "The memory tier is the shared one, in /dev/shm, not the private one.",
    "Prefixes are looked up with the processor's own caches full of something else, as after a forward pass.",
    "Blocks are taken through Python, and between two of them the checksum of up to 8 MiB is computed, which leaves "
    "the processor's caches cold. What the core takes without both, core/tests/churn_test.cpp prints.",
    "copyto moves the same bytes over a working set of the same size, in turns with the calls beside it.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure all of it."""
    return [*_copies(settings), *_pins(settings), *_allocations(settings), *_prefixes(settings), *_index(settings)]


def _key(number: int) -> bytes:
    """A key as long as the digest of a block."""
    return b"%032d" % number


# ---- Copies --------------------------------------------------------------------------------------


def _copies(settings: Settings) -> list[Row]:
    count = settings.size(256)
    keys = [_key(i) for i in range(count)]
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 256, MIB, np.uint8) for _ in range(count)]
    outs = [np.ones(MIB, np.uint8) for _ in range(count)]
    with kvstrata.open(settings.directory / "copies", memory=2 * count * MIB + 64 * MIB, disk=0) as cache:

        def put() -> None:
            for key, value in zip(keys, values, strict=True):
                cache.put(key, value)

        def get() -> None:
            for key, out in zip(keys, outs, strict=True):
                cache.get(key, out=out)

        def get_many() -> None:
            cache.get_many(keys, out=outs)

        def copy() -> None:
            for value, out in zip(values, outs, strict=True):
                np.copyto(out, value)

        put()
        found = []
        for what, work, target in (
            ("get 1 MiB into `out`", get, 0.9),
            ("get_many 1 MiB into `out`", get_many, 0.9),
            ("put 1 MiB", put, 0.8),
        ):
            ours, theirs = interleaved(Work(work, count), Work(copy, count), repeats=settings.repeats(24))
            found.append(Row("Memory", what, ours, "s", COPYTO, theirs, at_least=target))
        if not all(cache.get(key) == value.tobytes() for key, value in zip(keys, values, strict=True)):
            raise AssertionError("a value came back changed")
    return found


# ---- Pins ----------------------------------------------------------------------------------------


def _pins(settings: Settings) -> list[Row]:
    found = []
    calls = 2000
    with kvstrata.open(settings.directory / "pins", memory="256MiB", disk=0) as cache:
        sizes = {"1 KiB": KIB, "1 MiB": MIB, "64 MiB": 64 * MIB}
        for name, size in sizes.items():
            cache.put(name, np.zeros(size, np.uint8))

            def pin(name: str = name) -> None:
                for _ in range(calls):
                    with cache.pin(name):
                        pass

            (ours,) = interleaved(Work(pin, calls), repeats=settings.repeats(24))
            found.append(Row("Memory", f"pin, view and release {name}", ours, at_most=2e-6))
        keys = [_key(i) for i in range(64)]
        for key in keys:
            cache.put(key, bytes(64 * KIB))

        def pin_many() -> None:
            for _ in range(100):
                for held in cache.pin_many(keys):
                    held.release()  # type: ignore[union-attr]

        (ours,) = interleaved(Work(pin_many, 100 * len(keys)), repeats=settings.repeats(24))
        found.append(Row("Memory", "pin_many of 64, release, each", ours, at_most=0.3e-6))
    return found


# ---- Blocks of memory ----------------------------------------------------------------------------


def _allocations(settings: Settings) -> list[Row]:
    """Take blocks of 256 B to 8 MiB, drawn log-uniformly, from a full memory: others have to leave for each."""
    count = settings.size(1_000_000)
    sizes = np.exp(np.random.default_rng(0).uniform(np.log(256), np.log(8 * MIB), count)).astype(int).tolist()
    took = np.empty(count, np.int64)
    with kvstrata.open(settings.directory / "blocks", memory="512MiB", disk=0) as cache:
        reserve = cache._space.reserve
        keys = [_key(i) for i in range(200_000)]
        for i, size in enumerate(sizes):
            key = keys[i % len(keys)]
            start = time.perf_counter_ns()
            write = reserve(key, size)
            took[i] = time.perf_counter_ns() - start
            write.publish()
        if cache.stats()["memory"]["memory_utilisation"] < 0.95:
            raise AssertionError("less than 95 % of the memory hold records")
    what = f"take a block of 256 B to 8 MiB, 95 % of memory full, {count:,} times"
    steady = took[count // 4 :] * 1e-9
    return [
        Row("Memory", f"{what}: median", Sample.of(float(np.percentile(steady, 50)))),
        Row("Memory", f"{what}: 99th percentile", Sample.of(float(np.percentile(steady, 99))), at_most=5e-6),
    ]


# ---- Prefixes ------------------------------------------------------------------------------------


def _prefixes(settings: Settings) -> list[Row]:
    keys = [_key(i) for i in range(PREFIX_KEYS)]
    path = settings.directory / "prefixes"
    options = {"memory": "256MiB", "disk": "256MiB"}
    peers, _ = open_peers(settings.directory, PREFIX_KEYS, ["redis"])
    found = []
    try:
        with kvstrata.open(path, **options) as cache, _second_process() as elsewhere:
            cache.put_many(dict.fromkeys(keys, bytes(KIB)))
            for peer in peers:
                peer.put_many(dict.fromkeys(keys, b"x"))
            cache.flush()
            for place in ("in memory", "on disk"):
                if place == "on disk":
                    cache.demote()
                    if cache.stats()["namespaces"]["default"]["memory_bytes"]:
                        raise AssertionError("records stayed in memory")
                ours, *theirs = interleaved(
                    Work(lambda: cache.contains_prefix(keys), 1, _evict),
                    *(Work(lambda peer=peer: peer.count_prefix(keys), 1, _evict) for peer in peers),
                    repeats=settings.repeats(40),
                )
                what = f"longest prefix of {PREFIX_KEYS:,} keys {place}"
                if peers and place == "in memory":
                    peer = f"{peers[0].name}, EXISTS"
                    found.append(Row("Memory", what, ours, "s", peer, theirs[0], at_most=1e-3))
                else:
                    found.append(Row("Memory", what, ours, at_most=1e-3))
                ours = elsewhere(_attached_prefix, path, options, settings.repeats(40))
                found.append(Row("Memory", f"{what}, second process", ours, at_most=1e-3))
    finally:
        for peer in peers:
            peer.close()
    return found


def _attached_prefix(path: Path, options: dict[str, str], repeats: int) -> Sample:
    """Measure in another process."""
    keys = [_key(i) for i in range(PREFIX_KEYS)]
    with kvstrata.open(path, **options) as cache:
        if cache.contains_prefix(keys) != PREFIX_KEYS:
            raise AssertionError("the second process does not see all keys")
        (ours,) = interleaved(Work(lambda: cache.contains_prefix(keys), 1, _evict), repeats=repeats)
    return ours


_ELSE = np.ones(4 * MIB)


def _evict() -> None:
    """Leave the processor's own caches as a request finds them: full of something else."""
    np.add(_ELSE, 1.0, out=_ELSE)


@contextmanager
def _second_process() -> Iterator[Callable[..., Sample]]:
    """Give a function that calls another one in a fresh process and waits."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


# ---- The index -----------------------------------------------------------------------------------


def _index(settings: Settings) -> list[Row]:
    count = 400_000
    with kvstrata.open(settings.directory / "index", memory="256MiB", disk=0) as cache:
        for start in range(0, count, 1000):
            cache.put_many({_key(i): b"" for i in range(start, start + 1000)})
        memory = cache.stats()["memory"]
    each = memory["index_bytes"] / memory["entries"]
    return [Row("Memory", f"index per record, {count:,} records", Sample.of(each), "B", at_most=160)]
