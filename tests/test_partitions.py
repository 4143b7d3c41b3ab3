"""Namespaces share the memory: what one may take, what others leave to it, and what holders keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import OpenCache
from support.processes import Process
from test_sharing import in_a_fork

from kvstrata import Cache, Namespace
from kvstrata.errors import CacheClosed, ConfigError, ConfigMismatch, TierFull

MEMORY = 16 << 20


def working_set_hit_ratio(cache: Cache, tenant: Namespace, scanner: Namespace, sizes: tuple[int, int]) -> float:
    """One tenant uses 300 keys again and again, by Zipf's law, while another stores keys that nobody asks for.

    Returns the part of the later uses of a key that are hits.
    """
    random = np.random.default_rng(7)
    chances = 1 / np.arange(1, 301)
    keys = random.choice(300, 6000, p=chances / chances.sum())
    hits = 0
    for step, key in enumerate(keys.tolist()):
        if tenant.get(b"%d" % key) is not None:
            hits += 1
        else:
            tenant.put(b"%d" % key, bytes(20_000))
        for scanned in range(4):
            scanner.put(b"%d/%d" % (step, scanned), bytes(int(random.integers(*sizes))))
    return hits / (len(keys) - len(set(keys.tolist())))


@pytest.mark.parametrize("policy", ["lru", "w-tinylfu", "auto"])
@pytest.mark.parametrize("sizes", [(20_000, 20_001), (500, 60_000)], ids=["of one size", "of many sizes"])
def test_a_scan_can_not_push_another_tenant_below_its_guarantee(
    open_cache: OpenCache, policy: str, sizes: tuple[int, int]
) -> None:
    ratios = {}
    for guarantee in (None, "8MiB"):
        cache = open_cache(None, memory=MEMORY)
        tenant = cache.namespace("tenant", policy=policy, guarantee=guarantee)
        ratios[guarantee] = working_set_hit_ratio(cache, tenant, cache.namespace("scanner", policy=policy), sizes)
        cache.close()
    assert ratios["8MiB"] == 1, ratios  # all of the working set stays
    assert ratios[None] < ratios["8MiB"] - 0.03, ratios


def test_what_is_guaranteed_but_not_used_is_there_for_others(open_cache: OpenCache) -> None:
    cache = open_cache(None, memory=MEMORY)
    tenant = cache.namespace("tenant", guarantee="8MiB")
    other = cache.namespace("other")
    other.put_many({f"{i}": bytes(20_000) for i in range(700)})
    assert cache.stats()["namespaces"]["other"]["memory_bytes"] > 13 << 20
    tenant.put_many({f"{i}": bytes(20_000) for i in range(380)})
    assert tenant.contains_prefix([f"{i}" for i in range(380)]) == 380
    other.put_many({f"again {i}": bytes(20_000) for i in range(700)})
    assert tenant.contains_prefix([f"{i}" for i in range(380)]) == 380


def test_a_large_value_finds_room_among_what_is_guaranteed(open_cache: OpenCache) -> None:
    cache = open_cache(None, memory=MEMORY)
    tenant = cache.namespace("tenant", guarantee="8MiB")
    other = cache.namespace("other")
    for i in range(1500):  # they lie alternately
        tenant.put(f"{i}", bytes(4000))
        other.put(f"{i}", bytes(5000))
    other.put("large", bytes(4 << 20))
    assert other.get("large") == bytes(4 << 20)


def test_guarantees_are_bounded_and_the_same_for_all(open_cache: OpenCache) -> None:
    cache = open_cache(memory=MEMORY)
    cache.namespace("a", guarantee="8MiB")
    with pytest.raises(ConfigMismatch, match="guarantee"):
        open_cache(memory=MEMORY).namespace("a")
    with pytest.raises(ConfigError, match="3/4"):
        cache.namespace("b", guarantee="5MiB")
    with pytest.raises(ConfigError, match="3/4"):
        cache.namespace("b", guarantee="13MiB")
    cache.namespace("b", guarantee="4MiB")


# ---- Holders


def fill(cache: Cache) -> None:
    cache.put_many({f"filler {i}": bytes(20_000) for i in range(2 * MEMORY // 20_000)})


@pytest.mark.parametrize("disk", [0, "64MiB"])
def test_what_is_held_stays_in_memory_until_it_is_released(open_cache: OpenCache, disk: int | str) -> None:
    cache = open_cache(memory=MEMORY, disk=disk)
    ns = cache.namespace("prompts")
    keys = [f"{i}" for i in range(50)]
    ns.put_many(dict.fromkeys(keys, bytes(20_000)))
    cache.flush()
    cache.demote()  # with a disk tier, they have to be loaded
    holder = cache.holder("system prompts", limit="4MiB")
    assert holder.hold(ns, [*keys, "absent"]) == 50
    assert 1_000_000 < holder.held_bytes < 1_100_000
    fill(cache)
    cache.flush()
    cache.demote()
    assert all(pin is not None for pin in ns._space.pin_many(keys)[0])
    assert cache.stats()["holders"] == {"system prompts": {"limit": 4 << 20, "held_bytes": holder.held_bytes}}
    holder.release(ns, keys[:25])
    fill(cache)
    assert [pin is not None for pin in ns._space.pin_many(keys)[0]] == [False] * 25 + [True] * 25
    holder.release()
    assert holder.held_bytes == 0
    fill(cache)
    assert not any(ns._space.pin_many(keys)[0])
    holder.close()
    assert cache.stats()["holders"] == {}


def test_held_records_can_be_removed_and_count_no_more(open_cache: OpenCache) -> None:
    cache = open_cache(None, memory=MEMORY)
    holder = cache.holder("holder", limit="1MiB")
    for remove in (
        lambda: cache.delete("key"),
        lambda: cache.put("key", b"2"),
        cache.clear,
        lambda: [cache.put("filler", bytes(1000)) for _ in iter(lambda: "key" in cache, False)],
    ):
        cache.put("key", bytes(1000), ttl=0.1)
        assert holder.hold(cache, ["key"]) == 1
        remove()
        fill(cache)
        assert holder.held_bytes == 0


def test_a_holder_keeps_no_more_than_its_limit(open_cache: OpenCache) -> None:
    cache = open_cache(None, memory=MEMORY)
    holder = cache.holder("holder", limit="90kB")
    cache.put_many({f"{i}": bytes(20_000) for i in range(10)})
    with pytest.raises(TierFull, match="held by 'holder'"):
        holder.hold(cache, [f"{i}" for i in range(10)])
    assert holder.held_bytes == 4 * 20_160
    with pytest.raises(ConfigError, match="half"):
        cache.holder("another", limit="8MiB")
    with pytest.raises(ConfigMismatch, match="limit"):
        cache.holder("holder", limit="1MB")
    for name in ("", "x" * 129, None):
        with pytest.raises(ConfigError):
            cache.holder(name, limit="1MB")  # type: ignore[arg-type]
    holder.close()
    with pytest.raises(ConfigError, match="closed"):
        holder.hold(cache, ["0"])
    cache.close()
    with pytest.raises(CacheClosed):
        holder.release()


def test_a_holder_outlives_the_process_that_made_it(open_cache: OpenCache, shm: Path, tmp_path: Path) -> None:
    cache = open_cache(memory=MEMORY)
    with Process() as process:
        process.run(
            "cache = kvstrata.open(path, memory=memory, disk=0)\n"
            "cache.put('key', b'value')\n"
            "assert cache.holder('holder', limit='1MiB').hold(cache, ['key']) == 1\n",
            path=tmp_path / "cache",
            memory=MEMORY,
        )
        process.kill()
    fill(cache)
    assert cache.get("key") == b"value"
    cache.holder("holder", limit="1MiB").close()
    fill(cache)
    assert cache.get("key") is None


def test_a_holder_can_be_used_in_a_forked_child(open_cache: OpenCache) -> None:
    cache = open_cache(memory=MEMORY)
    cache.put_many({"a": b"1", "b": b"1"})
    holder = cache.holder("holder", limit="1MiB")
    holder.hold(cache, ["a"])

    def child() -> bool:
        before = holder.held_bytes
        return holder.hold(cache, ["b"]) == 1 and holder.held_bytes == 2 * before

    assert in_a_fork(child)
    fill(cache)
    assert cache.get_many(["a", "b"]) == [b"1", b"1"]
