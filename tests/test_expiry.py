"""What has expired gives its memory back, without anybody asking for it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import OpenCache


def entries(cache: Any) -> int:
    count: int = cache.stats()["memory"]["entries"]
    return count


@pytest.mark.parametrize("disk", [0, "64MiB"])
def test_expired_records_are_reclaimed_by_the_puts_of_others(open_cache: OpenCache, disk: Any) -> None:
    cache = open_cache(disk=disk)
    ns = cache.namespace("short", ttl=0.05)
    ns.put_many({f"key {i}": bytes(1000) for i in range(3000)})
    cache.put_many({f"kept {i}": b"1" for i in range(100)}, ttl=1000)
    cache.flush()
    before = cache.stats()["memory"]["memory_used_bytes"]
    puts = 0
    while entries(cache) > 101:
        cache.put("other", b"1")
        puts += 1
    stats = cache.stats()
    assert stats["memory"]["expired"] == 3000
    assert stats["memory"]["memory_used_bytes"] < before / 10
    short = stats["namespaces"]["short"]
    assert (short["records"], short["memory_bytes"]) == (0, 0)
    assert all(cache.get(f"kept {i}") == b"1" for i in range(100))


def test_expired_records_leave_before_those_that_are_used(open_cache: OpenCache) -> None:
    cache = open_cache(None, memory="4MiB")
    kept = [f"kept {i}" for i in range(170)]
    cache.put_many(dict.fromkeys(kept, bytes(10_000)))  # half of the memory, and the oldest
    cache.put_many({f"short {i}": bytes(10_000) for i in range(130)}, ttl=0.05)
    while cache.contains_prefix(["short 129"]):
        pass
    for i in range(130):
        cache.put(f"new {i}", bytes(10_000))
        while i == 0 and entries(cache) > 171:  # it is looked at most every 64 ms for what has expired
            cache.put("new 0", bytes(10_000))
    assert cache.stats()["memory"]["evictions"] == 0
    assert cache.contains_prefix(kept) == 170


def test_a_pinned_record_stays_readable_when_it_has_expired(open_cache: OpenCache) -> None:
    cache = open_cache(None)
    cache.put("key", b"value", ttl=0.05)
    with cache.pin("key") as view:
        while entries(cache):
            cache.put("other", b"1")
            cache.delete("other")
        assert cache.get("key") is None
        assert view == b"value"


def test_times_to_live_of_all_lengths_end_in_their_order(open_cache: OpenCache) -> None:
    cache = open_cache(None)
    lengths = [0.001, 0.01, 0.07, 0.13, 0.3, 0.9, 5, 100, 1e4, 1e6, 1e8, 1e10]
    cache.put_many({})
    for length in reversed(lengths):
        cache.put(f"{length}", b"1", ttl=length)
    seen = []
    while (left := entries(cache)) > 6:
        if not seen or seen[-1] != left:
            seen.append(left)
        cache.put("other", b"1")
        cache.delete("other")
    assert seen == sorted(seen, reverse=True)
    assert [cache.get(f"{length}") for length in lengths] == [None] * 6 + [b"1"] * 6
