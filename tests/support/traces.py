"""Sequences of keys to try policies on: generated ones, and the real trace where it lies."""

from __future__ import annotations

import heapq
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstrata.policies import Simulator

Numbers = npt.NDArray[np.int64]
_REPOSITORY = Path(__file__).parents[2]


class Trace(NamedTuple):
    """`depths`: place of each access in its request's prefix, from 1 on; 0 where there are no prefixes."""

    keys: Numbers
    depths: Numbers

    @property
    def distinct(self) -> int:
        """How many keys there are."""
        return len(np.unique(self.keys))

    @property
    def parents(self) -> Numbers | None:
        """The key before each in its prefix, -1 for none; None if there are no prefixes at all."""
        if not self.depths.any():
            return None
        return np.where(self.depths > 1, np.concatenate([[-1], self.keys[:-1]]), -1)

    def hit_ratio(self, policy: str, capacity: int) -> float:
        """The part of accesses that hit; in a prefix, only what lies before its first miss counts."""
        hits = Simulator(policy, capacity).run(self.keys, parents=self.parents)
        if self.parents is None:
            return float(hits.mean())
        missed = np.cumsum(~hits)
        starts = np.flatnonzero(self.depths == 1)
        before = np.concatenate([[0], missed])[starts]
        return float((missed == np.repeat(before, np.diff([*starts, len(hits)]))).mean())


def plain(keys: npt.NDArray[np.integer[Any]]) -> Trace:
    """A trace without prefixes."""
    return Trace(keys.astype(np.int64), np.zeros(len(keys), np.int64))


def zipf(count: int, keys: int, exponent: float, seed: int) -> Numbers:
    """Independent accesses; the probability of key n is in proportion to (n+1)**-exponent."""
    weights = 1 / np.arange(1, keys + 1) ** exponent
    return np.random.default_rng(seed).choice(keys, count, p=weights / weights.sum()).astype(np.int64)


def scans(seed: int) -> Numbers:
    """Zipf, interrupted by keys that are used once."""
    parts = [
        part
        for i in range(8)
        for part in (zipf(8000, 10_000, 0.9, seed + i), np.arange(4000, dtype=np.int64) + 10**6 + 4000 * i)
    ]
    return np.concatenate(parts)


def churn(seed: int) -> Numbers:
    """A Zipf whose keys are all replaced from time to time."""
    return np.concatenate([10**5 * i + zipf(20_000, 4000, 0.8, seed + i) for i in range(4)])


def drift(seed: int) -> Numbers:
    """A Zipf whose popular keys move on."""
    return np.arange(80_000) // 20 + zipf(80_000, 4000, 0.7, seed)


def chat(requests: int, *, systems: int, longest_system: int, goes_on: float, think: float, seed: int) -> Trace:
    """Sessions that share system prompts: each turn asks for all blocks so far, and some new ones.

    `goes_on` is the chance of another turn, `think` the median time until then, in arrivals of sessions.
    """
    rng = np.random.default_rng(seed)
    keys: list[int] = []
    depths: list[int] = []
    used = 0

    def new(count: int) -> list[int]:
        nonlocal used
        used += count
        return list(range(used - count, used))

    prompts = [new(int(rng.integers(1, longest_system + 1))) for _ in range(systems)]
    waiting: list[tuple[float, int, list[int]]] = []
    arrival = 0.0
    for request in range(requests):
        if waiting and waiting[0][0] < arrival:
            now, _, blocks = heapq.heappop(waiting)
        else:
            now = arrival
            arrival += rng.exponential()
            blocks = prompts[min(int(rng.pareto(1)), systems - 1)] + new(1 + int(rng.lognormal(1, 0.8)))
        asked = blocks + new(1)  # the last block isn't full, and nobody's else
        keys += asked
        depths += range(1, len(asked) + 1)
        if rng.random() < goes_on and len(blocks) < 200:
            later = now + think * rng.lognormal(0, 0.8)
            heapq.heappush(waiting, (later, request, blocks + new(1 + int(rng.lognormal(0.6, 0.7)))))
    return Trace(np.array(keys, np.int64), np.array(depths, np.int64))


def conversation_file() -> Path | None:
    """The real trace: in the directory $KVSTRATA_TRACES, or beside the repository; None if it isn't here."""
    directory = Path(os.environ.get("KVSTRATA_TRACES") or _REPOSITORY.parent / "shared" / "traces")
    file = directory / "conversation_trace.jsonl"
    return file if file.exists() else None


@cache
def conversation() -> Trace:
    """The real trace: a run of depths from 1 on for each request."""
    file = conversation_file()
    assert file is not None
    with file.open() as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    keys = np.concatenate([np.array(ids, np.int64) for ids in requests])
    return Trace(keys, np.concatenate([np.arange(1, len(ids) + 1) for ids in requests]))
