"""A namespace's quota on disk: exact for all processes and over restarts, and kept by letting its oldest records go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import OpenCache
from support.processes import Process

import kvstrata
from kvstrata.errors import ConfigError

OPTIONS = {"memory": "16MiB", "disk": "64MiB"}
RECORD = 10_000 // 64 * 64 + 128  # about, with header and key


def on_disk(cache: kvstrata.Cache, name: str = "ns") -> tuple[int, int]:
    figures = cache.stats()["namespaces"][name]
    return figures["disk_records"], figures["disk_bytes"]


def fill(ns: kvstrata.Namespace, cache: kvstrata.Cache, keys: range, size: int = 10_000) -> None:
    for i in keys:
        ns.put(f"{i}", bytes([i % 256]) * size)
    cache.flush()


def kept(cache: kvstrata.Cache, ns: kvstrata.Namespace, count: int) -> list[int]:
    keys = [f"{i}" for i in range(count)]
    cache.demote()
    return [i for i, at in enumerate(cache.tiers.live_store().find_on_disk(ns._space.id, keys)) if at is not None]


def test_what_a_namespace_has_on_disk_is_counted_exactly_and_again_after_a_restart(open_cache: OpenCache) -> None:
    with open_cache(**OPTIONS) as cache:
        ns = cache.namespace("ns")
        assert on_disk(cache) == (0, 0)
        fill(ns, cache, range(50))
        records, size = on_disk(cache)
        assert records == 50
        each = size // 50
        assert 10_000 < each < 10_300
        ns.delete("3")
        ns.put("4", bytes(10_000))
        ns.put("5", b"")
        cache.flush()
        assert on_disk(cache) == (49, 48 * each + 128)
        other = cache.namespace("other")
        other.put("1", b"")
        cache.flush()
        assert on_disk(cache, "other") == (1, 128)
        expected = on_disk(cache)
    with open_cache(**OPTIONS) as cache:
        ns = cache.namespace("ns")
        assert on_disk(cache) == expected


@pytest.mark.parametrize("immutable", [False, True])
def test_the_oldest_records_make_room_for_new_ones_and_no_other_namespace_does(
    open_cache: OpenCache, immutable: bool
) -> None:
    cache = open_cache(**OPTIONS)
    other = cache.namespace("other")
    fill(other, cache, range(20))
    ns = cache.namespace("ns", disk_quota=300_000, immutable=immutable)
    for start in range(0, 100, 5):
        fill(ns, cache, range(start, start + 5))
        assert on_disk(cache)[1] <= 300_000
    found = kept(cache, ns, 100)
    assert found == list(range(100 - len(found), 100))
    assert 20 <= len(found) <= 29
    assert on_disk(cache)[0] == len(found)
    assert on_disk(cache, "other")[0] == 20
    assert ns.get("99") == bytes([99]) * 10_000


def test_a_batch_larger_than_the_quota_leaves_its_last_records_on_disk(open_cache: OpenCache) -> None:
    cache = open_cache(**OPTIONS)
    ns = cache.namespace("ns", disk_quota=100_000)
    ns.put_many({f"{i}": bytes(10_000) for i in range(100)})
    cache.flush()
    assert on_disk(cache)[1] <= 100_000
    found = kept(cache, ns, 100)
    assert found == list(range(100 - len(found), 100))
    assert len(found) >= 5


def test_a_record_larger_than_the_quota_stays_in_memory_and_costs_no_other(open_cache: OpenCache) -> None:
    cache = open_cache(**OPTIONS)
    ns = cache.namespace("ns", disk_quota=100_000)
    fill(ns, cache, range(5))
    ns.put("large", bytes(200_000))
    cache.flush()
    assert on_disk(cache)[0] == 5
    assert ns.get("large") == bytes(200_000)
    assert cache.stats()["disk"]["error quota"] == 1


def test_the_quota_holds_for_processes_together_and_after_a_restart(
    open_cache: OpenCache, tmp_path: Path, shm: Path
) -> None:
    script = """
cache = kvstrata.open(directory, **options)
ns = cache.namespace("ns", disk_quota=500_000)
for i in range(200):
    ns.put(f"{number} {i}", bytes(10_000))
    if i % 10 == 0:
        cache.flush()
        assert cache.stats()["namespaces"]["ns"]["disk_bytes"] <= 500_000
cache.flush()
"""
    processes = [Process() for _ in range(3)]
    for number, process in enumerate(processes):
        process.start(script, directory=tmp_path / "cache", options=OPTIONS, number=number)
    for process in processes:
        process.finish()
        process.kill()
    for file in shm.iterdir():
        file.unlink()
    cache = open_cache(**OPTIONS)
    ns = cache.namespace("ns", disk_quota=500_000)
    assert 400_000 < on_disk(cache)[1] <= 500_000
    fill(ns, cache, range(100))
    assert on_disk(cache)[1] <= 500_000
    ns = cache.namespace("ns", disk_quota=100_000)
    assert on_disk(cache)[1] <= 100_000


def test_what_a_quota_let_go_does_not_come_back(open_cache: OpenCache, tmp_path: Path, shm: Path) -> None:
    cache = open_cache(**OPTIONS)
    ns = cache.namespace("ns", disk_quota=100_000)
    fill(ns, cache, range(9))
    fill(ns, cache, range(10, 15))
    assert "0" not in [f"{i}" for i in kept(cache, ns, 15)]
    ns.put("0", b"newer")
    shutil.copytree(tmp_path / "cache", tmp_path / "killed")
    again = open_cache(tmp_path / "killed", **OPTIONS)
    assert again.namespace("ns", disk_quota=100_000).get("0") in (None, b"newer")


@pytest.mark.parametrize(("disk", "quota"), [("8MiB", 0), (0, "1MiB"), ("8MiB", "much")])
def test_a_quota_that_means_nothing_is_refused(open_cache: OpenCache, disk: object, quota: object) -> None:
    with pytest.raises(ConfigError, match="disk_quota"):
        open_cache(disk=disk).namespace("ns", disk_quota=quota)  # type: ignore[arg-type]
