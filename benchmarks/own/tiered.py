"""Memory and disk together under a Zipf load, beside LMDB over the same bytes with the same limit of memory.

Each engine runs in a process of its own, in a control group that bounds its memory, page cache included: what
kvstrata has as its memory tier, LMDB has as page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Sample, Settings
from benchmarks.table import Row

MIB = 1 << 20
VALUE = 64 << 10
MEMORY = 128 * MIB
COUNT = 4 * MEMORY // VALUE
BATCH = 16
EXPONENT = 0.99  # as in YCSB (Cooper et al., SoCC 2010)
_PROCESS = 96 * MIB  # for the interpreter and its libraries, and the values of a batch
_GROUPS = Path("/sys/fs/cgroup/memory")
_CALLS = 500
_WARM_S, _TURN_S = 60.0, 15.0  # after which an engine that is slow has shown it
SECTION = "Memory and disk"
_Engine = tuple[str, Callable[[Sequence[bytes]], list[bytes | None]], Callable[[dict[bytes, bytes]], Any]]
REMARKS = [
    f"Memory and disk: {COUNT:,} values of 64 KiB, four times the memory tier of {MEMORY // MIB} MiB; keys drawn by "
    f"Zipf's law with exponent {EXPONENT}, {BATCH} at a time. Each engine may use {(MEMORY + _PROCESS) // MIB} MiB in "
    f"all, page cache included (a memory control group). A turn ends after {_CALLS} calls or {_TURN_S:.0f} s.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure all in turn; nothing where there is no control group to be had."""
    with _group() as group:
        if group is None:
            REMARKS.append("Memory and disk were not measured: it takes root and the memory controller of cgroup v1.")
            return []
        calls = settings.size(_CALLS)
        workers = [_Worker(engine, settings.directory / f"tiered-{engine}", group, calls) for engine in _ENGINES]
        try:
            seconds: list[list[float]] = [[] for _ in workers]
            for turn in range(settings.repeats(6)):
                for index in range(len(workers)) if turn % 2 == 0 else reversed(range(len(workers))):
                    seconds[index].append(workers[index].run(turn) / BATCH)
        finally:
            names = [worker.close() for worker in workers]
    ours, *others = (Sample(tuple(values)) for values in seconds)
    return [
        Row(SECTION, f"get_many of {BATCH} values of 64 KiB, each", ours, "s", name, theirs, at_least=1.5)
        for name, theirs in zip(names[1:], others, strict=True)
    ]


@contextmanager
def _group() -> Iterator[Path | None]:
    """Make a control group for each worker below this one; None where that can't be done."""
    group = _GROUPS / f"kvstrata-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        for below in group.iterdir():
            if below.is_dir():
                below.rmdir()
        group.rmdir()


class _Worker:
    """A process with one engine, stopped between its turns by having nothing to do."""

    def __init__(self, engine: str, place: Path, group: Path, calls: int) -> None:
        own = group / engine
        own.mkdir()
        (own / "memory.limit_in_bytes").write_text(str(MEMORY + _PROCESS))
        place.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.own.tiered", engine, str(place), str(own / "tasks"), str(calls)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._name = self._answer()

    def run(self, turn: int) -> float:
        """Return how many seconds a call took in a turn."""
        assert self._process.stdin is not None
        print(turn, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> str:
        """End it; returns what the engine is called."""
        self._process.communicate()
        return str(self._name)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}")
        return json.loads(line)


# ---- In the worker


def _kvstrata(place: Path) -> _Engine:
    import kvstrata

    cache = kvstrata.open(place, memory=MEMORY, disk=6 * MEMORY, shared=False)
    return "kvstrata", cache.get_many, cache.put_many


def _lmdb(place: Path, *, readahead: bool = False) -> _Engine:
    import lmdb

    # Read-ahead brings in a value in fewer reads, and with it what nobody wants: which is better depends on the device.
    # Without syncs: puts of kvstrata don't wait for them, too.
    environment = lmdb.open(str(place), map_size=8 * MEMORY, readahead=readahead, sync=False, metasync=False)

    def get_many(keys: Sequence[bytes]) -> list[bytes | None]:
        with environment.begin() as transaction:
            return [transaction.get(key) for key in keys]

    def put_many(items: dict[bytes, bytes]) -> None:
        with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(items.items())

    how = "with" if readahead else "without"
    return f"LMDB {'.'.join(map(str, lmdb.version()))}, same memory, {how} read-ahead", get_many, put_many


_ENGINES: dict[str, Callable[[Path], _Engine]] = {
    "kvstrata": _kvstrata,
    "lmdb": _lmdb,
    "lmdb-ahead": lambda place: _lmdb(place, readahead=True),
}


def _work(engine: str, place: Path, tasks: Path, calls: int) -> None:
    tasks.write_text(str(os.getpid()))
    name, get_many, put_many = _ENGINES[engine](place)
    keys = [b"%032d" % number for number in range(COUNT)]
    rng = np.random.default_rng(0)
    for start in range(0, COUNT, 64):
        put_many({key: rng.bytes(VALUE) for key in keys[start : start + 64]})
    weights = 1 / np.arange(1, COUNT + 1) ** EXPONENT
    weights /= weights.sum()
    rank = rng.permutation(COUNT)

    def draw(seed: int, count: int) -> list[list[bytes]]:
        drawn = rank[np.random.default_rng(seed).choice(COUNT, (count, BATCH), p=weights)]
        return [[keys[i] for i in batch] for batch in drawn]

    def turn(seed: int, most: int, limit_s: float) -> float:
        batches = draw(seed, most)
        done, taken_s = 0, 0.0
        start_s = time.perf_counter()
        for batch in batches:
            if None in get_many(batch):
                raise RuntimeError("a value is missing")
            done += 1
            if (taken_s := time.perf_counter() - start_s) > limit_s:
                break
        return taken_s / done

    turn(1_000_000, 2 * calls, _WARM_S)  # until what is wanted most is in memory
    print(json.dumps(name), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(int(line), calls, _TURN_S)), flush=True)


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
