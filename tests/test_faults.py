"""When the device fails: memory goes on, nothing wrong is served, and the disk tier comes back by itself.

Calls fail below Python and SQLite alike: a library that is loaded before libc sees to it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import OpenCache
from support.power import build_library
from support.processes import Process
from test_disk import MIB, Host, stat

import kvstrata
from kvstrata import KVLayout, PrefixCache, _core
from kvstrata.errors import TierUnavailable
from kvstrata.tiers import segments

OPENS, WRITES, READS, SYNCS, ALLOCATES, NAMES = 1, 2, 4, 8, 16, 32
CHANGES = WRITES | SYNCS | ALLOCATES | NAMES
OPTIONS = {"memory": "4MiB", "disk": "32MiB"}

BEFORE = """
import ctypes, time
from kvstrata.errors import TierUnavailable
library = ctypes.CDLL(library)
cache = kvstrata.open(root, **options)
disk = lambda: cache.stats()["disk"]
old = {b"old %d" % i: b"%d" % i * 20_000 for i in range(40)}
new = {b"new %d" % i: b"%d" % i * 3000 for i in range(60)}
gone = []
cache.put_many(old)
cache.flush()
cache.demote()
cache.below.tier.sync()
cache.below.tier._segments.seal()  # the next record takes a new one
cache.below.tier._catalog.close()  # and reads the catalog anew
def hours_later():  # for pauses of the breakers
    for breaker in (cache.below.tier._writing, cache.below.tier._reading):
        breaker._clock = lambda: time.monotonic() + 10_000
"""
DURING = """
for key, value in new.items():
    cache.put(key, value)
    cache.flush()  # nothing waits for a disk that doesn't take it
assert cache.get_many(list(new)) == list(new.values())
until = time.monotonic() + 60
while cache.stats()["memory"]["dirty_bytes"]:  # but for what is tried once more, now and then
    assert time.monotonic() < until
for key, value in old.items():
    assert cache.get(key) in (None, value)
for key in list(old)[:5]:
    try:
        cache.delete(key)
        gone.append(key)
    except TierUnavailable:
        pass
    assert cache.get(key) is None
try:
    cache.below.tier.sync()
except TierUnavailable:
    pass
failed = library.failed_io()
told = str(disk())
"""
AFTER = """
hours_later()
cache.put(b"back", b"again")
cache.flush()
cache.demote()
assert cache.get(b"back") == b"again"
for key in list(old)[10:]:
    assert cache.get(key) in (None, old[key])
