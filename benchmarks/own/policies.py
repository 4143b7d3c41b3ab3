"""How fast the policies decide: the simulator, which runs the core's own code for them, without values."""

from __future__ import annotations

import numpy as np

from benchmarks.measure import Settings, Work, interleaved
from benchmarks.table import Row
from kvstrata.policies import Simulator

REMARKS = [
    "Policies: batched accesses to a simulator of 100,000 records, Zipf 1.0 over a million keys; the target is 3 M/s."
]


def rows(settings: Settings) -> list[Row]:
    """Measure LRU and auto."""
    count, keys = settings.size(2_000_000), 1_000_000
    weights = 1 / np.arange(1, keys + 1)
    accesses = np.random.default_rng(0).choice(keys, count, p=weights / weights.sum())
    found = []
    for policy in ("lru", "auto"):
        simulator = Simulator(policy, 100_000)

        def run(simulator: Simulator = simulator) -> None:
            simulator.run(accesses)

        (ours,) = interleaved(Work(run, count), repeats=settings.repeats(12))
        found.append(Row("Policies", f"simulated access, {policy}", ours, at_most=1 / 3e6))
    return found
