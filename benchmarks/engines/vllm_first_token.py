"""Time to the first token in vLLM: cold, from its own prefix cache, from kvstrata, and from what else there is.

Engines that are compared at the same tier run at the same time and are asked in turn. Where a prefix can be loaded
only once (from disk, in a process that hasn't seen it), each sample is another prefix. All have been filled before.
"""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import kvstrata
from benchmarks.engines import vllm_ways as ways
from benchmarks.engines.model import KV_BYTES, LENGTHS, saved_model
from benchmarks.engines.processes import Engine, shared_memory
from benchmarks.measure import Sample, Settings
from benchmarks.own.device import drop_page_cache
from benchmarks.table import Row
from kvstrata.copying import Copiers

OWN = "vLLM's own prefix cache"
STARTS = 6
REMARKS = [
    "vLLM: SmolLM2-135M-Instruct in bf16 on the CPU, blocks of 32 tokens, a prefix and 16 tokens more, from the call "
    "of generate to the first token, with the engine in a process of its own. Its OffloadingConnector copies on the "
    'CPU by a worker of ours, since vLLM ships one for GPUs only. "A new process" has never seen the prefix; what it '
    "finds was stored by another one. Before each sample, the other engines have come to rest.",
    f"What is from memory is measured with engines that are started anew {STARTS} times: one takes up to a fifth "
    "longer than another of its kind for as long as it lives.",
    '"A bare copy": the KV of the prefix, moved by numpy on all cores from shared memory to a process\'s own. '
    "Whoever keeps KV outside of the engine needs as much.",
]
Times = dict[str, dict[int, list[float]]]


