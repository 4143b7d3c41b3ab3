"""Single and batched calls beside other caches: values of 1 KiB and of 1 MiB, one thread."""

from __future__ import annotations

import mmap
import operator
import random
import tempfile
from collections import deque
from collections.abc import Callable
from itertools import repeat
from typing import Any

import numpy as np

import kvstrata
from benchmarks.measure import Settings, Work, interleaved
from benchmarks.peers import Peer, open_peers
from benchmarks.table import Row

KIB, MIB = 1 << 10, 1 << 20
BATCH = 64
REMARKS = [
    "cachebox, cachetools and theine live in one process and hand out a reference to the object that was put; "
    "kvstrata, LMDB, Redis and diskcache are shared by processes and hand out a copy.",
    '"A bare copy" is the floor of whatever hands out copies: the same bytes at the same places, from and to shared '
    "memory mapped as the memory tier's is, by functions of the standard library, without key, lookup, lock, policy or "
    "checksum. Where it misses a target beside cachebox, which copies nothing, so must everybody who copies.",
    '"A dict, copied" is no cache: it shows what looking up and copying costs in Python when nothing else is done.',
]


def rows(settings: Settings) -> list[Row]:
    """Measure kvstrata's memory tier and all peers that are installed."""
    small, missing = _small(settings)
    large = _large(settings)
    REMARKS.extend(remark for remark in missing if remark not in REMARKS)
    return [*small, *large]


def _small(settings: Settings) -> tuple[list[Row], list[str]]:
    entries, calls = 10_000, 8192
    keys = [b"%032d" % i for i in range(entries)]
    value = random.Random(0).randbytes(KIB)
    chosen = random.Random(1).choices(keys, k=calls)
    batches = [chosen[i : i + BATCH] for i in range(0, calls, BATCH)]
    items = [dict.fromkeys(batch, value) for batch in batches]
    peers, missing = open_peers(settings.directory / "small", 2 * entries)
    found: list[Row] = []
    section = "Against other caches: values of 1 KiB"
    # Beside cachebox, which does the least.
    targets = {"get": 0.5, "put": 0.5, "get_many": 1.0, "put_many": 1.0}
    try:
        with kvstrata.open(settings.directory / "ours", memory="256MiB", disk=0) as cache:
            for owner in (cache, *peers):
                for start in range(0, entries, 1000):
                    owner.put_many(dict.fromkeys(keys[start : start + 1000], value))
            verbs: dict[str, Callable[[Any], Work]] = {
                "get": lambda owner: _work(owner.get, [(key,) for key in chosen]),
                "put": lambda owner: _work(owner.put, [(key, value) for key in chosen]),
                "get_many": lambda owner: _work(owner.get_many, [(batch,) for batch in batches], BATCH),
                "put_many": lambda owner: _work(owner.put_many, [(batch,) for batch in items], BATCH),
            }
            bare = _bare_copies(entries, [int(key) for key in chosen], value)
            names = [*(peer.name for peer in peers), "a bare copy"]
            for verb, make in verbs.items():
                works = (make(cache), *map(make, peers), bare[verb])
                ours, *all_theirs = interleaved(*works, repeats=settings.repeats(20))
                what = f"{verb} of {BATCH}, each" if verb.endswith("many") else verb
                for name, theirs in zip(names, all_theirs, strict=True):
                    at_least = targets[verb] if name.startswith("cachebox") else None
                    found.append(Row(section, what, ours, "s", name, theirs, at_least=at_least))
    finally:
        _close(peers)
    return found, missing


def _bare_copies(entries: int, chosen: list[int], value: bytes) -> dict[str, Work]:
    """Copy the same bytes from and to the same number of places, and do nothing else."""
    stride = len(value) + 128  # as records lie
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(entries * stride)
        arena = mmap.mmap(file.fileno(), entries * stride)
    places = [slice(i * stride, i * stride + len(value)) for i in range(entries)]
    for place in places:
        arena[place] = value
    wanted = [places[i] for i in chosen]
    batches = [wanted[i : i + BATCH] for i in range(0, len(wanted), BATCH)]

    def put_many(batch: list[slice]) -> None:
        deque(map(operator.setitem, repeat(arena), batch, repeat(value)), maxlen=0)

    return {
        "get": _work(operator.getitem, [(arena, place) for place in wanted]),
        "put": _work(operator.setitem, [(arena, place, value) for place in wanted]),
        "get_many": _work(lambda get: get(arena), [(operator.itemgetter(*batch),) for batch in batches], BATCH),
        "put_many": _work(put_many, [(batch,) for batch in batches], BATCH),
    }


def _large(settings: Settings) -> list[Row]:
    count = settings.size(128)
    rng = np.random.default_rng(0)
    values = {b"%032d" % i: rng.bytes(MIB) for i in range(count)}
    outs = [memoryview(bytearray(MIB)) for _ in range(count)]
    peers, _ = open_peers(settings.directory / "large", count, ["lmdb", "redis", "diskcache"])
    found = []
    section = "Against other caches: values of 1 MiB"
    try:
        with kvstrata.open(settings.directory / "ours-large", memory="512MiB", disk=0) as cache:

            def ours_into(key: bytes, out: memoryview) -> None:
                cache.get(key, out=out)

            into = list(zip(values, outs, strict=True))
            puts = list(values.items())
            repeats = settings.repeats(12)
            owners = (cache, *peers)
            stored = interleaved(*(_work(owner.put, puts) for owner in owners), repeats=repeats)
            copies = [_work(ours_into, into), *(_work(peer.get_into, into) for peer in peers)]
            copied = interleaved(*copies, repeats=repeats)
            for what, (ours, *all_theirs) in (("get into a buffer", copied), ("put", stored)):
                for peer, theirs in zip(peers, all_theirs, strict=True):
                    at_least = 5.0 if what != "put" and peer.name.startswith("Redis") else None
                    found.append(Row(section, what, ours, "s", peer.name, theirs, at_least=at_least))
    finally:
        _close(peers)
    return found


def _work(verb: Callable[..., Any], calls: list[tuple[Any, ...]], each: int = 1) -> Work:
    def run() -> None:
        for arguments in calls:
            verb(*arguments)

    return Work(run, len(calls) * each)


def _close(peers: list[Peer]) -> None:
    for peer in peers:
        peer.close()
