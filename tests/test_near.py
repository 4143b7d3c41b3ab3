"""Small values that a process keeps near: the same object again, for as long as it is true for everybody."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenCache
from support.processes import Process
from support.threads import failures_of

import kvstrata
from kvstrata.errors import ConfigError

VALUE = b"x" * 1024


def near_hits(cache: kvstrata.Cache) -> int:
    return int(cache.stats()["memory"]["near_hits"])


def test_a_value_that_was_read_is_the_same_object_the_next_time(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("a", VALUE)

    first, second = cache.get("a"), cache.get("a")

    assert first == VALUE
    assert first is second
    assert cache.get_many(["a", "absent", "a"]) == [VALUE, None, VALUE]
    assert cache.get_many(("a",))[0] is first
    assert near_hits(cache) == 4
    assert cache.stats()["memory"]["hits"] == 5


@pytest.mark.parametrize("gone", ["overwritten", "deleted", "cleared", "tagged", "moved on"])
def test_what_another_process_changes_is_not_found_here(open_cache: OpenCache, tmp_path: Path, gone: str) -> None:
    cache = open_cache()
    ns = cache.namespace("n")
    ns.put("a", VALUE, tags=["t"])
    assert ns.get("a") is ns.get("a")
    change = {
        "overwritten": "ns.put('a', b'new')", "deleted": "ns.delete('a')", "cleared": "ns.clear()",
        "tagged": "ns.delete_tag('t')", "moved on": "cache.namespace('n', version=2)",
    }[gone]  # fmt: skip
    with Process() as other:
        other.run("import kvstrata\ncache = kvstrata.open(path, memory='8MiB', disk=0)\nns = cache.namespace('n')",
                  path=str(tmp_path / "cache"))  # fmt: skip
        other.run(change)
        expected = b"new" if gone == "overwritten" else None
        assert ns.get("a") == expected
        assert ns.get_many(["a"]) == [expected]


def test_it_expires_with_its_record(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("a", VALUE, ttl=0.2)
    assert cache.get("a") is cache.get("a")
    deadline = time.monotonic() + 30
    while cache.get("a") is not None:
        assert time.monotonic() < deadline


def test_it_goes_when_its_record_leaves_memory(open_cache: OpenCache) -> None:
    cache = open_cache(memory="1MiB", near="256KiB")
    cache.put("a", VALUE)
    assert cache.get("a") is cache.get("a")
    for i in range(2000):
        cache.put(f"other {i}", VALUE)

    assert cache.get("a") is None


def test_uses_of_it_count_for_the_policy(open_cache: OpenCache) -> None:
    cache = open_cache(memory="1MiB", near="256KiB")
    cache.put("used", VALUE)
    cache.put("unused", VALUE)
    cache.get("unused")
    for i in range(2000):
        cache.put(f"other {i}", VALUE)
        assert cache.get("used") == VALUE

    assert near_hits(cache) > 1900
    assert cache.get("unused") is None


def test_how_often_it_is_used_counts_for_the_policy(open_cache: OpenCache) -> None:
    cache = open_cache(memory="1MiB", near="256KiB")
    ns = cache.namespace("n", policy="lfu")
    for key in ("often", "seldom"):
        ns.put(key, VALUE)
    for i in range(3000):
        ns.put(f"other {i}", VALUE)
        for _ in range(3):
            ns.get(f"other {i}")
        if i < 500:
            ns.get("often")
    assert ns.get("often") == VALUE
    assert ns.get("seldom") is None


def test_str_and_bytes_are_the_same_key(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("ä", VALUE)
    for key in ("ä", "ä".encode(), "ä", "ä".encode()):
        assert cache.get(key) == VALUE
    cache.delete("ä")
    assert cache.get("ä") is None
    assert cache.get("ä".encode()) is None


def test_namespaces_do_not_see_each_others_values(open_cache: OpenCache) -> None:
    cache = open_cache()
    spaces = [cache.namespace(name) for name in "abc"]
    for ns in spaces[:2]:
        ns.put("key", ns.name.encode())

    for _ in range(3):
        assert [ns.get("key") for ns in spaces] == [b"a", b"b", None]


def test_it_takes_no_more_memory_than_it_may(open_cache: OpenCache) -> None:
    cache = open_cache(memory="64MiB", near="1MiB")
    for i in range(4000):
        cache.put(f"{i}", bytes([i % 256]) * (i % 4096))
    for _ in range(3):
        for i in range(4000):
            assert cache.get(f"{i}") == bytes([i % 256]) * (i % 4096)

    stats = cache.stats()["memory"]
    assert 0 < stats["near_bytes"] <= 1 << 20
    assert 0 < stats["near_values"] < 4000


def test_a_key_of_str_counts_with_all_that_it_takes(open_cache: OpenCache) -> None:
    cache = open_cache()
    keys = {"a" * 300: 300, "\N{GRINNING FACE}" * 200: 200 * (4 + 4)}
    for key, nbytes in keys.items():
        before = cache.stats()["memory"]["near_bytes"]
        cache.put(key, b"v")
        cache.get(key)
        if before:  # else the table, too
            assert cache.stats()["memory"]["near_bytes"] - before >= nbytes


def test_whatever_gives_keys_can_be_asked_for_many(open_cache: OpenCache) -> None:
    cache = open_cache()
    values = {"a": b"1", "b": b"2"}
    cache.put_many(values)

    for _ in range(2):
        assert cache.get_many(values.keys()) == [b"1", b"2"]  # type: ignore[arg-type]
        assert cache.get_many(key for key in values) == [b"1", b"2"]  # type: ignore[arg-type]


def test_values_larger_than_4_kib_are_not_kept(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("large", bytes(4097))
    assert cache.get("large") is not cache.get("large")
    assert cache.stats()["memory"]["near_values"] == 0


def test_what_is_read_once_takes_nobodys_place(open_cache: OpenCache) -> None:
    cache = open_cache(memory="64MiB", near="512KiB")
    hot = [f"hot {i}" for i in range(50)]
    for key in hot:
        cache.put(key, VALUE)
    for _ in range(20):
        cache.get_many(hot)
    for i in range(10_000):
        cache.put("once", VALUE)
        cache.put(f"{i}", VALUE)
        cache.get(f"{i}")
    before = near_hits(cache)
    cache.get_many(hot)

    assert near_hits(cache) - before >= 40


def test_without_near_every_get_makes_a_copy(open_cache: OpenCache) -> None:
    cache = open_cache(near=0)
    cache.put("a", VALUE)

    assert cache.get("a") is not cache.get("a")
    assert near_hits(cache) == 0
    with pytest.raises(ConfigError, match="near"):
        kvstrata.open(near="some")


def test_closing_lets_go_of_keys_and_values(open_cache: OpenCache) -> None:
    cache = open_cache()
    key = b"a key of its own"
    references = sys.getrefcount(key)
    cache.put(key, VALUE)
    value: Any = cache.get(key)
    assert sys.getrefcount(key) == references + 1
    held = sys.getrefcount(value)

    cache.close()

    assert sys.getrefcount(key) == references
    assert sys.getrefcount(value) == held - 1


def test_threads_that_change_and_read_see_no_value_older_than_one_they_saw(open_cache: OpenCache) -> None:
    cache = open_cache(near="64KiB")  # less than all values take, so that they come and go
    keys = [f"{i}" for i in range(200)]
    started = threading.Barrier(4)

    def change(mine: list[str], failures: list[str]) -> None:
        started.wait()
        for turn in range(1, 60):
            for key in mine:
                cache.put(key, b"%d " % turn + VALUE)
                found = cache.get(key)
                if found is None or int(found.split()[0]) != turn:
                    failures.append(f"{key} after {turn}: {found!r:.20}")

    def look(seed: int, done: threading.Event, failures: list[str]) -> None:
        chance = random.Random(seed)
        newest = dict.fromkeys(keys, 0)
        started.wait()
        while not done.is_set():
            chosen = chance.choices(keys, k=16)
            for key, found in zip(chosen, cache.get_many(chosen), strict=True):
                turn = int(found.split()[0]) if found else 0
                if turn < newest[key]:
                    failures.append(f"{key}: {turn} after {newest[key]}")
                newest[key] = turn

    assert failures_of([partial(change, keys[n::2]) for n in range(2)], [partial(look, n) for n in range(2)]) == []
    assert near_hits(cache) > 0


def test_a_forked_child_and_its_parent_see_each_others_changes(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("a", VALUE)
    assert cache.get("a") is cache.get("a")
    child = os.fork()
    if not child:
        code = 1
        try:
            assert cache.get("a") == VALUE
            assert cache.get("a") is cache.get("a")
            cache.put("a", b"child")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get("a") == b"child"
