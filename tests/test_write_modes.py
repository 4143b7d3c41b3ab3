"""When records go to the disk: behind the put, through it, or back when they leave memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import Process

import kvstrata
from kvstrata.errors import ConfigError, ConfigMismatch, TierUnavailable, UnknownOption

OPTIONS = {"memory": "4MiB", "disk": "64MiB"}


def written(cache: kvstrata.Cache) -> int:
    disk = cache.stats()["disk"]
    assert isinstance(disk, dict)
    return int(disk["written_records"])


def test_what_is_put_through_is_on_disk_when_the_put_returns(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", write="through")
        ns.put("a", b"1")
        assert written(cache) == 1
        ns.put_many({"b": b"2", "c": b"3"})
        assert written(cache) == 3
        with ns.reserve("d", 1) as view:
            view[:] = b"4"
        assert written(cache) == 4


def test_a_put_through_that_the_disk_does_not_take_raises_and_is_in_memory(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", write="through")

        def refuse(records: object) -> None:
            raise OSError(28, "No space left on device")

        assert cache.below.tier is not None
        monkeypatch.setattr(cache.below.tier._writer, "_append", refuse)
        with pytest.raises(TierUnavailable, match="in memory, but the disk did not take"):
            ns.put("a", b"1")
        assert ns.get("a") == b"1"


def test_what_is_written_back_stays_in_memory_only_until_it_has_to_leave(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", write="back")
        for round_number in range(20):
            ns.put_many({f"key {i}": bytes([round_number]) * 50_000 for i in range(30)})
        cache.put("other", b"of the default namespace")
        cache.tiers.writer._store.wait_until_settled(60.0)  # type: ignore[union-attr]
        assert written(cache) == 1  # however often they were overwritten

        ns.put_many({f"more {i}": bytes(50_000) for i in range(100)})

        assert written(cache) > 1
        assert ns.get_many([f"key {i}" for i in range(30)]) == [bytes([19]) * 50_000] * 30
        assert ns.get_many([f"more {i}" for i in range(100)]) == [bytes(50_000)] * 100


@pytest.mark.parametrize("how", ["flush", "close"])
def test_flushing_and_closing_write_back_all(shm: Path, tmp_path: Path, how: str) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.namespace("n", write="back").put_many({f"key {i}": b"value" for i in range(100)})
        if how == "flush":
            cache.flush()
            assert written(cache) == 100
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert cache.namespace("n", write="back").get_many([f"key {i}" for i in range(100)]) == [b"value"] * 100


def test_what_a_killed_process_had_not_written_back_is_written_by_another(shm: Path, tmp_path: Path) -> None:
    with Process() as other:
        other.run("cache = kvstrata.open(path, **options)", path=tmp_path, options=OPTIONS)
        other.run("cache.namespace('n', write='back').put_many({f'key {i}': b'value' for i in range(100)})")
        other.kill()
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.flush()
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert cache.namespace("n", write="back").get_many([f"key {i}" for i in range(100)]) == [b"value"] * 100


def test_what_is_deleted_before_it_was_written_back_stays_away(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", write="back")
        ns.put_many({"a": b"1", "b": b"2"})
        assert ns.delete("a")
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert cache.namespace("n", write="back").get_many(["a", "b"]) == [None, b"2"]


def test_wishes_that_can_not_be_met_are_told(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        with pytest.raises(UnknownOption, match="through"):
            cache.namespace("n", write="thru")  # type: ignore[arg-type]
        cache.namespace("n", write="back")
        with pytest.raises(ConfigMismatch, match="write='back'"):
            cache.namespace("n")
    with kvstrata.open(memory="2MiB") as cache, pytest.raises(ConfigError, match="needs a disk tier"):
        cache.namespace("n", write="through")
