"""The capacity of the disk tier as `du` sees it: never exceeded, by however many processes, and when it shrinks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenCache
from support.processes import Process

import kvstrata
from kvstrata import _core
from kvstrata.record import PAGE
from kvstrata.tiers.ledger import Ledger

MIB = 1 << 20

CHURN = """
import random
rng = random.Random(seed)
for i in range(500):
    key = f"{rng.randrange(400)}" * rng.choice([1, 1, 50])
    if rng.random() < 0.15:
        cache.delete(key)
    elif rng.random() < 0.3:
        cache.put_many({f"{seed} small {i} {n}": b"" for n in range(50)})
    else:
        cache.put(key, bytes(rng.choice([100, 5000, 70_000, 200_000])))
cache.flush()
"""


def du(directory: Path) -> tuple[int, int]:
    """Bytes of a directory and its files: allocated, and apparent."""
    allocated, apparent = (
        int(subprocess.run(["du", "-s", *how, directory], capture_output=True, check=True, text=True).stdout.split()[0])
        for how in (["--block-size=1"], ["--block-size=1", "--apparent-size"])
    )
    return allocated, apparent


def at_rest(directory: Path) -> tuple[int, int]:
    """The same while nobody can make anything grow: else `du` adds up what never was there at once."""
    ledger = Ledger(directory)
    try:
        with ledger.hold():
            return du(directory)
    finally:
        ledger.close()


@pytest.mark.parametrize("policy", ["fifo", "lru", "ttl"])
def test_du_never_sees_more_than_the_capacity_while_processes_churn(shm: Path, tmp_path: Path, policy: str) -> None:
    directory = tmp_path / "cache"
    options: dict[str, Any] = {"memory": "8MiB", "disk": 8 * MIB, "disk_policy": policy}
    writers = [Process() for _ in range(3)]
    measured = 0
    for seed, writer in enumerate(writers):
        writer.run("cache = kvstrata.open(directory, **options)", directory=directory, options=options)
        writer.start(CHURN, seed=seed)
    for writer in writers:
        for _ in range(10):
            assert max(at_rest(directory)) <= 8 * MIB
            measured = max(measured, at_rest(directory)[0])
        writer.finish()
    assert max(at_rest(directory)) <= 8 * MIB
    assert measured > 5 * MIB
    writers[0].kill()
    for writer in writers[1:]:
        with writer:
            pass
    assert max(du(directory)) <= 8 * MIB
    for file in shm.iterdir():
        file.unlink()
    with kvstrata.open(directory, **options | {"disk": 4 * MIB}) as cache:
        assert max(du(directory)) <= 4 * MIB
        assert cache.stats()["disk"]["used_bytes"] == du(directory)[0]
    assert max(du(directory)) <= 4 * MIB


def test_of_each_file_its_blocks_count_or_its_length_in_pages_where_that_is_more(tmp_path: Path) -> None:
    directory = tmp_path / "söme"
    directory.mkdir()
    (directory / "short").write_bytes(b"x")
    with (directory / "with holes").open("wb") as file:
        file.truncate(MIB + 1)
    (directory / "link").symlink_to(tmp_path / "nowhere")
    (directory / "below").mkdir()
    (directory / "below" / "deep").write_bytes(bytes(100_000))  # isn't ours
    itself = directory.stat().st_blocks * 512
    assert _core.directory_bytes(os.fsencode(directory)) == itself + PAGE + MIB + PAGE + PAGE + PAGE
    with pytest.raises(FileNotFoundError, match="absent"):
        _core.directory_bytes(os.fsencode(directory / "absent"))
    with pytest.raises(NotADirectoryError):
        _core.directory_bytes(os.fsencode(directory / "short"))


def test_a_cache_that_is_opened_with_less_disk_fits_before_open_returns(open_cache: OpenCache, tmp_path: Path) -> None:
    with open_cache(disk="256MiB", memory="64MiB") as cache:
        for i in range(30):
            cache.put_many({f"{i} {n} {'long' * 60}": b"" for n in range(1000)})
        cache.put_many({f"large {i}": bytes(300_000) for i in range(100)})
    assert du(tmp_path / "cache")[0] > 32 * MIB
    for disk in (32, 4):
        with open_cache(disk=disk * MIB, memory="64MiB") as cache:
            assert max(du(tmp_path / "cache")) <= disk * MIB
            cache.put("another", b"1")
            cache.flush()
            cache.demote()
            assert cache.get("another") == b"1"
            assert max(at_rest(tmp_path / "cache")) <= disk * MIB


@pytest.mark.parametrize("killed", [False, True])
def test_all_that_was_flushed_is_counted_again_after_a_restart(shm: Path, tmp_path: Path, killed: bool) -> None:
    directory = tmp_path / "cache"
    options = {"memory": "8MiB", "disk": "64MiB"}
    with Process() as process:
        process.run("cache = kvstrata.open(directory, **options)", directory=directory, options=options)
        process.run("cache.put_many({f'{i}': bytes(100 * i) for i in range(500)}); cache.flush()")
        if killed:
            process.kill()
    for file in shm.iterdir():
        file.unlink()
    with kvstrata.open(directory, **options) as cache:  # type: ignore[arg-type]
        stats = cache.stats()["disk"]
        assert stats["restored_records"] == 500
        assert stats["used_bytes"] == du(directory)[0]
        assert cache.get_many([f"{i}" for i in range(500)]) == [bytes(100 * i) for i in range(500)]
