"""The Bloom filter from Python: what is certain, what is measured, and which keys it takes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvstrata.bloom import BloomFilter
from kvstrata.errors import ConfigError, InvalidKey


def digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


@pytest.mark.parametrize("fp_rate", [0.1, 0.01, 0.001])
def test_false_positives_are_as_many_as_asked_for(fp_rate: float) -> None:
    bloom = BloomFilter(20_000, fp_rate)
    bloom.add_many(digests(20_000))
    assert bloom.contains_many(digests(20_000)).all()
    others = 200_000
    measured = bloom.contains_many(digests(others, seed=1)).mean()
    uncertain = 5 * (fp_rate / others) ** 0.5
    assert abs(measured - fp_rate) < 0.1 * fp_rate + uncertain
    stats = bloom.stats()
    assert abs(stats["fp_rate"] - measured) < uncertain
    assert abs(stats["keys"] - 20_000) < 500


def test_a_filter_takes_less_than_five_bytes_a_key_for_one_in_a_hundred() -> None:
    assert 4 * 100_000 < BloomFilter(100_000, 0.01).nbytes < 5 * 100_000


def test_what_is_removed_is_gone_and_the_rest_is_there() -> None:
    bloom = BloomFilter(10_000, 0.001)
    keys = digests(10_000)
    bloom.add_many(keys)
    assert bloom.remove_many(keys[:5_000]) == 5_000
    assert bloom.contains_many(keys[5_000:]).all()
    assert bloom.contains_many(keys[:5_000]).mean() < 0.001
    bloom.remove_many(keys[5_000:])
    assert bloom.stats()["fill"] == 0
    assert not bloom.remove(b"never added")


def test_a_key_added_twice_is_there_until_it_is_removed_twice() -> None:
    bloom = BloomFilter(100)
    bloom.add("a")
    bloom.add("a")
    assert bloom.remove("a")
    assert "a" in bloom
    assert bloom.remove("a")
    assert "a" not in bloom


def test_a_row_of_an_array_is_the_same_key_as_its_bytes_and_a_str_as_its_utf_8() -> None:
    bloom = BloomFilter(1_000)
    keys = digests(10)
    bloom.add_many(keys[::2])  # not contiguous
    assert all(row.tobytes() in bloom for row in keys[::2])
    bloom.add_many(["é", b"plain"])
    assert bloom.contains_many(["é".encode(), "plain", "neither"]).tolist() == [True, True, False]


def test_clear_takes_everything_out() -> None:
    bloom = BloomFilter(100)
    bloom.add_many(["a", "b"])
    bloom.clear()
    assert bloom.contains_many(["a", "b"]).tolist() == [False, False]
    assert bloom.contains_many([]).tolist() == []


def test_two_filters_err_on_different_keys() -> None:
    one, other = BloomFilter(1_000, 0.1), BloomFilter(1_000, 0.1)
    for bloom in (one, other):
        bloom.add_many(digests(1_000))
    others = digests(50_000, seed=1)
    fooled = others[one.contains_many(others)]
    assert other.contains_many(fooled).mean() < 0.2


def test_threads_share_a_filter_without_losing_keys() -> None:
    bloom = BloomFilter(40_000)

    def work(seed: int) -> None:
        for part in np.split(digests(10_000, seed), 10):
            bloom.add_many(part)
        bloom.remove_many(digests(10_000, seed)[:5_000])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bloom.contains_many(digests(10_000, seed)[5_000:]).all() for seed in range(4))


@pytest.mark.parametrize(
    "parameters",
    [
        (0, 0.01),
        (-1, 0.01),
        (True, 0.01),
        (1.5, 0.01),
        (10**12, 0.01),
        (10, 0),
        (10, 1),
        (10, "0.01"),
        (10, float("nan")),
    ],
)
def test_parameters_that_make_no_filter_are_refused(parameters: tuple) -> None:
    with pytest.raises(ConfigError):
        BloomFilter(*parameters)


@pytest.mark.parametrize(
    "keys", [[1], [b""], np.zeros(8, np.uint8), np.zeros((2, 8), np.int64), np.zeros((2, 0), np.uint8)]
)
def test_what_is_no_key_is_refused(keys: object) -> None:
    bloom = BloomFilter(10)
    for verb in (bloom.add_many, bloom.contains_many, bloom.remove_many):
        with pytest.raises(InvalidKey):
            verb(keys)
    assert bloom.stats()["fill"] == 0
