"""The LMDB engine as a store of records."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from record_store_contract import PATIENCE_S, NativeExpiryContract, RecordStoreContract, pattern

from kvstrata.tiers.base import NamedRecord
from kvstrata.tiers.engines.btree import BtreeStore

pytest.importorskip("lmdb")
CAP = 256 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BtreeStore]:
    opened = BtreeStore(tmp_path / "btree", CAP)
    yield opened
    opened.close()


class TestBtree(RecordStoreContract, NativeExpiryContract):
    pass


def _du(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())


def test_the_oldest_leave_and_the_directory_stays_within_its_bytes(tmp_path: Path) -> None:
    cap = 16 << 20
    store = BtreeStore(tmp_path / "btree", cap)
    try:
        for batch in range(40):
            store.write([NamedRecord(b"%d/%d" % (batch, i), (pattern(2048, i),), 0) for i in range(512)], PATIENCE_S)
            assert _du(tmp_path / "btree") <= cap
        assert store.stats()["evicted_records"] > 0  # type: ignore[operator]
        assert store.contains([b"0/0", b"39/511"], PATIENCE_S) == [False, True]
        assert store.read([b"39/7"], PATIENCE_S) == [pattern(2048, 7)]
    finally:
        store.close()


def test_what_was_written_is_there_after_reopening(tmp_path: Path) -> None:
    for turn in range(3):
        store = BtreeStore(tmp_path / "btree", 16 << 20)
        assert store.contains([b"%d" % i for i in range(3)], PATIENCE_S) == [i < turn for i in range(3)]
        store.write([NamedRecord(b"%d" % turn, (b"x",), 0)], PATIENCE_S)
        store.close()


@pytest.mark.parametrize("damage", ["truncated", "empty", "meta", "holes", "missing"])
def test_a_damaged_file_is_set_aside_and_begun_anew(tmp_path: Path, damage: str) -> None:
    store = BtreeStore(tmp_path / "btree", 16 << 20)
    store.write([NamedRecord(b"a", (b"x",), 0)], PATIENCE_S)
    store.close()
    file = tmp_path / "btree" / "data.mdb"
    size = file.stat().st_size
    if damage == "truncated":
        os.truncate(file, size // 2)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "holes":
        os.truncate(file, size // 2)
        os.truncate(file, size)
    elif damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[17] ^= 1
        file.write_bytes(data)
    store = BtreeStore(tmp_path / "btree", 16 << 20)
    try:
        assert store.stats()["damaged_directories"] == 1
        assert store.read([b"a"], PATIENCE_S) == [None]
        store.write([NamedRecord(b"a", (b"y",), 0)], PATIENCE_S)
        assert store.read([b"a"], PATIENCE_S) == [b"y"]
    finally:
        store.close()
    assert (tmp_path / "btree.damaged").is_dir()


def test_one_of_another_size_is_begun_anew_and_nothing_of_the_old_one_stays_beside_it(tmp_path: Path) -> None:
    store = BtreeStore(tmp_path / "btree", 16 << 20)
    store.write([NamedRecord(b"a", (b"x",), 0)], PATIENCE_S)
    store.close()
    store = BtreeStore(tmp_path / "btree", 20 << 20)
    assert store.read([b"a"], PATIENCE_S) == [None]
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["btree"]


def test_a_machine_that_went_down_costs_what_was_there(tmp_path: Path) -> None:
    store = BtreeStore(tmp_path / "btree", 16 << 20)
    store.write([NamedRecord(b"a", (b"x",), 0)], PATIENCE_S)
    store.close()
    (tmp_path / "btree" / "unsynced").write_text("another boot")
    store = BtreeStore(tmp_path / "btree", 16 << 20)
    try:
        assert store.read([b"a"], PATIENCE_S) == [None]
    finally:
        store.close()


def _batch(number: int) -> list[NamedRecord]:
    return [NamedRecord(b"%d/%d" % (number, i), (bytes(2048),), 0) for i in range(256)]


def test_a_record_that_was_written_again_leaves_by_its_last_writing(store: BtreeStore) -> None:
    store.write([NamedRecord(b"often", (b"first",), 0), NamedRecord(b"once", (b"x",), 0)], PATIENCE_S)
    for number in range(40 * CAP >> 24):
        store.write([NamedRecord(b"often", (b"%d" % number,), 0), *_batch(number)], PATIENCE_S)
        assert store.read([b"often"], PATIENCE_S) == [b"%d" % number]
    assert store.contains([b"once", b"0/0", b"%d/0" % number], PATIENCE_S) == [False, False, True]


def test_a_clock_that_is_set_back_changes_nothing_in_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    for process in range(4):
        store = BtreeStore(tmp_path / "btree", 16 << 20)
        for number in range(process * 10, process * 10 + 10):
            monkeypatch.setattr("time.time_ns", lambda number=number: now - number * 10**9)
            store.write(_batch(number), PATIENCE_S)
        there = store.contains([b"%d/0" % n for n in range(process * 10 + 10)], PATIENCE_S)
        store.close()
    assert not there[0]
    assert there == sorted(there)
    assert there[-1]
