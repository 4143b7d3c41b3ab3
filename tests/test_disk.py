"""The disk tier under a real store: what it keeps, what it drops, and what faults and damage cost."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvstrata
from kvstrata import _core
from kvstrata.errors import FormatError, TierUnavailable, VersionConflict
from kvstrata.record import NamespaceInfo
from kvstrata.tiers import segment_format
from kvstrata.tiers.base import Stats
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.segment_format import pack_header
from kvstrata.tiers.segments import segment_bytes_for

SEED = 99
MIB = 1 << 20


class Host:
    """A store with a disk tier below it, and what a cache does between the two."""

    def __init__(self, directory: Path, *, memory: int = 16 * MIB, disk: int = 64 * MIB, seed: int = SEED) -> None:
        self.directory = directory
        self.store = _core.Store.open_private(memory, disk, seed)
        self.tier = DiskTier(directory, disk, self.store)
        self.tier.recover()
        self.spaces: dict[str, _core.Space] = {}
        self.waiting = 0  # bytes since the last flush

    def space(self, name: str = "m", version: int = 1) -> _core.Space:
        """Return a namespace; those whose name starts with "i" are immutable."""
        if name not in self.spaces or self.spaces[name].version != version:
            immutable = name.startswith("i")
            ns = self.tier.open_namespace(name, version, immutable).id
            self.spaces[name] = self.store.open_namespace(ns, name, version, "lru", 0, 0, immutable)
        return self.spaces[name]

    def put(self, key: bytes, value: bytes, name: str = "m", *, ttl_ms: int = 0) -> None:
        space = self.space(name)
        replaced = space.put(key, value, ttl_ms)
        if replaced:
            self.tier.delete(space.id, [(key, replaced)])
        self.waiting += len(value)
        if self.waiting > 2 * MIB:
            self.flush()

    def flush(self) -> None:
        self.waiting = 0
        while records := self.store.take_dirty(50, 4 * MIB, 0.0, 0.0):
            self.tier.write(records)

    def get(self, key: bytes, name: str = "m", version: int = 1) -> bytes | None:
        space = self.space(name, version)
        value = space.get(key)
        if value is not _core.BELOW:
            return value  # type: ignore[no-any-return]
        (loaded,) = self.tier.load(space.id, [key])
        return None if loaded is None else bytes(loaded)

    def delete(self, key: bytes, name: str = "m") -> None:
        space = self.space(name)
        _, on_disk = space.remove(key)
        if on_disk:
            self.tier.delete(space.id, [(key, None)])

    def clear(self, name: str = "m") -> None:
        space = self.space(name)
        self.tier.set_epoch(space.id, space.clear())

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.store.closed:
            return
        self.flush()
        self.tier.close()
        self.store.close()


def used(directory: Path) -> int:
    total = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            there = path.stat()
            total += max(there.st_size, there.st_blocks * 512)
    return total


def values(count: int, sizes: list[int], seed: int = 1) -> dict[bytes, bytes]:
    generator = random.Random(seed)
    return {b"key %d" % i: generator.randbytes(generator.choice(sizes)) for i in range(count)}


def stat(host: Host, name: str) -> int:
    value = host.tier.stats()[name]
    assert isinstance(value, int)
    return value


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.close()


def killed(host: Host, tmp_path: Path) -> Path:
    """Return the directory as a kill at this moment would leave it."""
    copy = tmp_path.with_name(tmp_path.name + "-killed")
    shutil.copytree(tmp_path, copy)
    return copy


# ---- What is kept


def test_everything_is_there_after_a_restart(host: Host, tmp_path: Path) -> None:
    content = values(150, [0, 1, 100, 4096, 60_000, 65_536, 200_000])
    for name in ("m", "i"):
        for key, value in content.items():
            host.put(key, value, name)
    host.close()
    again = Host(tmp_path)
    for name in ("m", "i"):
        assert {key: again.get(key, name) for key in content} == content
    assert stat(again, "restored_records") == 300
    again.close()


def test_many_keys_are_loaded_in_one_call_and_promoted(host: Host) -> None:
    content = values(200, [100, 20_000, 70_000])
    for key, value in content.items():
        host.put(key, value)
    host.flush()
    host.store.demote_all()
    loaded = host.tier.load(host.space().id, [*content, b"absent"])
    assert [None if found is None else bytes(found) for found in loaded] == [*content.values(), None]
    assert all(host.space().get(key) == value for key, value in content.items())


def test_a_value_can_be_used_while_others_are_read(host: Host) -> None:
    content = values(100, [100, 70_000])
    for key, value in content.items():
        host.put(key, value)
    host.flush()
    host.store.demote_all()
    seen: dict[int, bytes] = {}
    host.tier.load(host.space().id, [*content, b"absent"], lambda i, value: seen.setdefault(i, bytes(value)))
    assert seen == dict(enumerate(content.values()))


def test_a_user_of_arriving_values_that_fails_leaves_nothing_behind(host: Host) -> None:
    content = values(100, [100, 70_000])
    for key, value in content.items():
        host.put(key, value)
    host.flush()
    host.store.demote_all()

    def fail(position: int, value: object) -> None:
        raise ValueError(f"no use for {position}")

    with pytest.raises(ValueError, match="no use for"):
        host.tier.load(host.space().id, list(content), fail)
    gc.collect()
    assert (host.store.stats()["pins"], host.store.stats()["reservations"]) == (0, 0)
    assert {key: host.get(key) for key in content} == content


def test_str_and_bytes_keys_name_the_same_record(host: Host) -> None:
    host.put("schlüssel".encode(), b"value")
    host.flush()
    host.store.demote_all()
    (loaded,) = host.tier.load(host.space().id, ["schlüssel"])
    assert loaded is not None
    assert bytes(loaded) == b"value"


def test_a_key_asked_for_twice_is_read_once_and_then_in_memory(host: Host) -> None:
    host.put(b"k", b"v" * 100_000)
    host.flush()
    host.store.demote_all()
    first, second = host.tier.load(host.space().id, [b"k", b"k"])
    assert first is not None
    assert bytes(first) == b"v" * 100_000
    assert second is None
    assert bytes(host.space().get(b"k")) == b"v" * 100_000
    assert host.tier.stats()["loaded_records"] == 1


def test_a_value_that_memory_has_no_room_for_is_served_all_the_same(host: Host, tmp_path: Path) -> None:
    value = random.Random(1).randbytes(5 * MIB)
    host.put(b"large", value)
    host.close()
    small = Host(tmp_path, memory=2 * MIB)
    assert small.get(b"large") == value
    assert stat(small, "unpromoted_records") == 1
    small.close()


def test_threads_that_load_the_same_keys_all_get_right_values(host: Host) -> None:
    content = values(60, [100, 100_000])
    for key, value in content.items():
        host.put(key, value)
    host.flush()
    host.store.demote_all()
    wrong: list[bytes] = []

    def work() -> None:
        for key, value in content.items():
            found = host.get(key)
            if found is not None and found != value:
                wrong.append(key)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {key: host.get(key) for key in content} == content


# ---- What is not


def test_what_was_deleted_or_overwritten_does_not_come_back_after_a_kill(host: Host, tmp_path: Path) -> None:
    for i in range(20):
        host.put(b"%d" % i, b"first")
    host.flush()
    for i in range(0, 20, 2):
        host.delete(b"%d" % i)
    host.put(b"1", b"second")
    host.put(b"3", b"second")
    host.flush()
    host.put(b"5", b"third, not on disk yet")
    again = Host(killed(host, tmp_path))
    found = {i: again.get(b"%d" % i) for i in range(20)}
    assert found == {i: None if i % 2 == 0 or i == 5 else b"second" if i in (1, 3) else b"first" for i in range(20)}
    again.close()


def test_what_was_cleared_does_not_come_back_after_a_kill(host: Host, tmp_path: Path) -> None:
    for name in ("m", "i"):
        host.put(b"old", b"old", name)
        host.flush()
        host.clear(name)
        host.put(b"new", b"new", name)
        host.flush()
    again = Host(killed(host, tmp_path))
    for name in ("m", "i"):
        assert (again.get(b"old", name), again.get(b"new", name)) == (None, b"new")
    again.close()


def test_records_of_an_older_version_do_not_come_back(host: Host, tmp_path: Path) -> None:
    host.put(b"k", b"one")
    host.flush()
    host.space("m", 2)
    again = Host(killed(host, tmp_path))
    assert again.get(b"k", version=2) is None
    with pytest.raises(VersionConflict, match="version 2"):
        again.tier.open_namespace("m", 1, False)
    again.close()


def test_a_record_deleted_while_it_is_being_written_is_not_made_durable(host: Host, tmp_path: Path) -> None:
    for key in (b"dead", b"alive"):
        host.put(key, b"value")
    records = host.store.take_dirty(10, MIB, 0.0, 0.0)
    host.delete(b"dead")
    host.tier.write(records)
    again = Host(killed(host, tmp_path))
    assert (again.get(b"dead"), again.get(b"alive")) == (None, b"value")
    again.close()


def test_expired_records_are_not_told_of(host: Host, tmp_path: Path) -> None:
    host.put(b"past", b"x", ttl_ms=30)
    host.put(b"future", b"x", ttl_ms=100_000)
    host.flush()
    copy = killed(host, tmp_path)
    while host.space().contains(b"past"):
        pass
    again = Host(copy)
    assert (again.get(b"past"), again.get(b"future")) == (None, b"x")
    assert stat(again, "restored_records") == 1
    again.close()


@contextlib.contextmanager
def locked_catalog(host: Host) -> Iterator[None]:
    """Have somebody else hold the database itself, whom the ledger doesn't stop."""
    holder = sqlite3.connect(next(host.directory.glob("catalog-*.db")), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    host.tier._catalog._connection.execute("PRAGMA busy_timeout=10")  # type: ignore[union-attr]
    yield
    holder.close()


def test_a_deletion_that_can_not_be_made_durable_raises(host: Host) -> None:
    host.put(b"k", b"v")
    host.flush()
    with locked_catalog(host), pytest.raises(TierUnavailable, match="locked"):
        host.delete(b"k")


@pytest.mark.parametrize("then", ["the epoch again", "a record of it"])
def test_an_epoch_that_could_not_be_made_durable_is_made_so_by_what_comes_next(
    host: Host, tmp_path: Path, then: str
) -> None:
    host.put(b"old", b"1")
    host.flush()
    with locked_catalog(host), pytest.raises(TierUnavailable, match="locked"):
        host.clear()
    if then == "the epoch again":
        host.tier.set_epoch(host.space().id, 2)
    else:
        host.put(b"new", b"2")
        host.flush()
    again = Host(killed(host, tmp_path))
    assert (again.get(b"old"), again.get(b"new")) == (None, None if then == "the epoch again" else b"2")
    again.close()


def test_nobody_takes_an_epoch_for_durable_that_another_thread_fails_to_commit(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    ns = host.space().id
    waits_or_returned = threading.Event()
    register, hold = host.tier._catalog.register_namespace, host.tier._ledger.hold

    def raise_too() -> None:
        host.tier.set_epoch(ns, 2)
        waits_or_returned.set()

    other = threading.Thread(target=raise_too)

    def hold_seen() -> contextlib.AbstractContextManager[None]:
        if threading.current_thread() is other:
            waits_or_returned.set()
        return hold()

    def fail_while_another_asks(_: NamespaceInfo) -> NamespaceInfo:
        monkeypatch.setattr(host.tier._catalog, "register_namespace", register)
        other.start()
        waits_or_returned.wait()
        raise TierUnavailable("the catalog can't be written")

    monkeypatch.setattr(host.tier._ledger, "hold", hold_seen)
    monkeypatch.setattr(host.tier._catalog, "register_namespace", fail_while_another_asks)
    with pytest.raises(TierUnavailable, match="written"):
        host.tier.set_epoch(ns, 2)
    other.join()
    assert [state.epoch for state in host.tier.namespaces()] == [2]


# ---- Capacity


def test_the_capacity_is_never_exceeded_and_the_oldest_go_first(tmp_path: Path) -> None:
    host = Host(tmp_path, disk=8 * MIB)
    content = values(1500, [0, 500, 3000, 40_000, 100_000], seed=4)
    for i, (key, value) in enumerate(content.items()):
        host.put(key, value)
        if i % 25 == 0:
            host.flush()
            assert used(tmp_path) <= 8 * MIB
    host.flush()
    assert used(tmp_path) <= 8 * MIB
    assert stat(host, "dropped_segments") > 0
    host.close()
    again = Host(tmp_path, disk=8 * MIB)
    assert used(tmp_path) <= 8 * MIB
    there = [again.get(key) == value for key, value in content.items()]
    assert sum(there) > 100
    assert all(there[there.index(True) + 50 :])  # a batch is in no order of its own
    again.close()


def test_many_tiny_records_stay_within_the_capacity_too(tmp_path: Path) -> None:
    host = Host(tmp_path, disk=4 * MIB)
    for i in range(20_000):
        host.put(b"a rather long key %d" % i, b"")
        if i % 500 == 0:
            host.flush()
            assert used(tmp_path) <= 4 * MIB
    host.close()
    assert used(tmp_path) <= 4 * MIB


def test_a_record_larger_than_the_tier_stays_in_memory_and_the_others_are_written(tmp_path: Path) -> None:
    host = Host(tmp_path, disk=4 * MIB)
    host.put(b"small", b"s")
    host.put(b"large", bytes(6 * MIB))
    host.put(b"another", b"a")
    host.flush()
    assert host.get(b"large") == bytes(6 * MIB)
    assert stat(host, "failed_records") == stat(host, "error full") == 1
    assert stat(host, "written_records") == 2
    host.close()


def test_a_tier_full_of_segments_that_others_write_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, disk=4 * MIB)
    monkeypatch.setattr(host.tier._segments, "is_being_written", lambda _: True)
    for i in range(100):
        host.put(b"%d" % i, bytes(70_000))
        host.flush()
    assert used(tmp_path) <= 4 * MIB
    assert stat(host, "dropped_segments") == 0
    assert stat(host, "error full") == stat(host, "failed_records") > 0
    assert stat(host, "failed_records") + stat(host, "written_records") == 100
    host.close()


def test_room_is_made_ahead_so_that_the_next_segment_finds_it(tmp_path: Path) -> None:
    host = Host(tmp_path, disk=8 * MIB)
    for i in range(200):
        host.put(b"%d" % i, bytes(70_000))
        host.flush()
    host.tier._capacity.close()  # waits for what is being dropped
    assert used(tmp_path) <= 8 * MIB - segment_bytes_for(8 * MIB)
    host.close()


def test_a_smaller_capacity_after_a_restart_is_kept_at_once(host: Host, tmp_path: Path) -> None:
    for i in range(100):
        host.put(b"%d" % i, bytes(200_000))
    host.close()
    again = Host(tmp_path, disk=8 * MIB)
    assert used(tmp_path) <= 8 * MIB
    assert again.get(b"99") == bytes(200_000)
    again.close()


def test_processes_that_fill_one_directory_stay_within_its_capacity(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_disk import MIB, Host, used
host = Host(Path(sys.argv[1]), disk=8 * MIB)
for i in range(150):
    host.put(b"%s %d" % (sys.argv[3].encode(), i), bytes(70_000))
    host.flush()
    assert used(host.directory) <= 8 * MIB
host.close()
"""
    arguments = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    children = [subprocess.Popen([*arguments, name]) for name in "abc"]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert used(tmp_path) <= 8 * MIB


# ---- Faults of the device


def test_a_failed_read_is_a_miss_that_is_counted_and_not_forgotten(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put(b"k", b"value")
    host.flush()
    host.store.demote_all()
    with monkeypatch.context() as broken:
        broken.setattr(_core, "read_pieces", lambda fd, pieces: [errno.EIO] * len(pieces))
        assert host.get(b"k") is None
    assert stat(host, "error EIO") == 1
    assert host.get(b"k") == b"value"


def test_a_directory_that_can_not_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = _core.Store.open_private(MIB, 4 * MIB, SEED)
    with pytest.raises(TierUnavailable, match="file"):
        DiskTier(tmp_path / "file" / "cache", 4 * MIB, store)


# ---- Damage while it is open


def test_a_damaged_record_is_a_miss_that_is_counted_and_forgotten(host: Host, tmp_path: Path) -> None:
    for key in (b"damaged", b"intact"):
        host.put(key, key * 50)
    host.flush()
    host.store.demote_all()
    (path,) = tmp_path.glob("seg-*")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"damageddamaged", b"damaged_amaged", 1))
    assert host.get(b"damaged") is None
    assert host.get(b"intact") == b"intact" * 50
    assert stat(host, "corrupt_records") == 1
    assert not host.space().contains(b"damaged")
    host.close()
    again = Host(tmp_path)
    assert stat(again, "restored_records") == 1
    again.close()


def test_a_damaged_record_is_noticed_in_private_memory_too(host: Host, tmp_path: Path) -> None:
    host.put(b"large", bytes(5 * MIB))
    host.close()
    (path,) = tmp_path.glob("seg-*")
    with path.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"\1")
    small = Host(tmp_path, memory=2 * MIB)
    assert small.get(b"large") is None
    assert stat(small, "corrupt_records") == 1
    assert not small.space().contains(b"large")
    small.close()


def test_every_flipped_byte_of_a_record_is_a_miss_or_the_right_value(host: Host, tmp_path: Path) -> None:
    host.put(b"some key", b"some value" * 12)
    host.close()
    (path,) = tmp_path.glob("seg-*")
    data = bytearray(path.read_bytes())
    start = data.index(b"some key" + b"\0") - 64
    for position in range(start, start + 64 + 16 + 120 + 8):
        copy = tmp_path.with_name("flipped")
        shutil.copytree(tmp_path, copy)
        data[position] ^= 0x11
        (copy / path.name).write_bytes(data)
        data[position] ^= 0x11
        flipped = Host(copy)
        is_padding = 64 + 8 <= position - start < 80 or position - start >= 200
        assert flipped.get(b"some key") == (b"some value" * 12 if is_padding else None)
        flipped.close()
        shutil.rmtree(copy)


def test_a_segment_that_vanished_costs_its_records(host: Host, tmp_path: Path) -> None:
    host.put(b"k", b"value")
    host.flush()
    host.store.demote_all()
    (path,) = tmp_path.glob("seg-*")
    path.unlink()
    assert host.get(b"k") is None
    assert stat(host, "vanished_records") == 1
    assert not host.space().contains(b"k")
    host.put(b"k", b"again")
    host.flush()
    host.store.demote_all()
    assert host.get(b"k") == b"again"


def test_a_catalog_damaged_while_it_is_open_is_rebuilt_and_the_cache_goes_on(
    host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("m", "i"):
        for i in range(200):
            host.put(b"%d" % i, b"value", name)
    host.flush()
    host.clear("i")
    host.put(b"new", b"value", "i")
    host.flush()
    host.put(b"8", b"newer")
    host.flush()
    host.delete(b"9")
    (catalog,) = tmp_path.glob("catalog-*.db")
    with caplog.at_level(logging.CRITICAL):
        catalog.unlink()
        host.put(b"more", b"value")
        host.flush()
    host.store.demote_all()
    assert host.get(b"more") == host.get(b"7") == host.get(b"new", "i") == b"value"
    again = Host(killed(host, tmp_path))
    assert again.get(b"more") == again.get(b"new", "i") == b"value"
    # The index knew which of the mutable ones count.
    assert (again.get(b"7"), again.get(b"8"), again.get(b"9")) == (b"value", b"newer", None)
    assert again.get(b"7", "i") is None  # cleared: this process still knew
    again.close()


def test_records_keep_their_tags_when_the_catalog_is_lost_while_it_is_open(tmp_path: Path) -> None:
    def opened() -> kvstrata.Cache:
        return kvstrata.open(tmp_path, memory="4MiB", disk="32MiB", shared=False)

    with opened() as cache:
        for key, tags in {"a": ["kept"], "b": ["removed"], "c": None}.items():
            cache.put(key, b"value", tags=tags)
        cache.flush()
        cache.delete_tag("removed")
        (catalog,) = tmp_path.glob("**/catalog-*.db")
        catalog.unlink()
        cache.put("more", b"value")
        cache.flush()
        assert cache.stats()["disk"]["catalog_rebuilds"] == 1
    with opened() as cache:
        assert [cache.get(key) for key in "abc"] == [b"value", None, b"value"]
        cache.delete_tag("kept")
        assert cache.get("a") is None
    with opened() as cache:
        assert [cache.get(key) for key in "abc"] == [None, None, b"value"]


# ---- Damage while it is closed


def test_a_lost_catalog_costs_mutable_records_only(host: Host, tmp_path: Path) -> None:
    content = values(120, [10, 5000, 100_000])
    for name in ("m", "i"):
        for key, value in content.items():
            host.put(key, value, name)
    host.close()
    for path in [*tmp_path.glob("catalog-*"), tmp_path / "ledger"]:
        path.unlink()
    again = Host(tmp_path)
    assert {key: again.get(key, "i") for key in content} == content
    assert not any(again.get(key) for key in content)
    assert stat(again, "catalog_rebuilds") == 1
    again.put(b"new", b"value")
    again.close()
    once_more = Host(tmp_path)
    assert stat(once_more, "catalog_rebuilds") == 0
    assert once_more.get(b"new") == b"value"
    assert {key: once_more.get(key, "i") for key in content} == content
    once_more.close()


def test_of_a_cleared_namespace_only_the_newest_epoch_is_recovered(host: Host, tmp_path: Path) -> None:
    host.put(b"old", b"old", "i")
    host.flush()
    host.clear("i")
    host.put(b"new", b"new", "i")
    host.close()
    for path in tmp_path.glob("catalog-*"):
        path.unlink()
    again = Host(tmp_path)
    assert (again.get(b"old", "i"), again.get(b"new", "i")) == (None, b"new")
    again.close()


def test_what_a_killed_writer_left_is_cleaned_up_at_the_next_opening(host: Host, tmp_path: Path) -> None:
    host.put(b"k", b"v" * 100_000)
    host.flush()
    copy = killed(host, tmp_path)
    shutil.copy(copy / "seg-00000001.kvs", copy / "seg-00000009.kvs")  # data, and no row for it
    (copy / "probe-1.tmp").write_bytes(b"x")
    again = Host(copy)
    assert [path.name for path in copy.glob("seg-*")] == ["seg-00000001.kvs"]
    assert (copy / "seg-00000001.kvs").stat().st_size < 200_000
    assert not (copy / "probe-1.tmp").exists()
    assert again.get(b"k") == b"v" * 100_000
    again.close()


def test_rows_without_their_data_are_not_told_of(host: Host, tmp_path: Path) -> None:
    for i in range(40):
        host.put(b"%d" % i, bytes(200_000))
    host.close()
    first, second, *_ = sorted(tmp_path.glob("seg-*"))
    first.unlink()
    os.truncate(second, 900_000)
    again = Host(tmp_path)
    there = [i for i in range(40) if again.space().contains(b"%d" % i)]
    assert 0 < len(there) < 36
    assert all(again.get(b"%d" % i) == bytes(200_000) for i in there)
    again.close()


def test_a_row_that_points_to_another_record_is_a_miss(host: Host, tmp_path: Path) -> None:
    for key in (b"a", b"b"):
        host.put(key, key * 100)
    host.close()
    tamper = sqlite3.connect(next(tmp_path.glob("catalog-*.db")))
    places = tamper.execute("SELECT key, offset FROM records ORDER BY key").fetchall()
    for (key, _), (_, offset) in zip(places, reversed(places), strict=True):
        tamper.execute("UPDATE records SET offset=? WHERE key=?", (offset, key))
    tamper.commit()
    tamper.close()
    again = Host(tmp_path)
    assert again.get(b"a") is None
    assert again.get(b"b") is None
    assert stat(again, "corrupt_records") == 2
    again.close()


@pytest.mark.parametrize("memory", [16 * MIB, 2 * MIB])
def test_a_row_that_claims_a_newer_epoch_than_its_record_is_a_miss(host: Host, tmp_path: Path, memory: int) -> None:
    host.put(b"cleared", bytes(3 * MIB))
    host.flush()
    host.clear()
    host.close()
    tamper = sqlite3.connect(next(tmp_path.glob("catalog-*.db")))
    tamper.execute("UPDATE records SET epoch=epoch+1")
    tamper.commit()
    tamper.close()
    again = Host(tmp_path, memory=memory)
    assert again.get(b"cleared") is None
    again.close()


def flip(path: Path, generator: random.Random) -> None:
    with path.open("r+b") as file:
        spot = generator.randrange(path.stat().st_size)
        file.seek(spot)
        byte = file.read(1)[0]
        file.seek(spot)
        file.write(bytes([byte ^ generator.randrange(1, 256)]))


def cut(path: Path, generator: random.Random) -> None:
    os.truncate(path, generator.randrange(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("kill", [False, True])
def test_damage_to_any_file_costs_hits_and_never_gives_a_wrong_value(
    host: Host, tmp_path: Path, damage: Callable[[Path, random.Random], None], kill: bool
) -> None:
    content = values(60, [10, 300, 5000, 70_000], seed=8)
    for name in ("m", "i"):
        for key, value in content.items():
            host.put(key, value, name)
        host.flush()
    gone = list(content)[::3]
    for key in gone:
        host.delete(key)
    host.put(b"cleared", b"cleared", "other")
    host.flush()
    host.clear("other")
    if kill:
        original = killed(host, tmp_path)
    else:
        host.close()
        original = tmp_path
    generator = random.Random(5)
    for path in sorted(path for path in original.iterdir() if path.stat().st_size):
        for _ in range(12):
            copy = tmp_path.with_name("damaged")
            shutil.copytree(original, copy)
            damage(copy / path.name, generator)
            damaged = Host(copy)
            for key, value in content.items():
                assert damaged.get(key, "i") in (value, None)
                assert damaged.get(key) in ((None,) if key in gone else (value, None))
            assert damaged.get(b"cleared", "other") is None
            damaged.put(b"new", b"new")
            damaged.close()
            again = Host(copy)
            assert again.get(b"new") == b"new"
            again.close()
            shutil.rmtree(copy)


def test_a_directory_of_another_cache_is_started_over(host: Host, tmp_path: Path) -> None:
    host.put(b"k", b"v", "i")
    host.close()
    other = Host(tmp_path, seed=SEED + 1)
    assert other.get(b"k", "i") is None
    other.put(b"k", b"theirs", "i")
    other.close()
    again = Host(tmp_path, seed=SEED + 1)
    assert again.get(b"k", "i") == b"theirs"
    again.close()


def test_a_segment_of_a_newer_format_is_refused(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put(b"k", b"v")
    host.close()
    with monkeypatch.context() as newer:
        newer.setattr(segment_format, "FORMAT", 2)
        header = pack_header(1, SEED)
    with (tmp_path / "seg-00000001.kvs").open("r+b") as file:
        file.write(header)
    with pytest.raises(FormatError, match=r"format 2.*up to 1"):
        Host(tmp_path)


# ---- Namespaces and numbers


def test_namespaces_are_known_after_a_restart(host: Host, tmp_path: Path) -> None:
    host.space("m")
    host.space("i", 3)
    host.close()
    again = Host(tmp_path)
    assert {(s.name, s.version, s.immutable) for s in again.tier.namespaces()} == {
        ("m", 1, False),
        ("i", 3, True),
    }
    again.close()


def test_the_catalog_follows_a_store_that_is_ahead_of_it(host: Host, tmp_path: Path) -> None:
    # Another process has cleared the namespace in the store, and was killed before it told the catalog.
    host.space().clear()
    host.put(b"k", b"v")
    host.close()
    again = Host(tmp_path)
    assert again.get(b"k") == b"v"
    again.close()


def test_sequence_numbers_go_on_above_those_that_were_used(host: Host, tmp_path: Path) -> None:
    for i in range(50):
        host.put(b"k", b"%d" % i)
        host.flush()
    host.close()
    again = Host(tmp_path)
    assert again.store.next_seq() > 49
    again.put(b"k", b"newest")
    again.close()
    once_more = Host(tmp_path)
    assert once_more.get(b"k") == b"newest"
    once_more.close()


def test_stats_are_plain_numbers(host: Host) -> None:
    host.put(b"k", bytes(1000))
    host.flush()
    stats: Stats = host.tier.stats()
    assert stats["capacity"] == 64 * MIB
    assert stats["segments"] == stats["written_records"] == 1
    assert stats["write_breaker"] == stats["read_breaker"] == "closed"
    assert all(isinstance(value, int) for name, value in stats.items() if not name.endswith(("breaker", "last_error")))
