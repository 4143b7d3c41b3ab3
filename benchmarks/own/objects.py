"""The object layer beside the cachebox that it stands on: what the check costs that an object is still true."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import cachebox

import kvstrata
from benchmarks.measure import Settings, Work, interleaved
from benchmarks.table import Row

SECTION = "In-process objects"
REMARKS = [
    "Objects are small dicts. Of 10,000, the index entries to be asked no longer fit beside them in the processor's "
    "nearer caches; cachebox has nothing to ask.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure gets of objects that are there, of few and of many."""
    return [_gets(settings, count) for count in (500, 10_000)]


def _gets(settings: Settings, count: int) -> Row:
    keys = [b"%032d" % i for i in range(count)]
    values = [{"number": i} for i in range(count)]
    chosen = random.Random(0).choices(keys, k=8192)
    peer: cachebox.LRUCache[bytes, Any] = cachebox.LRUCache(2 * count)
    with kvstrata.open(settings.directory / f"objects-{count}", memory="128MiB", disk=0) as cache:
        objects = cache.objects(2 * count)
        for key, value in zip(keys, values, strict=True):
            peer.insert(key, value)
            objects.put(key, value)
        ours, theirs = interleaved(
            _work(objects.get, chosen), _work(peer.get, chosen), repeats=settings.repeats(60), warmups=4
        )
        info = objects.info()
        if info.loads or info.misses:
            raise AssertionError(f"an object had to be made again: {info}")
    name = f"cachebox {cachebox.__version__}"
    return Row(SECTION, f"get of one of {count:,} objects", ours, "s", name, theirs, at_least=1 / 1.2)


def _work(get: Callable[[bytes], Any], chosen: list[bytes]) -> Work:
    def run() -> None:
        for _ in range(8):
            for key in chosen:
                get(key)

    return Work(run, 8 * len(chosen))
