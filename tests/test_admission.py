"""What is wanted once doesn't get to the disk, where a namespace says so."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import OpenCache

import kvstrata
from kvstrata.errors import ConfigMismatch, UnknownOption

DISK = {"memory": "4MiB", "disk": "64MiB"}


def written(cache: kvstrata.Cache) -> int:
    cache.flush()
    count: int = cache.stats()["disk"]["written_records"]
    return count


def test_one_hit_wonders_stay_off_the_disk(open_cache: OpenCache) -> None:
    cache = open_cache(**DISK)
    ns = cache.namespace("scanned", admission="reused")
    for i in range(3000):
        ns.put(f"{i}", bytes(10_000))
    assert written(cache) <= 30  # a filter may take one in a hundred for one that it has seen
    assert ns.get("2999") == bytes(10_000)
    assert ns.get("0") is None


@pytest.mark.parametrize(
    "use",
    [
        lambda ns, keys: [ns.get(key) for key in keys],
        lambda ns, keys: ns.get_many(keys),
        lambda ns, keys: [ns.pin(key).release() for key in keys],
        lambda ns, keys: [ns.put(key, b"1") for key in keys],
    ],
    ids=["get", "get_many", "pin", "put"],
)
def test_what_is_used_again_gets_there(open_cache: OpenCache, use: Any) -> None:
    with open_cache(**DISK) as cache:
        ns = cache.namespace("ns", admission="reused")
        keys = [f"{i}" for i in range(100)]
        ns.put_many(dict.fromkeys(keys, b"1"))
        assert written(cache) <= 10
        for _ in range(3):
            use(ns, keys[:50])
        assert written(cache) >= 50
    ns = open_cache(**DISK).namespace("ns", admission="reused")
    assert ns.contains_prefix(keys[:50]) == 50
    assert sum(key in ns for key in keys[50:]) <= 10


def test_what_is_put_again_after_it_had_gone_gets_there(open_cache: OpenCache) -> None:
    cache = open_cache(**DISK)
    ns = cache.namespace("ns", admission="reused")
    for _ in range(2):
        for i in range(1000):
            ns.put(f"{i}", bytes(10_000))
    assert 1000 <= written(cache) <= 1030
    assert ns.get("0") == bytes(10_000)


def test_keys_seen_long_ago_are_forgotten(open_cache: OpenCache) -> None:
    cache = open_cache(**DISK)
    ns = cache.namespace("ns", admission="reused")
    first = {f"first {i}": b"1" for i in range(100)}
    ns.put_many(first)
    ns.put_many({f"{i}": b"1" for i in range(20_000)})  # the filter holds some 4,000 keys a generation
    before = written(cache)
    assert before < 400
    for key in first:
        ns.delete(key)
    ns.put_many(first)
    assert written(cache) - before <= 10  # as above: one in a hundred


@pytest.mark.parametrize("how", ["put", "get", "get_many", "pin", "put and get"])
def test_what_is_wanted_four_times_gets_there_where_only_that_is_frequent(open_cache: OpenCache, how: str) -> None:
    cache = open_cache(**DISK)
    ns = cache.namespace("ns", admission="frequent")
    keys = [f"{i}" for i in range(500)]

    def want(use: str) -> None:
        if use == "put":
            ns.put_many(dict.fromkeys(keys, b"1"))
        elif use == "get_many":
            ns.get_many(keys)
        else:
            for key in keys:
                ns.get(key) if use == "get" else ns.pin(key).release()

    want("put")
    for n in range(2):
        want(how if how != "put and get" else ("put", "get")[n])
    assert written(cache) <= 25
    want(how if how != "put and get" else "put")
    assert written(cache) >= 500


def test_a_sketch_knows_what_had_gone_from_memory_and_forgets_what_was_wanted_long_ago(open_cache: OpenCache) -> None:
    cache = open_cache(**DISK)
    ns = cache.namespace("ns", admission="frequent")
    for _ in range(3):
        for i in range(1000):  # more than memory holds
            ns.put(f"{i}", bytes(10_000))
    assert written(cache) <= 50
    for i in range(1000):
        ns.put(f"{i}", bytes(10_000))
    assert 1000 <= written(cache) <= 1050
    ns.put_many({f"other {i}": b"1" for i in range(20_000)})  # a generation is for some 4,000 keys
    before = written(cache)
    ns.put("0", b"1")
    assert written(cache) == before


def test_admission_is_the_same_for_all_who_have_a_namespace_open(open_cache: OpenCache) -> None:
    cache = open_cache(**DISK)
    cache.namespace("ns", admission="reused")
    with pytest.raises(ConfigMismatch, match="admission='reused'"):
        open_cache(**DISK).namespace("ns")
    cache.namespace("often", admission="frequent")
    with pytest.raises(ConfigMismatch, match="admission='frequent'"):
        open_cache(**DISK).namespace("often", admission="reused")
    with pytest.raises(UnknownOption, match="admission"):
        cache.namespace("another", admission="sometimes")  # type: ignore[arg-type]
    open_cache(None).namespace("in memory", admission="reused").put("key", b"1")
