"""What every policy does, and the simple ones compared with models of a few lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_models import MODELS
from support.traces import chat, zipf

from kvstrata.errors import ConfigError, UnknownOption
from kvstrata.policies import Simulator, names

POLICIES = pytest.mark.parametrize("policy", names())


def test_the_policies_and_their_numbers_in_mappings_stay_as_they_are() -> None:
    assert names() == ["lru", "lfu", "fifo", "slru", "w-tinylfu", "s3-fifo", "sieve", "gdsf", "auto"]


# ---- Every policy ----------------------------------------------------------------------------------


@POLICIES
@given(
    capacity=st.integers(1, 12),
    steps=st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=120),
)
def test_an_access_hits_what_is_there_and_what_was_removed_is_not(
    policy: str, capacity: int, steps: list[tuple[int, bool]]
) -> None:
    simulator = Simulator(policy, capacity)
    ever: set[int] = set()
    for key, removes in steps:
        there = key in simulator
        assert not there or key in ever
        if removes:
            assert simulator.remove(key) == there
            assert key not in simulator
        else:
            assert simulator.access(key) == there
            assert key in simulator
            ever.add(key)
        held = [other for other in ever if other in simulator]
        assert len(simulator) == simulator.size == len(held) <= capacity


@POLICIES
@given(
    capacity=st.integers(1, 200),
    steps=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 100)), max_size=120),
)
def test_sizes_never_exceed_a_capacity_in_bytes(policy: str, capacity: int, steps: list[tuple[int, int]]) -> None:
    simulator = Simulator(policy, capacity, by="bytes")
    sizes: dict[int, int] = {}
    for key, size in steps:
        there = key in simulator
        before = simulator.size
        assert simulator.access(key, size) == there
        if not there and size > capacity:  # pushes out nothing
            assert key not in simulator
            assert simulator.size == before
            continue
        if not there:
            sizes[key] = size
        assert key in simulator
        assert simulator.size == sum(size for key, size in sizes.items() if key in simulator) <= capacity


@POLICIES
def test_what_fits_stays(policy: str) -> None:
    simulator = Simulator(policy, 100)
    assert not simulator.run(np.arange(100)).any()
    assert simulator.run(np.tile(np.arange(100), 5)).all()
    assert len(simulator) == 100


@POLICIES
@pytest.mark.parametrize("by", ["count", "bytes"])
def test_a_batch_does_what_single_accesses_do_and_does_it_again(policy: str, by: Any) -> None:
    trace = chat(300, systems=5, longest_system=6, goes_on=0.6, think=20, seed=1)
    parents = trace.parents
    assert parents is not None
    keys = trace.keys.tolist()
    sizes = (trace.keys % 7 + 1).tolist()

    def batch() -> list[bool]:
        simulator = Simulator(policy, 300, by=by)
        return simulator.run(trace.keys, np.array(sizes), parents).tolist()

    single = Simulator(policy, 300, by=by)
    hits = [
        single.access(key, size, parent=None if parent < 0 else parent)
        for key, size, parent in zip(keys, sizes, parents.tolist(), strict=True)
    ]
    assert batch() == hits == batch()
    assert any(hits)
    assert not all(hits)


@POLICIES
def test_keys_of_bytes_text_and_numbers_are_decided_alike(policy: str) -> None:
    keys = zipf(3000, 400, 0.8, seed=2)
    text = [f"key {key}" for key in keys]
    hits = Simulator(policy, 400).run(text)  # nothing leaves: which hash a key has makes no difference
    assert np.array_equal(hits, Simulator(policy, 400).run(keys))
    assert np.array_equal(hits, Simulator(policy, 400).run([key.encode() for key in text]))


@POLICIES
def test_a_popular_key_is_hit_more_often_than_in_a_cache_of_random_keys(policy: str) -> None:
    keys = zipf(30_000, 5000, 1.0, seed=3)
    # 250 random ones of 5,000 keys would be hit in one of 20 accesses.
    assert Simulator(policy, 250).run(keys).mean() > 0.3


def test_gdsf_keeps_what_is_dear_and_small() -> None:
    dear = Simulator("gdsf", 10)
    dear.access("dear", cost=100)
    for key in range(100):
        dear.access(key)
    assert "dear" in dear

    small = Simulator("gdsf", 100, by="bytes")
    small.access("small", 1)
    for key in range(30):
        small.access(key, 40)
    assert "small" in small


def test_auto_takes_the_tail_of_a_prefix_before_its_head() -> None:
    simulator = Simulator("auto", 64)
    for start in range(0, 640, 16):
        run = list(range(start, start + 16))
        for key in run:
            simulator.access(key, parent=key - 1 if key > start else None)
        for first in range(0, start + 1, 16):
            there = [key in simulator for key in range(first, first + 16)]
            assert there == sorted(there, reverse=True)
    assert len(simulator) == 64


def test_wrong_arguments_are_errors_of_ours() -> None:
    with pytest.raises(UnknownOption, match="lru"):
        Simulator("lruu", 10)
    with pytest.raises(UnknownOption, match="bytes"):
        Simulator("lru", 10, by="byte")  # type: ignore[arg-type]
    for capacity in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="capacity"):
            Simulator("lru", capacity)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one-dimensional"):
        Simulator("lru", 10).run(np.zeros((2, 2), np.int64))


# ---- Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", MODELS)
@given(
    capacity=st.integers(1, 12),
    steps=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=200),
)
def test_a_simple_policy_holds_what_its_model_holds(policy: str, capacity: int, steps: list[tuple[int, int]]) -> None:
    simulator = Simulator(policy, capacity)
    model = MODELS[policy](capacity)
    for key, chosen in steps:
        if chosen == 0:
            assert simulator.remove(key) == model.remove(key)
        else:
            assert simulator.access(key) == model.access(key)
        assert {key for key in range(21) if key in simulator} == set(model.keys)