def rows(settings: Settings) -> list[Row]:
    """Measure all of it."""
    model = saved_model(settings.directory)
    repeats = settings.repeats(12)
    with shared_memory():
        times = _from_memory(model, settings.directory, repeats)
        times |= _new_processes(model, settings.directory, max(3, repeats // 3))
    found: list[Row] = []
    for length in LENGTHS:
        section = f"vLLM: time to first token, prefix of {length:,} tokens, bf16"
        at = {name: Sample(tuple(by_length[length])) for name, by_length in times.items() if by_length.get(length)}

        def row(what: str, name: str, peer: str, theirs: str, at_least: float | None = None,
                section: str = section, at: dict[str, Sample] = at) -> list[Row]:  # fmt: skip
            if name not in at or theirs not in at:
                return []
            return [Row(section, what, at[name], peer=peer, theirs=at[theirs], at_least=at_least)]

        new, cold = "a new process", "a new process, page cache dropped"
        tier = "tier under OffloadingConnector, "
        found += [
            *row("from memory", "memory", OWN, "own", 1 / 1.1),
            *row("from memory", "memory", "cold", "cold"),
            *row("a bare copy of the KV, and that", "own and a copy", OWN, "own"),
            *row("from memory, another process", "other", OWN, "own"),
            *row(new, "kvstrata", "OffloadingConnector, fs tier", "fs", 1 / 0.8),
            *row(new, "kvstrata", "LMCache over shm", "lmcache", 1 / 0.9),
            *row(new, "kvstrata", "ExampleConnector", "example"),
            *row(cold, "kvstrata, disk", "OffloadingConnector, fs tier", "fs, disk"),
            *row(cold, "kvstrata, disk", "ExampleConnector", "example, disk"),
            *row(cold, "kvstrata, disk", "cold", "cold"),
            *row(tier + new, "tier", "OffloadingConnector, fs tier", "fs"),
            *row(tier + cold, "tier, disk", "OffloadingConnector, fs tier", "fs, disk"),
        ]
    return found


def _empty(*names: str) -> Times:
    return {name: {length: [] for length in LENGTHS} for name in names}


def _from_memory(model: Path, scratch: Path, repeats: int) -> Times:
    """Prefixes that are loaded again and again: the engine forgets them in between."""
    times = _empty("cold", "own", "memory", "other", "own and a copy")
    copies = _BareCopies()
    starts = min(STARTS, repeats)
    for start in range(starts):
        attached = ways.kvstrata(scratch / f"memory-{start}")
        with ExitStack() as stack:
            alone = stack.enter_context(ways.engine(model))
            ours, other = (stack.enter_context(ways.engine(model, attached)) for _ in range(2))
            for length in LENGTHS:
                for engine in (alone, ours):
                    engine.first_token(length, length, 0, cached=False)
                times["cold"][length].append(alone.first_token(10_000 + length, length, 0, cached=False))
                for turn in range(repeats // starts):
                    for name, engine in (("own", alone), ("memory", ours), ("other", other)):
                        if engine is not alone:
                            engine.ask("forget")
                        time.sleep(ways.ASLEEP_S)
                        times[name][length].append(engine.first_token(length, length, 1 + turn, cached=True))
                # Not in between: the next engine, always the same one, would find the processor's caches full of them.
                for own in times["own"][length][-(repeats // starts) :]:
                    times["own and a copy"][length].append(own + copies.seconds(length))
    return times


class _BareCopies:
    """The KV of prefixes, in more memory than caches hold."""

    def __init__(self) -> None:
        size = max(LENGTHS) * KV_BYTES
        pairs = [(np.frombuffer(mmap.mmap(-1, size), np.uint8), np.ones(size, np.uint8)) for _ in range(4)]
        for shared, own in pairs:
            shared[:] = own
        self._turns = itertools.cycle(pairs)
        self._copiers = Copiers()

    def seconds(self, length: int) -> float:
        """What it takes to copy the KV of so many tokens, a block at a time."""
        shared, own = next(self._turns)
        block, nbytes = ways.BLOCK_TOKENS * KV_BYTES, length * KV_BYTES
        places = [slice(start, start + block) for start in range(0, nbytes, block)]
        started = time.perf_counter()
        self._copiers.share(lambda place: np.copyto(own[place], shared[place]), places, nbytes)
        return time.perf_counter() - started


def _new_processes(model: Path, scratch: Path, samples: int) -> Times:
    """Prefixes that the process has never seen, each loaded once; one more of each length warms it."""
    attached_by: dict[str, Any] = {
        "kvstrata": ways.kvstrata(scratch / "kvstrata"),
        "tier": ways.kvstrata_tier(scratch / "tier"),
        "fs": ways.fs_tier(scratch / "fs"),
        "example": ways.example(scratch / "example"),
    }
    with ExitStack() as held:
        if ways.has_lmcache():
            port = 15_655
            held.enter_context(ways.lmcache_server(port))
            attached_by["lmcache"] = ways.lmcache(port)
        for name in ("kvstrata", "tier"):  # whose memory stays for as long as some process has it
            held.enter_context(kvstrata.open(scratch / name, memory=ways.MEMORY, disk=ways.DISK))
        for name, attached in list(attached_by.items()):
            try:
                with ways.engine(model, attached) as filler:
                    _fill(filler, samples)
            except RuntimeError as error:
                _without(attached_by, name, error)
        times = _read(model, attached_by, samples, tail=1)
    attached_by.pop("lmcache", None)  # which keeps all in memory
    read = _read(model, attached_by, samples, tail=2, drop=[scratch / name for name in attached_by])
    return times | {f"{name}, disk": by_length for name, by_length in read.items()}


def _without(attached_by: dict[str, Any], name: str, error: RuntimeError) -> None:
    REMARKS.append(f"{name} failed, so figures of it are missing: {str(error).splitlines()[0]}")
    del attached_by[name]


def _fill(engine: Engine, samples: int) -> None:
    for length in LENGTHS:
        for number in range(samples + 1):
            engine.ask("first_token", prefix=length * 10 + number, length=length, tail=0)
    engine.ask("first_token", prefix=-99, length=64, tail=3)  # steps that let transfers end


def _read(model: Path, attached_by: dict[str, Any], samples: int, *, tail: int, drop: Sequence[Path] = ()) -> Times:
    """Load each prefix once in engines that have seen none, asked in turn."""
    times = _empty(*attached_by)
    with ExitStack() as stack:
        engines = {name: stack.enter_context(ways.engine(model, it)) for name, it in attached_by.items()}
        for directory in drop:
            drop_page_cache(directory)
        for length in LENGTHS:
            for number in range(samples + 1):
                for name, engine in list(engines.items()):
                    time.sleep(ways.ASLEEP_S)
                    try:
                        taken = engine.first_token(length * 10 + number, length, tail, cached=True)
                    except RuntimeError as error:
                        _without(attached_by, name, error)
                        del engines[name]
                        continue
                    if number:
                        times[name][length].append(taken)
    return times
