"""What leaves a full disk first under each policy, and what is written anew of it."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import sqlite3
from pathlib import Path

import pytest
from conftest import OpenCache
from support.processes import Process
from test_disk import MIB, SEED, Host, stat, used

from kvstrata import _core
from kvstrata.errors import ConfigError, ConfigMismatch, TierUnavailable, UnknownOption
from kvstrata.tiers.catalog import Move
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.ledger import Ledger
from kvstrata.tiers.segments import segment_bytes_for
from kvstrata.tiers.wear import WriteLimit

DISK = 8 * MIB
SEGMENT = segment_bytes_for(DISK)
SIZE = 20_000  # a dozen go into a segment


class Cleaned(Host):
    """A host whose disk tier has a policy and drops segments when the test says so."""

    def __init__(self, directory: Path, policy: str, *, disk: int = DISK, memory: int = 16 * MIB) -> None:
        self.directory = directory
        self.store = _core.Store.open_private(memory, disk, SEED)
        self.tier = DiskTier(directory, disk, self.store, policy=policy)
        self.tier.recover()
        self.spaces = {}
        self.waiting = 0

    def fill_segment(self, name: str, count: int = 10, *, ttl_ms: int = 0) -> int:
        """Put records into a segment of their own, and return its number."""
        for i in range(count):
            self.put(b"%s %d" % (name.encode(), i), self.value(name, i), ttl_ms=ttl_ms)
        self.flush()
        self.tier._segments.seal()
        return max(segment.number for segment in self.tier._segments.all())

    @staticmethod
    def value(name: str, i: int) -> bytes:
        return random.Random(f"{name} {i}").randbytes(SIZE)

    def order(self) -> list[int]:
        return [segment.number for segment in self.tier._cleaner.order(self.tier._segments.all())]

    def clean(self, number: int) -> None:
        self.tier._cleaner.keep_some(number)
        self.drop(number)

    def drop(self, number: int) -> None:
        with self.tier._ledger.hold():
            self.tier._drop_segment(number)
        self.tier._segments.remove(number)
        self.store.demote_all()

    def there(self, name: str, count: int = 10) -> list[int]:
        """Which records are on disk with their values."""
        self.store.demote_all()
        keys = [b"%s %d" % (name.encode(), i) for i in range(count)]
        found = [i for i, at in enumerate(self.store.find_on_disk(self.space().id, keys)) if at is not None]
        assert [self.get(keys[i]) for i in found] == [self.value(name, i) for i in found]
        return found


@pytest.mark.parametrize("policy", ["fifo", "lru", "ttl"])
def test_the_oldest_segment_goes_first_where_nothing_speaks_against_it(tmp_path: Path, policy: str) -> None:
    host = Cleaned(tmp_path, policy)
    numbers = [host.fill_segment(name) for name in ("a", "b", "c")]
    assert host.order() == numbers
    host.close()


@pytest.mark.parametrize("policy", ["fifo", "lru", "ttl"])
def test_mostly_dead_segments_go_first_and_what_lives_in_them_is_kept(tmp_path: Path, policy: str) -> None:
    host = Cleaned(tmp_path, policy)
    alive, deleted, overwritten = (host.fill_segment(name) for name in "ado")
    expired = host.fill_segment("e", ttl_ms=50)
    for i in range(9):
        host.delete(b"d %d" % i)
        host.put(b"o %d" % i, b"newer")
    host.flush()
    newest = max(segment.number for segment in host.tier._segments.all())
    while any(host.space().contains(b"e %d" % i) for i in range(10)):
        pass
    assert host.order() == [expired, deleted, overwritten, newest, alive]  # of the newest, most is padding
    for number in (expired, deleted, overwritten):
        host.clean(number)
    assert host.there("d") == [9]
    assert (host.get(b"o 9"), host.get(b"o 0")) == (host.value("o", 9), b"newer")
    assert stat(host, "reinserted_records") == 2
    host.close()


def test_under_lru_what_was_used_since_it_was_written_gets_a_second_chance(tmp_path: Path) -> None:
    host = Cleaned(tmp_path, "lru")
    number = host.fill_segment("a")
    assert host.get(b"a 2") is not None  # in memory
    host.store.demote_all()
    assert host.get(b"a 5") is not None  # from disk
    host.clean(number)
    before = stat(host, "loaded_records")
    assert host.there("a") == [2, 5]
    assert stat(host, "loaded_records") == before + 2
    host.clean(host.fill_segment("b", 9))  # it lies there now, and was used by this very test
    assert host.store.find_on_disk(host.space().id, [b"a 2"])[0] is not None
    host.clean(host.fill_segment("c", 9))
    assert host.there("a") == []
    host.close()


@pytest.mark.parametrize("policy", ["fifo", "ttl"])
def test_under_other_policies_use_makes_no_difference(tmp_path: Path, policy: str) -> None:
    host = Cleaned(tmp_path, policy)
    number = host.fill_segment("a")
    assert host.get(b"a 2") is not None
    host.clean(number)
    assert host.there("a") == []
    host.close()


def test_no_more_than_a_quarter_of_a_segment_is_written_anew(tmp_path: Path) -> None:
    host = Cleaned(tmp_path, "lru")
    number = host.fill_segment("a", 12)
    assert len(host.there("a", 12)) == 12
    host.clean(number)
    kept = host.there("a", 12)
    assert 1 <= len(kept) <= SEGMENT // 4 // SIZE
    assert stat(host, "reinserted_bytes") <= SEGMENT // 4
    host.close()


def test_under_ttl_what_expires_first_goes_first_and_what_never_does_last(tmp_path: Path) -> None:
    host = Cleaned(tmp_path, "ttl")
    never, late, soon = (host.fill_segment(name, ttl_ms=ms) for name, ms in (("n", 0), ("l", 10**7), ("s", 10**6)))
    assert host.order() == [soon, late, never]
    host.close()


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_written_anew_is_found_after_a_restart(tmp_path: Path, killed: bool) -> None:
    host = Cleaned(tmp_path / "one", "lru")
    number = host.fill_segment("a")
    assert host.get(b"a 3") is not None
    host.clean(number)
    if not killed:
        host.close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    again = Cleaned(tmp_path / "two", "lru")
    assert again.there("a") == [3]
    again.close()
    host.close()


def test_an_older_version_never_comes_back_when_the_segment_with_the_newer_one_goes(tmp_path: Path) -> None:
    host = Cleaned(tmp_path / "one", "lru")
    host.fill_segment("a")
    host.put(b"a 3", b"newer")
    host.put(b"a 4", b"newer")
    host.flush()
    host.tier._segments.seal()
    second = max(host.order())
    assert host.get(b"a 3") == b"newer"  # is written anew
    host.store.demote_all()
    host.clean(second)
    for where in (host, Cleaned(shutil.copytree(tmp_path / "one", tmp_path / "two"), "lru")):
        where.store.demote_all()
        assert where.get(b"a 3") in (None, b"newer")
        assert where.get(b"a 4") in (None, b"newer")
        where.close()


@pytest.mark.parametrize("change", ["delete", "overwrite", "clear"])
def test_what_is_removed_while_it_is_written_anew_stays_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    host = Cleaned(tmp_path / "one", "lru")
    number = host.fill_segment("a")
    assert host.get(b"a 3") is not None
    append = host.tier._segments.append

    def meanwhile(records: object, *, hold: bool) -> object:
        where = append(records, hold=hold)  # type: ignore[arg-type]
        monkeypatch.undo()
        if change == "delete":
            host.delete(b"a 3")
        elif change == "overwrite":
            host.put(b"a 3", b"newer")
        else:
            host.clear()
        return where

    monkeypatch.setattr(host.tier._segments, "append", meanwhile)
    host.clean(number)
    newer = b"newer" if change == "overwrite" else None
    assert host.get(b"a 3") == newer
    again = Cleaned(shutil.copytree(tmp_path / "one", tmp_path / "two"), "lru")
    assert again.get(b"a 3") in (None, newer)
    again.close()
    host.close()


def test_a_segment_is_not_dropped_between_the_rows_of_what_is_kept_and_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Cleaned(tmp_path, "lru")
    number = host.fill_segment("a")
    assert host.get(b"a 3") is not None
    move = host.tier._catalog.move

    def move_and_drop_if_that_can_be(moves: list[Move]) -> None:
        move(moves)
        with contextlib.suppress(TierUnavailable):
            with Ledger(tmp_path, patience=0).hold():  # as another process
                pass
            host.tier._drop_segment(number)

    monkeypatch.setattr(host.tier._catalog, "move", move_and_drop_if_that_can_be)
    host.clean(number)
    assert host.there("a") == [3]
    host.close()


def test_what_was_deleted_does_not_come_back_when_cleaning_was_killed_before_it_told_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Cleaned(tmp_path / "one", "lru")
    number = host.fill_segment("a")
    assert host.get(b"a 3") is not None
    with monkeypatch.context() as dying:
        move = host.tier._catalog.move
        dying.setattr(host.tier._catalog, "move", lambda moves: (move(moves), 1 // 0))
        with pytest.raises(ZeroDivisionError):
            host.tier._cleaner.keep_some(number)
    host.drop(number)
    host.delete(b"a 3")
    again = Cleaned(shutil.copytree(tmp_path / "one", tmp_path / "two"), "lru")
    assert again.get(b"a 3") is None
    again.close()
    host.close()


def test_what_was_kept_before_cleaning_failed_half_way_is_kept_and_can_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Cleaned(tmp_path / "one", "lru")
    at_once = host.tier._catalog.batch_rows
    keys = [b"%d" % i for i in range(2 * at_once)]
    for key in keys:
        host.put(key, b"old")
    number = host.fill_segment("a")
    assert [host.get(key) for key in keys] == [b"old"] * len(keys)
    with monkeypatch.context() as broken:
        transaction, commits = host.tier._catalog._transaction, itertools.count(1)

        def fail_the_second(*arguments: int) -> contextlib.AbstractContextManager[sqlite3.Connection]:
            if next(commits) == 2:
                raise TierUnavailable("the catalog can't be written")
            return transaction(*arguments)

        broken.setattr(host.tier._catalog, "_transaction", fail_the_second)
        with pytest.raises(TierUnavailable, match="written"):
            host.tier._cleaner.keep_some(number)
    host.store.demote_all()
    host.drop(number)
    assert sum(host.get(key) == b"old" for key in keys) == at_once
    for key in keys:
        host.delete(key)
    again = Cleaned(shutil.copytree(tmp_path / "one", tmp_path / "two"), "lru")
    assert [again.get(key) for key in keys] == [None] * len(keys)
    again.close()
    host.close()


def test_a_load_that_was_planned_before_a_record_moved_does_not_forget_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Cleaned(tmp_path, "lru")
    number = host.fill_segment("a")
    assert host.get(b"a 3") is not None
    host.store.demote_all()
    read = host.tier._segments.read

    def meanwhile(*arguments: object) -> None:
        monkeypatch.undo()
        host.clean(number)
        read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(host.tier._segments, "read", meanwhile)
    host.get(b"a 3")
    assert host.there("a") == [3]
    host.close()


@pytest.mark.parametrize("policy", ["fifo", "lru", "ttl"])
def test_under_churn_the_capacity_holds_and_what_is_used_again_and_again_stays_under_lru(
    tmp_path: Path, policy: str
) -> None:
    host = Cleaned(tmp_path, policy, memory=2 * MIB)
    host.put(b"dear", b"dear" * 5000)
    for i in range(1500):
        host.put(b"%d" % i, bytes(SIZE))
        host.flush()
        if i % 100 == 0:
            host.store.demote_all()
            host.get(b"dear")
            assert used(tmp_path) <= DISK
        host.tier._capacity.close()  # waits for what is being cleaned
    host.store.demote_all()
    (there,) = host.store.find_on_disk(host.space().id, [b"dear"])
    assert (there is not None) == (policy == "lru")
    assert policy != "lru" or host.get(b"dear") == b"dear" * 5000
    assert stat(host, "reinserted_bytes") <= stat(host, "written_bytes") / 4
    assert stat(host, "dropped_segments") > 50
    host.close()


# ---- The option


def test_the_policy_is_the_same_for_all_who_have_a_cache_open_and_can_be_changed_by_the_next(
    shm: Path, open_cache: OpenCache, tmp_path: Path
) -> None:
    options = {"memory": "2MiB", "disk": "8MiB"}
    with open_cache(**options, disk_policy="lru"):
        with pytest.raises(ConfigMismatch, match="disk_policy"):
            open_cache(**options)
        with Process() as process:
            process.run(
                "cache = kvstrata.open(directory, disk_policy='lru', **options)",
                directory=tmp_path / "cache",
                options=options,
            )
            process.kill()
    with open_cache(**options, disk_policy="ttl") as cache:
        assert cache.options.disk_policy == "ttl"
    with pytest.raises(UnknownOption, match="disk_policy"):
        open_cache(**options, disk_policy="mru")


def test_another_policy_can_be_chosen_after_all_processes_were_killed(open_cache: OpenCache, tmp_path: Path) -> None:
    options = {"memory": "2MiB", "disk": "8MiB"}
    with Process() as process:
        process.run("cache = kvstrata.open(directory, **options)", directory=tmp_path / "cache", options=options)
        process.kill()
    assert open_cache(**options, disk_policy="lru").options.disk_policy == "lru"


# ---- Wear


def test_a_limit_lets_through_its_rate_and_a_second_at_once() -> None:
    now = 0.0
    limit = WriteLimit(1000, clock=lambda: now)
    assert [limit.admits(300) for _ in range(5)] == [True, True, True, True, False]  # overdrawn by 200
    now = 0.3
    assert [limit.admits(300), limit.admits(300)] == [True, False]
    now = 100.0
    assert limit.admits(5000)  # larger than a second's
    now = 103.9
    assert not limit.admits(1)
    now = 104.1
    assert limit.admits(1)
    assert all(WriteLimit(0).admits(1 << 40) for _ in range(3))


def test_what_is_beyond_the_limit_stays_in_memory_only_and_is_counted(open_cache: OpenCache) -> None:
    cache = open_cache(memory="8MiB", disk="32MiB", disk_write_limit="100kB/s")
    for i in range(50):
        cache.put(f"{i}", bytes(50_000))
        cache.flush()
    stats = cache.stats()["disk"]
    assert stats["limited_records"] + stats["written_records"] == 50
    assert stats["limited_records"] > 10
    assert cache.get_many([f"{i}" for i in range(50)]) == [bytes(50_000)] * 50
    assert cache.stats()["memory"]["dirty_bytes"] == 0


@pytest.mark.parametrize("limit", ["fast", "0", -1])
def test_a_limit_that_is_none_is_refused(open_cache: OpenCache, limit: object) -> None:
    with pytest.raises(ConfigError, match="disk_write_limit"):
        open_cache(disk="8MiB", disk_write_limit=limit)
