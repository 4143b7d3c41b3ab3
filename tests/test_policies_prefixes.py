"""`auto` beside LRU on requests for prefixes and on anything else: never much worse, and well above where it can be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.traces import Trace, chat, churn, conversation, conversation_file, drift, plain, scans, zipf

DISTINCT = 182_790  # blocks of the real trace
real = pytest.mark.skipif(conversation_file() is None, reason="the real trace isn't here")

TRACES: dict[str, Callable[[], Trace]] = {
    "uniform": lambda: plain(np.random.default_rng(0).integers(0, 6000, 80_000)),
    "zipf 0.6": lambda: plain(zipf(80_000, 10_000, 0.6, seed=1)),
    "zipf 0.9": lambda: plain(zipf(80_000, 10_000, 0.9, seed=2)),
    "zipf 1.2": lambda: plain(zipf(80_000, 10_000, 1.2, seed=3)),
    "loop": lambda: plain(np.tile(np.arange(4000), 20)),
    "scans": lambda: plain(scans(seed=4)),
    "drift": lambda: plain(drift(seed=5)),
    "churn": lambda: plain(churn(seed=6)),
    "chat, few prompts": lambda: chat(4000, systems=5, longest_system=30, goes_on=0.8, think=12, seed=7),
    "chat, many prompts": lambda: chat(4000, systems=100, longest_system=6, goes_on=0.5, think=60, seed=8),
    "agents": lambda: chat(4000, systems=40, longest_system=15, goes_on=0.9, think=4, seed=9),
    "one turn each": lambda: chat(4000, systems=60, longest_system=20, goes_on=0.05, think=60, seed=10),
}


@pytest.mark.parametrize("name", TRACES)
def test_auto_is_never_half_a_point_under_lru(name: str) -> None:
    trace = TRACES[name]()
    for part in (0.01, 0.03, 0.1, 0.3, 0.6):
        capacity = max(1, int(trace.distinct * part))
        lru, auto = trace.hit_ratio("lru", capacity), trace.hit_ratio("auto", capacity)
        assert auto >= lru - 0.005, f"{auto:.4f} beside {lru:.4f} at {part:.0%}"


def test_auto_keeps_a_part_of_a_loop_that_does_not_fit() -> None:
    trace = TRACES["loop"]()
    assert trace.hit_ratio("lru", 2000) == 0
    assert trace.hit_ratio("auto", 2000) > 0.3


@real
def test_the_real_trace_is_the_one_that_the_figures_are_of() -> None:
    assert (len(conversation().keys), conversation().distinct) == (288_500, DISTINCT)


@real
@pytest.mark.parametrize(("part", "ratio"), [(0.01, 0.053), (0.03, 0.126), (0.1, 0.279), (0.3, 0.358)])
def test_lru_gives_the_reference_figures_on_a_real_trace(part: float, ratio: float) -> None:
    assert conversation().hit_ratio("lru", int(DISTINCT * part)) == pytest.approx(ratio, abs=0.002)


@real
@pytest.mark.parametrize(("part", "least"), [(0.01, 0.100), (0.03, 0.170), (0.1, 0.285)])
def test_auto_reaches_its_goals_on_a_real_trace(part: float, least: float) -> None:
    assert conversation().hit_ratio("auto", int(DISTINCT * part)) >= least


@real
@pytest.mark.parametrize("part", [0.001, 0.003, 0.01, 0.02, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 1])
def test_auto_is_never_half_a_point_under_lru_on_a_real_trace(part: float) -> None:
    capacity = int(DISTINCT * part)
    assert conversation().hit_ratio("auto", capacity) >= conversation().hit_ratio("lru", capacity) - 0.005
