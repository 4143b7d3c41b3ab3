"""The RocksDB engine as a store of records."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from record_store_contract import PATIENCE_S, NativeExpiryContract, RecordStoreContract, pattern

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.base import NamedRecord
from kvstrata.tiers.engines.lsm import LsmStore
from kvstrata.tiers.engines.manifest import crc32c

pytest.importorskip("rocksdict")
CAP = 512 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LsmStore]:
    opened = LsmStore(tmp_path / "lsm", CAP)
    yield opened
    opened.close()


class TestLsm(RecordStoreContract, NativeExpiryContract):
    pass


def _du(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_the_oldest_leave_and_the_directory_stays_within_its_bytes(tmp_path: Path) -> None:
    cap = 64 << 20
    store = LsmStore(tmp_path / "lsm", cap)
    try:
        for batch in range(150):
            store.write([NamedRecord(b"%d/%d" % (batch, i), (pattern(2048, i),), 0) for i in range(512)], PATIENCE_S)
            assert store.stats()["disk_bytes"] <= cap  # type: ignore[operator]
        assert store.stats()["evicted_slices"] > 0  # type: ignore[operator]
        assert store.stats()["slices"] > 4  # type: ignore[operator]
        assert store.contains([b"0/0", b"149/511"], PATIENCE_S) == [False, True]
        assert store.read([b"149/7"], PATIENCE_S) == [pattern(2048, 7)]
    finally:
        store.close()


def test_who_reads_all_names_keeps_no_slice_on_disk(tmp_path: Path) -> None:
    store = LsmStore(tmp_path / "lsm", 64 << 20)

    def write(batch: int) -> set[bytes]:
        records = [NamedRecord(b"%d/%d" % (batch, i), (pattern(2048, i),), 0) for i in range(512)]
        store.write(records, PATIENCE_S)
        return {record.name for record in records}

    try:
        for batch in range(45):
            write(batch)
        reading = store.scan()
        found = set(next(reading))
        young: set[bytes] = set()
        for batch in range(45, 60):
            young |= write(batch)
            assert store.stats()["slices"] > 4  # type: ignore[operator]
        assert store.contains(sorted(young), PATIENCE_S) == [True] * len(young)
        for names in reading:
            found |= set(names)
        kept = {b"%d/%d" % (batch, i) for batch in range(40, 45) for i in range(512)}
        assert kept <= found
    finally:
        store.close()


def test_what_was_written_and_deleted_is_so_after_reopening(tmp_path: Path) -> None:
    for turn in range(4):
        store = LsmStore(tmp_path / "lsm", 64 << 20)
        assert store.stats()["damaged_directories"] == 0
        assert store.contains([b"%d" % i for i in range(4)], PATIENCE_S) == [i == turn - 1 for i in range(4)]
        store.write([NamedRecord(b"%d" % turn, (b"x",), 0)], PATIENCE_S)
        store.delete([b"%d" % (turn - 1)], PATIENCE_S)
        store.close()


def test_a_second_opener_is_told_that_it_is_for_one_process(tmp_path: Path) -> None:
    store = LsmStore(tmp_path / "lsm", 64 << 20)
    try:
        with pytest.raises(TierUnavailable, match="another process"):
            LsmStore(tmp_path / "lsm", 64 << 20)
        store.write([NamedRecord(b"a", (b"x",), 0)], PATIENCE_S)
    finally:
        store.close()


_CHECK = """
import sys
from pathlib import Path
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.engines.lsm import LsmStore
store = LsmStore(Path(sys.argv[1]), 64 << 20)
for i in range(500):
    try:
        (data,) = store.read([b"%d" % i], 5.0)
    except StoreFault:
        continue
    assert data is None or bytes(data) == b"value %d" % i * 20, i
store.close()
"""


def test_damage_anywhere_costs_hits_but_never_a_hang_or_a_wrong_value(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for _ in range(2):  # the second opening flushes the log of the first, so there are tables and a log
        store = LsmStore(whole / "lsm", 64 << 20)
        store.write([NamedRecord(b"%d" % i, (b"value %d" % i * 20,), 0) for i in range(500)], PATIENCE_S)
        store.close()
    files = [file.name for file in (whole / "lsm").iterdir() if file.stat().st_size]
    assert any(name.startswith("MANIFEST") for name in files)
    trials = []
    for name in files:
        if name.startswith(("LOG", "OPTIONS", "IDENTITY", "LOCK")):
            continue
        size = (whole / "lsm" / name).stat().st_size
        trials += [(name, "cut", size // 2)] + [(name, "flip", size * part // 7) for part in range(0, 7, 2)]
    for number, (name, how, at) in enumerate(trials):
        place = tmp_path / str(number)
        shutil.copytree(whole, place)
        data = bytearray((place / "lsm" / name).read_bytes())
        if how == "cut":
            del data[at:]
        else:
            data[at] ^= 4
        (place / "lsm" / name).write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-c", _CHECK, str(place / "lsm")], timeout=60, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (name, how, at, done.stderr)
