"""Prefetch: what was looked up comes up in the background, within bounds, and harms nobody."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_prefix import BIG, kv_of

import kvstrata
from kvstrata import Cache, PrefixCache
from kvstrata.errors import CacheClosed, ConfigError, InvalidKey
from kvstrata.movement.prefetch import Prefetch, Prefetcher
from kvstrata.tiers.segments import SegmentSet

KIB = 1 << 10
KEYS = [f"key {i}" for i in range(20)]
VALUES = {key: key.encode() * 10_000 for key in KEYS}  # of 50 to 60 kB


@pytest.fixture
def cache(shm: Path, tmp_path: Path) -> Iterator[Cache]:
    """A cache with values that lie on disk only."""
    with kvstrata.open(tmp_path / "cache", memory="16MiB", disk="64MiB", prefetch="256KiB") as cache:
        cache.put_many(VALUES)
        cache.flush()
        cache.demote()
        yield cache
        memory = cache.stats()["memory"]
        assert (memory["pins"], memory["reservations"]) == (0, 0)


class Gate:
    """Lets reads of segments wait until it is opened, and tells when one has come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.nbytes: list[int] = []
        read = SegmentSet.read

        def gated(segments: SegmentSet, reads: Sequence[Any], done: Any) -> None:
            self.nbytes.append(sum(len(one.buffer) for one in reads))
            self.reached.set()
            assert self.opened.wait(60)
            read(segments, reads, done)

        monkeypatch.setattr(SegmentSet, "read", gated)


def counts(cache: Cache, *names: str) -> tuple[int, ...]:
    stats = cache.stats()["prefetch"]
    return tuple(stats[name] for name in names)


def in_memory(cache: Cache) -> list[str]:
    pins, _ = cache._space.pin_many(KEYS, uses=False)
    there = [key for key, pin in zip(KEYS, pins, strict=True) if pin is not None]
    for pin in pins:
        if pin is not None:
            pin.release()
    return there


def test_what_is_prefetched_is_in_memory_and_read_once(cache: Cache) -> None:
    prefetch = cache.prefetch(KEYS)

    assert prefetch.wait(60)
    assert prefetch.done
    assert prefetch.loaded == len(KEYS)
    assert in_memory(cache) == KEYS
    assert cache.get_many(KEYS) == list(VALUES.values())
    assert cache.stats()["disk"]["loaded_records"] == len(KEYS)
    assert counts(cache, "requests", "done_requests", "loaded_records") == (1, 1, len(KEYS))
    assert counts(cache, "queued_requests", "in_flight_bytes") == (0, 0)


