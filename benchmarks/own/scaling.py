"""One process and two over one cache: whether the second adds to the throughput, or gets in the way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import kvstrata
from benchmarks.measure import Settings, Work, interleaved
from benchmarks.table import Row

KIB = 1 << 10
BATCH = 64
ENTRIES = 50_000
OPTIONS = {"memory": "256MiB", "disk": 0}
SECTION = "Two processes"
REMARKS = [
    f"Both processes use one cache of {ENTRIES:,} values of 1 KiB in batches of {BATCH} random keys. Figures are "
    "wall time for each key that either handled, from the first start to the last end.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure gets alone, and nine batches of gets to one of puts."""
    if len(os.sched_getaffinity(0)) < 2:
        REMARKS.append("Two processes were not measured: there is one core.")
        return []
    batches = settings.size(4000)
    path = settings.directory / "scaling"
    found = []
    with kvstrata.open(path, **OPTIONS) as cache:  # type: ignore[arg-type]
        for start in range(0, ENTRIES, 1000):
            cache.put_many({_key(i): bytes(KIB) for i in range(start, start + 1000)})
        with _worker(path, 1) as one, _worker(path, 2) as two:
            for what, kind, target in (
                (f"get_many of {BATCH}, each", "get", 1.7),
                (f"90 % get_many, 10 % put_many of {BATCH}, each", "mixed", 1.0),
            ):
                alone, together = interleaved(
                    Work(lambda kind=kind: _run([one], kind, batches), batches * BATCH),
                    Work(lambda kind=kind: _run([one, two], kind, batches), 2 * batches * BATCH),
                    repeats=settings.repeats(20),
                )
                found.append(Row(SECTION, what, together, "s", "one process", alone, at_least=target))
    return found


def _key(number: int) -> bytes:
    return b"%032d" % number


def _run(workers: list[Connection], kind: str, batches: int) -> None:
    for worker in workers:
        worker.send((kind, batches))
    for worker in workers:
        if worker.recv() != batches:
            raise AssertionError("a batch was incomplete")


@contextlib.contextmanager
def _worker(path: Path, seed: int) -> Iterator[Connection]:
    """Start another process, which does what it is sent: (kind, batches)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(path, seed, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _work(path: Path, seed: int, orders: Connection) -> None:
    order = random.Random(seed)
    chosen = [[_key(order.randrange(ENTRIES)) for _ in range(BATCH)] for _ in range(1000)]
    items = [dict.fromkeys(batch, bytes(KIB)) for batch in chosen]
    with kvstrata.open(path, **OPTIONS) as cache, contextlib.suppress(EOFError):  # type: ignore[arg-type]
        while True:
            kind, batches = orders.recv()
            done = 0
            for i in range(batches):
                if kind == "mixed" and i % 10 == 0:
                    cache.put_many(items[i % len(items)])
                    done += 1
                else:
                    done += None not in cache.get_many(chosen[i % len(chosen)])
            orders.send(done)
