"""The disk tier beside stores that people keep KV in: values of 1 MiB and 1 KiB, written out and read cold."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kvstrata
from benchmarks.measure import Sample, Settings, Work, interleaved
from benchmarks.own.device import drop_page_cache
from benchmarks.peers import open_peers
from benchmarks.table import Row

KIB, MIB = 1 << 10, 1 << 20
BATCH = 64
SECTION = "Disk beside other stores"
NAMES = ("lmdb_on_disk", "rocksdb", "files", "diskcache")
REMARKS = [
    "Other stores on disk: a write ends when the file system has put everything on the device (syncfs), for all alike; "
    "before a read, the page cache is dropped, and before that, who maps files or caches them itself is opened anew. "
    "LMDB and RocksDB don't sync at each commit, as kvstrata doesn't.",
]
RESTARTED = 100_000  # records


class _Ours:
    """kvstrata as a peer; what is read comes from the disk."""

    name = "kvstrata"

    def __init__(self, directory: Path, memory: str) -> None:
        self._cache = kvstrata.open(directory, memory=memory, disk="8GiB")
        self.get_many = self._cache.get_many

    def put_many(self, items: dict[bytes, bytes]) -> None:
        self._cache.put_many(items)

    def settle(self) -> None:
        self._cache.flush()

    def forget(self) -> None:
        self._cache.flush()
        self._cache.demote()

    def close(self) -> None:
        self._cache.close()


def rows(settings: Settings) -> list[Row]:
    """Measure kvstrata and all peers that are installed."""
    found = [*_restart(settings)]
    for size, count in ((MIB, settings.size(256)), (KIB, settings.size(32_768))):
        found += _of_size(settings, size, count)
    return found


def _of_size(settings: Settings, size: int, count: int) -> list[Row]:
    place = settings.directory / f"peers-{size}"
    rng = np.random.default_rng(0)
    values = [rng.bytes(size) for _ in range(BATCH)]
    peers, missing = open_peers(place, 2 * count, NAMES)
    REMARKS.extend(remark for remark in missing if remark not in REMARKS)
    owners: list[Any] = [_Ours(place / "ours", "1GiB"), *peers]
    keys = [b"%032d" % i for i in range(count)]
    numbers = itertools.count()
    order = random.Random(0)
    libc = ctypes.CDLL(None)
    fd = os.open(place, os.O_RDONLY)

    def write(owner: Any) -> None:
        for start in range(0, count, BATCH):
            owner.put_many({key: values[next(numbers) % BATCH] for key in keys[start : start + BATCH]})
        if hasattr(owner, "settle"):
            owner.settle()
        libc.syncfs(fd)

    chosen: list[bytes] = []

    def go_cold(owner: Any) -> None:
        if hasattr(owner, "forget"):
            owner.forget()
        chosen[:] = order.sample(keys, min(count, 16 * BATCH))
        drop_page_cache(place)

    def read(owner: Any) -> None:
        for start in range(0, len(chosen), BATCH):
            if None in owner.get_many(chosen[start : start + BATCH]):
                raise AssertionError(f"{owner.name} has lost a value")

    try:
        writing = interleaved(*(Work(lambda o=o: write(o), count) for o in owners), repeats=settings.repeats(8))
        reading = interleaved(
            *(Work(lambda o=o: read(o), min(count, 16 * BATCH), lambda o=o: go_cold(o)) for o in owners),
            repeats=settings.repeats(8),
        )
    finally:
        os.close(fd)
        for owner in owners:
            owner.close()
    what = "1 MiB" if size == MIB else "1 KiB"
    return [
        Row(SECTION, f"{verb} of {what} in batches of {BATCH}, each", ours, "s", peer.name, theirs)
        for verb, (ours, *others) in (("write", writing), ("cold read", reading))
        for peer, theirs in zip(peers, others, strict=True)
    ]


_FILL = """
import os, random, signal, sys
import kvstrata
cache = kvstrata.open(sys.argv[1], memory="256MiB", disk="1GiB")
value = random.Random(0).randbytes(1024)
for start in range(0, int(sys.argv[2]), 1000):
    cache.put_many({b"%032d" % i: value for i in range(start, start + 1000)})
cache.flush()
if sys.argv[3] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
cache.close()
"""


def _restart(settings: Settings) -> list[Row]:
    return [
        Row(
            SECTION,
            f"open a cache with {RESTARTED:,} records on disk, after a {end}",
            Sample(tuple(_openings(settings, settings.directory / f"restart-{end}", end))),
            "s",
            at_most=1.0,
        )
        for end in ("close", "kill")
    ]


def _openings(settings: Settings, place: Path, end: str) -> Iterator[float]:
    """Yield how long opening took, each time a copy of what was left: nothing of it is in shared memory."""
    subprocess.run([sys.executable, "-c", _FILL, place, str(RESTARTED), end], check=end == "close")
    for number in range(settings.repeats(5)):
        copy = place.with_name(f"{place.name}-{number}")
        shutil.copytree(place, copy)
        begun = time.perf_counter()
        cache = kvstrata.open(copy, memory="256MiB", disk="1GiB")
        took = time.perf_counter() - begun
        found = cache.stats()["disk"]["restored_records"]
        cache.close()
        shutil.rmtree(copy)
        if found != RESTARTED:
            raise AssertionError(f"{found:,} records were there after a {end}, not {RESTARTED:,}")
        yield took
    with kvstrata.open(place, memory="256MiB", disk="1GiB"):
        pass  # so that a killed one's mapping goes