def test_a_load_right_after_reads_nothing_twice(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    prefetch = cache.prefetch(KEYS)
    assert gate.reached.wait(60)
    loading = threading.Thread(target=lambda: values.extend(cache.get_many(KEYS)))
    values: list[bytes] = []
    loading.start()
    gate.opened.set()
    loading.join()
    assert prefetch.wait(60)

    assert values == list(VALUES.values())
    assert cache.stats()["disk"]["loaded_records"] == len(KEYS)


def test_no_more_bytes_are_read_ahead_at_a_time_than_was_said(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.opened.set()

    assert cache.prefetch(KEYS).wait(60)

    assert len(gate.nbytes) > 1
    assert max(gate.nbytes) <= 256 * KIB


def test_a_record_larger_than_that_comes_alone(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("large", bytes(600 * KIB))
    cache.flush()
    cache.demote()
    gate = Gate(monkeypatch)
    gate.opened.set()

    assert cache.prefetch([KEYS[0], "large", KEYS[1]]).wait(60)

    assert [nbytes > 600 * KIB for nbytes in gate.nbytes] == [False, True, False]
    assert in_memory(cache) == KEYS[:2]


def test_a_cancelled_prefetch_brings_nothing_more(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    running, queued = cache.prefetch(KEYS[:10]), cache.prefetch(KEYS[10:])
    assert gate.reached.wait(60)
    assert not running.done
    assert not running.wait(0)
    running.cancel()
    queued.cancel()
    gate.opened.set()

    assert running.wait(60)
    assert queued.wait(60)
    assert 0 < running.loaded < 10
    assert queued.loaded == 0
    assert counts(cache, "cancelled_requests") == (2,)


def test_of_many_requests_the_oldest_are_dropped(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    first = cache.prefetch([KEYS[0]])
    assert gate.reached.wait(60)
    requests = [cache.prefetch([KEYS[i % 20]]) for i in range(70)]

    assert [request.done for request in requests] == [True] * 6 + [False] * 64
    assert counts(cache, "dropped_requests", "queued_requests") == (6, 64)
    gate.opened.set()
    assert all(request.wait(60) for request in [first, *requests])
    assert in_memory(cache) == KEYS


def test_nothing_goes_on_after_the_cache_is_closed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    running, queued = cache.prefetch(KEYS[:10]), cache.prefetch(KEYS[10:])
    assert gate.reached.wait(60)
    closing = threading.Thread(target=cache.close)
    closing.start()
    assert queued.wait(60)  # dropped at once
    gate.opened.set()
    closing.join()

    assert running.done
    assert not [thread for thread in threading.enumerate() if thread.name == "kvstrata-prefetch"]
    with pytest.raises(CacheClosed):
        cache.prefetch(KEYS)
    assert cache.tiers.prefetcher.request(1, [], 1).done
    reopened = kvstrata.open(cache.path, memory="16MiB", disk="64MiB")
    assert reopened.get_many(KEYS) == list(VALUES.values())
    reopened.close()
    monkeypatch.setattr(cache, "stats", lambda: {"memory": {"pins": 0, "reservations": 0}})


def test_a_forked_child_prefetches_for_itself_and_waits_for_nothing_of_its_parents(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    parents = cache.prefetch(KEYS[:10])
    assert gate.reached.wait(60)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            gate.opened.set()
            own = cache.prefetch(KEYS[10:])
            status = 0 if not parents.wait() and own.wait(60) and own.loaded == 10 else 2
            cache.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    gate.opened.set()
    assert parents.wait(60)
    assert parents.loaded == 10


def test_faults_of_the_tier_are_counted_and_not_raised(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "a disk that broke")

    monkeypatch.setattr(SegmentSet, "read", fail)
    prefetch = cache.prefetch(KEYS)

    assert prefetch.wait(60)
    assert prefetch.loaded == 0
    assert counts(cache, "failed_requests") == (1,)


def test_keys_that_are_absent_or_in_memory_cost_nothing(cache: Cache) -> None:
    cache.get(KEYS[0])
    before = cache.stats()["disk"]["loaded_records"]

    assert cache.prefetch([KEYS[0], "absent"]).wait(60)
    assert cache.stats()["disk"]["loaded_records"] == before


def test_no_request_brings_more_than_half_of_what_memory_holds(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, memory="4MiB", disk="64MiB", prefetch="1MiB") as cache:
        for key in KEYS:
            cache.put(key, bytes(500 * KIB))
            cache.flush()
        cache.demote()
        prefetch = cache.prefetch(KEYS)

        assert prefetch.wait(60)
        assert 0 < prefetch.loaded * 500 * KIB <= 2 << 20
        assert counts(cache, "cut_requests") == (1,)


def test_what_can_not_be_a_key_or_a_size_is_refused(cache: Cache) -> None:
    with pytest.raises(InvalidKey, match="int"):
        cache.prefetch([7])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="prefetch"):
        kvstrata.open(prefetch="much")


def test_without_bytes_in_flight_nothing_is_prefetched(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, memory="4MiB", disk="16MiB", prefetch=0) as cache:
        assert cache.prefetch(["key"]).done
        assert counts(cache, "dropped_requests") == (1,)


def test_a_lookup_of_a_prefix_can_start_its_prefetch(shm: Path, tmp_path: Path) -> None:
    tokens = list(range(64 * 6))
    kv = kv_of(tokens, BIG)
    with kvstrata.open(tmp_path, memory="32MiB", disk="64MiB") as cache:
        prefixes = PrefixCache.open(cache, BIG)
        prefixes.store(tokens, kv)
        cache.flush()
        cache.demote()
        match = prefixes.match(tokens, prefetch=True)
        assert np.array_equal(match.load().kv, kv)
        assert match.prefetched is not None
        assert match.prefetched.wait(60)
        assert cache.stats()["disk"]["loaded_records"] == 6
        assert prefixes.match(tokens).prefetched is None
        assert prefixes.match([9] * 128, prefetch=True).prefetched is None


def test_layers_of_a_prefix_that_is_being_prefetched_are_not_read_once_more(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = list(range(64 * 6))
    kv = kv_of(tokens, BIG)
    with kvstrata.open(tmp_path, memory="32MiB", disk="64MiB") as cache:
        prefixes = PrefixCache.open(cache, BIG)
        prefixes.store(tokens, kv)
        cache.flush()
        cache.demote()
        gate = Gate(monkeypatch)
        match = prefixes.match(tokens, prefetch=True)
        assert gate.reached.wait(60)
        layers = match.load_layers()
        gate.opened.set()
        assert all(np.array_equal(words, kv[layer]) for layer, words in layers)
        assert layers.tokens == len(tokens)
        assert cache.stats()["disk"]["loaded_records"] == 6


def test_a_prefetcher_that_can_not_start_a_thread_drops_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    prefetcher = Prefetcher(lambda ns, keys: [1] * len(keys), lambda ns, keys: [None] * len(keys), 100)
    request: Prefetch = prefetcher.request(1, ["key"], 10)

    assert request.done
    assert prefetcher.stats()["dropped_requests"] == 1