cache.put_many(new)
cache.flush()
stats = disk()
assert (stats["write_breaker"], stats["read_breaker"]) == ("closed", "closed"), stats
"""
FAULTS = {
    "no space for segments": (ALLOCATES, "seg-", errno.ENOSPC),
    "no space anywhere": (WRITES | ALLOCATES, "/cache", errno.ENOSPC),
    "segments can't be written": (WRITES, "seg-", errno.EIO),
    "segments can't be read": (READS, "seg-", errno.EIO),
    "segments can't be opened": (OPENS, "seg-", errno.EACCES),
    "the catalog can't be written": (WRITES, "catalog-", errno.EIO),
    "the catalog can't be read": (READS, "catalog-", errno.EIO),
    "the catalog can't be synced": (SYNCS, "catalog-", errno.EIO),
    "the ledger can't be written": (WRITES, "ledger", errno.EIO),
    "the ledger can't be read": (READS, "ledger", errno.EIO),
    "the ledger can't be synced": (SYNCS, "ledger", errno.EIO),
    "nothing can be changed": (CHANGES, "/cache", errno.EROFS),
    "nothing can be opened": (OPENS, "/cache", errno.EACCES),
    "nothing works": (OPENS | READS | CHANGES, "/cache", errno.EIO),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library("fail_io", tmp_path_factory.mktemp("library"))


@pytest.mark.parametrize("fault", FAULTS)
def test_memory_goes_on_through_a_fault_and_the_disk_comes_back_after_it(
    library: Path, shm: Path, tmp_path: Path, fault: str
) -> None:
    kinds, text, code = FAULTS[fault]
    with Process(LD_PRELOAD=str(library)) as process:
        process.run(BEFORE, root=tmp_path / "cache", options=OPTIONS, library=str(library))
        process.run("library.fail_io(kinds, text, code)", kinds=kinds, text=text.encode(), code=code)
        process.run(DURING)
        assert process.eval("failed") > 0
        # SQLite keeps to itself why a file can't be opened. What can't be synced is told to who waits for it.
        told = process.eval("told")
        assert kinds == SYNCS or errno.errorcode[code] in told or "SQLITE_CANTOPEN" in told
        process.run("library.fail_io(0, b'', 0)")
        process.run(AFTER)
        gone = process.eval("gone")
        process.kill()
    for file in shm.iterdir():
        file.unlink()
    with kvstrata.open(tmp_path / "cache", **OPTIONS) as cache:  # type: ignore[arg-type]
        assert cache.get_many(gone) == [None] * len(gone)
        assert cache.get(b"back") == b"again"
        assert {cache.get(b"new %d" % i) == b"%d" % i * 3000 for i in range(60)} == {True}


# ---- The breakers


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path / "disk")
    made.space()
    yield made
    made.close()


def failing(code: int) -> Callable[..., int]:
    def fails(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fails


def hours_later(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for breaker in (host.tier._writing, host.tier._reading):
        monkeypatch.setattr(breaker, "_clock", lambda: time.monotonic() + 10_000)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev"])
def test_a_device_that_can_not_be_written_is_left_alone_until_a_probe_succeeds(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    with monkeypatch.context() as broken:
        broken.setattr(segments.os, call, failing(code))
        for i in range(10):
            host.put(b"%d" % i, b"value")
            host.flush()
        stats = host.tier.stats()
        assert stats["write_breaker"] == "open"
        assert errno.errorcode[code] in str(stats["write_last_error"])
        assert (stats[f"error {errno.errorcode[code]}"], stats["failed_records"], stats["refused_records"]) == (
            3,
            10,
            7,
        )
        assert host.store.stats()["dirty_bytes"] == 0
        assert [host.get(b"%d" % i) for i in range(10)] == [b"value"] * 10
    host.put(b"too early", b"1")
    host.flush()
    assert stat(host, "written_records") == 0
    hours_later(host, monkeypatch)
    host.put(b"probe", b"1")
    host.flush()
    assert stat(host, "written_records") == 1
    assert host.tier.stats()["write_breaker"] == "closed"
    changes = [record.message for record in caplog.records if record.name != "kvstrata.disk"]
    assert [message.split(": ")[1] for message in changes] == ["open", "half-open", "closed"]


def test_what_was_put_while_the_device_could_not_be_written_is_written_when_it_can(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(segments.os, "pwritev", failing(errno.EIO))
        for i in range(10):
            host.put(b"%d" % i, b"%d" % i * 1000)
            host.flush()
            host.tier.tend()
        host.flush()
        assert host.tier.stats()["write_breaker"] == "open"
        assert host.store.stats()["dirty_bytes"] == 0
        host.delete(b"3")
        host.put(b"4", b"newer")
    tried = stat(host, "retried_records")
    host.tier.tend()  # too early
    assert stat(host, "retried_records") == tried
    hours_later(host, monkeypatch)
    host.tier.tend()  # the probe
    assert stat(host, "retried_records") == tried + 1
    host.flush()
    host.tier.tend()
    host.flush()
    host.tier.tend()
    assert stat(host, "written_records") == 9
    tried = stat(host, "retried_records")
    host.tier.tend()
    assert stat(host, "retried_records") == tried, "there was something left to be tried"
    host.tier.close()
    host.store.close()
    with Host(host.directory) as again:
        again.space()
        expected = {b"%d" % i: b"%d" % i * 1000 for i in range(10)} | {b"3": None, b"4": b"newer"}
        assert {key: again.get(key) for key in expected} == expected


def test_what_has_left_memory_before_the_device_is_well_again_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Host(tmp_path / "disk", memory=1 * MIB) as host:
        with monkeypatch.context() as broken:
            broken.setattr(segments.os, "pwritev", failing(errno.EIO))
            for i in range(40):
                host.put(b"%d" % i, b"%d" % i * 20_000)  # more than memory holds
                host.flush()
                host.tier.tend()
            host.flush()
        hours_later(host, monkeypatch)
        for _ in range(50):
            host.tier.tend()
            host.flush()
        found = [host.get(b"%d" % i) for i in range(40)]
        assert found[0] is None
        assert all(value in (None, b"%d" % i * 20_000) for i, value in enumerate(found))
        assert 0 < stat(host, "written_records") == sum(value is not None for value in found)


def test_a_device_that_can_not_be_read_is_a_miss_without_a_read_until_a_probe_succeeds(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.put(b"key", b"value")
    host.flush()
    host.store.demote_all()
    reads = []

    def fails(fd: int, pieces: list[object]) -> list[int]:
        reads.append(1)
        return [errno.EIO] * len(pieces)

    with monkeypatch.context() as broken:
        broken.setattr(_core, "read_pieces", fails)
        assert [host.get(b"key") for _ in range(10)] == [None] * 10
    assert len(reads) == 3
    assert host.get(b"key") is None
    assert host.tier.stats()["read_breaker"] == "open"
    assert "EIO" in str(host.tier.stats()["read_last_error"])
    assert stat(host, "refused_loads") == 8
    host.put(b"another", b"1")
    host.flush()
    assert stat(host, "written_records") == 2  # what can't be read can be written all the same
    hours_later(host, monkeypatch)
    assert host.get(b"key") == b"value"
    assert host.tier.stats()["read_breaker"] == "closed"


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_a_load_by_layers_that_reads_nothing_piece_by_piece_finds_out_that_the_device_works_again(
    open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch, codec: str | None
) -> None:
    layout = KVLayout(model="m", dtype="float16", layers=4, kv_heads=2, head_dim=64, block_tokens=16)
    tokens = list(range(8 * layout.block_tokens))
    cache = open_cache(memory="16MiB", disk="64MiB")
    prefixes = PrefixCache.open(cache, layout, codec=codec)
    assert prefixes.store(tokens, np.zeros((4, 2, 2, len(tokens), 64), np.float16)) == 8
    cache.flush()
    cache.demote()
    disk = cache.tiers._disk
    assert disk is not None
    for _ in range(3):
        disk._reading.failure("EIO", "input/output error")
    assert cache.stats()["disk"]["read_breaker"] == "open"
    later = time.monotonic() + 3600
    monkeypatch.setattr(disk._reading, "_clock", lambda: later)
    with prefixes.match(tokens).load_layers() as load:
        assert [layer for layer, _ in load] == list(range(4))
        assert load.tokens == len(tokens)
    assert cache.stats()["disk"]["read_breaker"] == "closed"


def test_a_directory_that_vanished_and_came_back_empty_is_used_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        host.put(b"old %d" % i, bytes(100_000))
    host.flush()
    host.store.demote_all()
    shutil.rmtree(host.directory)
    for i in range(10):
        host.put(b"%d" % i, b"value")
        host.flush()
        assert host.get(b"old %d" % (i % 5)) is None
    assert [host.get(b"%d" % i) for i in range(10)] == [b"value"] * 10
    stats = host.tier.stats()
    assert (stats["write_breaker"], stats["read_breaker"], stats["error ENOENT"]) == ("open", "open", 6)
    with pytest.raises(TierUnavailable):
        host.delete(b"old 1")
    host.directory.mkdir()
    hours_later(host, monkeypatch)
    host.put(b"later", b"value")
    host.flush()
    host.store.demote_all()
    assert host.get(b"later") == b"value"
    assert host.tier.stats()["write_breaker"] == "closed"


def test_what_can_not_be_forgotten_on_disk_is_not_forgotten_in_the_index_either(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Else the next put would not delete the row, and after a kill the old value would be back.
    host.put(b"key", b"old")
    host.flush()
    host.store.demote_all()
    with monkeypatch.context() as broken:
        broken.setattr(_core, "read_pieces", lambda fd, pieces: [errno.ENOENT] * len(pieces))
        broken.setattr(host.tier._catalog, "delete", failing_catalog)
        assert host.get(b"key") is None
    host.put(b"key", b"new")
    shutil.copytree(host.directory, tmp_path / "killed")
    again = Host(tmp_path / "killed")
    assert again.get(b"key") is None
    again.close()


def failing_catalog(*_: object) -> None:
    raise TierUnavailable("the catalog can't be written")


def test_a_full_file_system_costs_records_on_disk_only_and_is_used_again_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system takes the right to mount: {mounted.stderr.decode().strip()}")
    try:
        host = Host(place / "cache", disk=16 * MIB)
        for i in range(100):
            host.put(b"%d" % i, b"%d" % i * 30_000)
            host.flush()
        stats = host.tier.stats()
        assert stats["write_breaker"] == "open"
        assert "ENOSPC" in str(stats["write_last_error"])
        assert all(host.get(b"%d" % i) in (None, b"%d" % i * 30_000) for i in range(100))
        subprocess.run(["mount", "-o", "remount,size=32m", place], check=True)
        hours_later(host, monkeypatch)
        host.put(b"later", b"value")
        host.flush()
        host.store.demote_all()
        assert host.get(b"later") == b"value"
        host.close()
    finally:
        subprocess.run(["umount", "-l", place], check=True)
