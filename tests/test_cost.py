"""The learned cost of loads, and what a prefix cache leaves out because computing it is sooner done."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prefix import BIG, kv_of

import kvstrata
from kvstrata import Cache, PrefixCache, _core
from kvstrata.errors import ConfigError
from kvstrata.movement.cost import CostModel, Prefill, TierCost, worth_loading
from kvstrata.tiers.segments import SegmentSet

KIB, MIB = 1 << 10, 1 << 20
latencies = st.floats(1e-5, 0.1)
bandwidths = st.floats(1e6, 1e10)
sizes = st.integers(1, 1 << 30)

# ---- The model


@given(
    st.lists(st.tuples(st.integers(-5, 1 << 40), st.floats(allow_nan=True, allow_infinity=True)), max_size=60),
    st.lists(sizes, min_size=2, max_size=2),
)
def test_an_estimate_is_positive_finite_and_grows_with_the_bytes_whatever_was_observed(
    observed: list[tuple[int, float]], pair: list[int]
) -> None:
    model = CostModel()
    for nbytes, seconds in observed:
        model.observe("disk", nbytes, seconds)
    less, more = sorted(pair)

    assert 0 < model.seconds("disk", less) <= model.seconds("disk", more) < math.inf


@given(latencies, bandwidths, st.integers(0, 1000))
def test_a_tier_of_any_speed_is_learned_from_noisy_loads_of_any_size(
    latency: float, bandwidth: float, seed: int
) -> None:
    generator = random.Random(seed)
    model = CostModel()
    for _ in range(400):
        nbytes = int(2 ** generator.uniform(10, 28))
        model.observe("remote", nbytes, (latency + nbytes / bandwidth) * generator.uniform(0.8, 1.25))

    for nbytes in (KIB, 64 * KIB, MIB, 256 * MIB):
        true = latency + nbytes / bandwidth
        assert true / 2 < model.seconds("remote", nbytes) < true * 2


@given(latencies, bandwidths, sizes, st.floats(1e-9, 1e9))
def test_one_outlier_moves_a_settled_estimate_by_little(
    latency: float, bandwidth: float, nbytes: int, factor: float
) -> None:
    settled = TierCost(latency, bandwidth, 100)
    after = settled.after(nbytes, settled.seconds(nbytes) * factor)

    for size in (1, KIB, MIB, 1 << 30):
        assert 0.79 < after.seconds(size) / settled.seconds(size) < 1.27


@given(latencies, bandwidths, sizes, st.sampled_from([1e-3, 1e-2, 1e2, 1e3]))
def test_a_tier_that_has_become_slower_or_faster_for_good_is_found_out_in_a_few_loads(
    latency: float, bandwidth: float, nbytes: int, factor: float
) -> None:
    cost = TierCost(latency, bandwidth, 100)
    true = max(1e-6, min(cost.seconds(nbytes) * factor, 90.0))
    for _ in range(40):
        cost = cost.after(nbytes, true)

    assert true / 2 < cost.seconds(nbytes) < true * 2


@pytest.mark.parametrize(
    ("nbytes", "seconds"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, math.inf), (1, math.nan)]
)
def test_what_can_not_be_a_load_teaches_nothing(nbytes: int, seconds: float) -> None:
    assert TierCost(1.0, 1.0).after(nbytes, seconds) == TierCost(1.0, 1.0)


def test_before_anything_was_observed_a_disk_is_taken_for_a_disk() -> None:
    model = CostModel()

    assert 1e-4 < model.seconds("disk", KIB) < 1e-3
    assert 0.05 < model.seconds("disk", 100 * MIB) < 0.5
    assert model.seconds("valkey", KIB) > model.seconds("disk", KIB)
    assert model.stats() == {}


def test_threads_may_observe_and_ask_at_once() -> None:
    model = CostModel()

    def use(_: int) -> bool:
        model.observe("disk", MIB, 0.001)
        return model.seconds("disk", MIB) > 0

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(400)))
    assert model.stats()["disk"]["observations"] == 400


@given(
    st.lists(st.none() | st.tuples(st.sampled_from(["disk", "elsewhere"]), st.integers(1, 1 << 24)), max_size=30),
    latencies, bandwidths, st.floats(1, 100), st.floats(1e-6, 1.0),
)  # fmt: skip
def test_what_is_worth_loading_is_what_takes_the_least_time_in_all(
    places: list[tuple[str, int] | None], latency: float, bandwidth: float, slower: float, block_s: float
) -> None:
    def load(tier: str, nbytes: int) -> float:
        return (latency + nbytes / bandwidth) * (slower if tier == "elsewhere" else 1)

    def total(count: int) -> float:
        found = len(places) - count
        return found * block_s + sum(
            load(tier, nbytes)
            for tier in ("disk", "elsewhere")
            if (nbytes := sum(place[1] for place in places[:count] if place is not None and place[0] == tier))
        )

    count = worth_loading(places, load, block_s)

    assert total(count) == pytest.approx(min(total(each) for each in range(len(places) + 1)))
    in_memory = next((i for i, place in enumerate(places) if place), len(places))
    assert count >= in_memory


def test_a_prefill_rate_is_told_or_learned() -> None:
    learned = Prefill(None)
    assert learned.token_s is None
    learned.observe(0, 1.0)
    learned.observe(100, 0.0)
    assert learned.token_s is None
    learned.observe(1000, 2.0)
    assert learned.token_s == pytest.approx(0.002)
    for _ in range(60):
        learned.observe(1000, 1.0)
    assert learned.token_s == pytest.approx(0.001, rel=0.01)
    learned.observe(1000, 1e6)
    assert learned.token_s < 0.0013
    assert Prefill(500).token_s == 0.002


@pytest.mark.parametrize("rate", [0, -1.0, math.inf, math.nan, "fast", True])
def test_what_can_not_be_a_prefill_rate_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigError, match="prefill_tokens_per_s"):
        Prefill(rate)


# ---- In a prefix cache, over a disk whose reads take as long as the test says

N = 6
TOKENS = list(range(64 * N))
KV = kv_of(TOKENS, BIG)


class SlowDisk:
    """Reads of records take `seconds` each, by a clock that only they move."""

    def __init__(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.seconds = 0.001
        cache.tiers.cost.clock = lambda: self.now
        read, read_pieces = SegmentSet.read, _core.read_pieces

        def slow(segments: SegmentSet, reads: Sequence[Any], done: Any) -> None:
            self.now += self.seconds * len(reads)
            read(segments, reads, done)

        def slow_pieces(fd: int, pieces: Sequence[Any]) -> list[int]:
            self.now += self.seconds / BIG.layers * len(pieces)
            return read_pieces(fd, pieces)

        monkeypatch.setattr(SegmentSet, "read", slow)
        monkeypatch.setattr(_core, "read_pieces", slow_pieces)


@pytest.fixture
def cache(shm: Path, tmp_path: Path) -> Iterator[Cache]:
    with kvstrata.open(tmp_path / "cache", memory="32MiB", disk="64MiB") as cache:
        PrefixCache.open(cache, BIG).store(TOKENS, KV)
        cache.flush()
        cache.demote()
        yield cache
        memory = cache.stats()["memory"]
        assert (memory["pins"], memory["reservations"]) == (0, 0)


def whole(prefixes: PrefixCache) -> int:
    return prefixes.match(TOKENS).load().tokens


def by_layers(prefixes: PrefixCache) -> int:
    layers = prefixes.match(TOKENS).load_layers()
    assert all(np.array_equal(words, KV[layer, :, :, : words.shape[2]]) for layer, words in layers)
    return layers.tokens


def learned(cache: Cache, prefixes: PrefixCache, load: Callable[[PrefixCache], int]) -> None:
    """Let the model see what loads take now."""
    for _ in range(30):
        cache.demote()
        load(prefixes)


@pytest.mark.parametrize("load", [whole, by_layers])
def test_from_a_disk_that_is_slower_than_computing_nothing_is_loaded(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, load: Callable[[PrefixCache], int]
) -> None:
    disk = SlowDisk(cache, monkeypatch)
    disk.seconds = 1.0
    learned(cache, PrefixCache.open(cache, BIG), load)
    cache.demote()
    prefixes = PrefixCache.open(cache, BIG, prefill_tokens_per_s=10_000)

    assert prefixes.match(TOKENS).tokens == 64 * N
    assert load(prefixes) == 0
    stats = prefixes.stats()
    assert (stats["skips"], stats["skipped_tokens"], stats["skipped_tokens_disk"]) == (1, 64 * N, 64 * N)
    assert stats["skipped_tokens_memory"] == 0


@pytest.mark.parametrize("load", [whole, by_layers])
def test_from_a_disk_that_is_faster_all_is_loaded(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, load: Callable[[PrefixCache], int]
) -> None:
    disk = SlowDisk(cache, monkeypatch)
    prefixes = PrefixCache.open(cache, BIG, prefill_tokens_per_s=10_000)
    learned(cache, prefixes, load)
    cache.demote()

    assert load(prefixes) == 64 * N
    assert prefixes.stats()["skips"] == 0
    assert disk.now > 0


def test_the_head_that_lies_in_memory_is_loaded_and_what_follows_below_is_not(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(cache, monkeypatch)
    disk.seconds = 1.0
    learned(cache, PrefixCache.open(cache, BIG), whole)
    cache.demote()
    prefixes = PrefixCache.open(cache, BIG, prefill_tokens_per_s=10_000)
    for index in (0, 1, 4):
        prefixes.ns.pin(prefixes.keys(TOKENS)[index]).release()

    loaded = prefixes.match(TOKENS).load()

    assert loaded.tokens == 64 * 2
    assert np.array_equal(loaded.kv, KV[:, :, :, : 64 * 2])
    stats = prefixes.stats()
    assert (stats["skipped_tokens_disk"], stats["skipped_tokens_memory"]) == (64 * 3, 64)


def test_without_a_rate_everything_is_loaded_however_slow(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(cache, monkeypatch)
    disk.seconds = 1000.0
    prefixes = PrefixCache.open(cache, BIG)
    learned(cache, prefixes, whole)
    cache.demote()

    assert whole(prefixes) == 64 * N
    prefixes.observe_prefill(10_000, 1.0)  # from now on there is one
    cache.demote()
    assert whole(prefixes) == 0


def test_a_disk_that_became_fast_again_is_found_out_by_probes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(cache, monkeypatch)
    disk.seconds = 1.0
    learned(cache, PrefixCache.open(cache, BIG), whole)
    prefixes = PrefixCache.open(cache, BIG, prefill_tokens_per_s=10_000)
    disk.seconds = 1e-4
    tokens = []
    for _ in range(16 * 30):
        cache.demote()
        tokens.append(whole(prefixes))

    assert tokens[:15] == [0] * 15
    assert tokens[15] == 64 * N
    assert tokens[-20:] == [64 * N] * 20
    assert 0 < prefixes.stats()["probes"] < 30


def test_every_load_teaches_the_model(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(cache, monkeypatch)
    disk.seconds = 0.25
    for number in range(20):
        cache.put(f"key {number}", bytes(100 * KIB))
    cache.flush()
    cache.demote()
    for number in range(20):
        cache.get(f"key {number}")

    stats = cache.stats()["cost"]["disk"]
    assert stats["observations"] == 20
    assert 0.2 < stats["latency_s"] + 100 * KIB / stats["bytes_per_s"] < 0.3
