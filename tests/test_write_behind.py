"""The threads that take what was put to the disk: one writes, one commits the rows of what was written before."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.failpoints import build
from support.processes import Process

import kvstrata
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.segments import SegmentSet
from kvstrata.tiers.writing import Writer

OPTIONS = {"memory": "8MiB", "disk": "64MiB"}


def test_rows_are_committed_while_the_next_records_are_being_written(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, commit = SegmentSet.append, Writer._commit
    committing, written = threading.Event(), threading.Event()
    overlapped = []

    def appending(self: SegmentSet, records: Any, **options: Any) -> Any:
        where = append(self, records, **options)
        if any(record.key == b"second" for record in records):
            written.set()
        return where

    def while_others_are_written(self: Writer, records: Any, *where: Any) -> bool:
        if any(record.key == b"first" for record in records):
            committing.set()
            overlapped.append(written.wait(30))
        return commit(self, records, *where)

    monkeypatch.setattr(SegmentSet, "append", appending)
    monkeypatch.setattr(Writer, "_commit", while_others_are_written)
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.put("first", b"1")
        assert committing.wait(30)
        cache.put("second", b"2")
        cache.flush()
        cache.demote()
        assert cache.get_many(["first", "second"]) == [b"1", b"2"]
    assert overlapped == [True]


def test_a_commit_that_began_before_the_device_failed_does_not_say_that_it_works_again(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, commit, release, failure = SegmentSet.append, Writer._commit, SegmentSet.release, Breaker.failure
    committing, failed, opened, settled = (threading.Event() for _ in range(4))

    def failing(self: SegmentSet, records: Any, **options: Any) -> Any:
        if committing.is_set():
            raise OSError(errno.EIO, "broken")
        return append(self, records, **options)

    def slowly(self: Writer, *what: Any) -> bool:
        committing.set()
        assert opened.wait(30)
        return commit(self, *what)

    def releasing(self: SegmentSet, number: int) -> None:
        release(self, number)
        settled.set()

    def telling(self: Breaker, *what: Any) -> None:
        failure(self, *what)
        failed.set()

    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert isinstance(cache.below.tier, DiskTier)
        breaker = cache.below.tier._writing
        with monkeypatch.context() as patched:
            patched.setattr(SegmentSet, "append", failing)
            patched.setattr(SegmentSet, "release", releasing)
            patched.setattr(Writer, "_commit", slowly)
            patched.setattr(Breaker, "failure", telling)
            cache.put("first", b"1")
            assert committing.wait(30)
            for number in range(3):
                failed.clear()
                cache.put(f"more {number}", b"2")
                assert failed.wait(30)
            assert breaker.state != "closed"
            opened.set()
            assert settled.wait(30)
            assert breaker.state != "closed"
        assert cache.get("first") == b"1"


def test_a_defect_in_committing_leaves_its_records_to_memory_and_the_next_ones_are_written(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> bool:
        raise RuntimeError("a defect")

    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
            patched.setattr(Writer, "_commit", broken)
            cache.put("lost", b"1")
            cache.flush()
        assert "1 records could not be written to the disk tier" in caplog.text
        assert cache.get("lost") == b"1"
        cache.put("kept", b"2")
        cache.flush()
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert cache.get_many(["lost", "kept"]) == [None, b"2"]


def test_what_is_being_committed_when_the_cache_is_closed_is_there_afterwards(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Writer._commit
    committing, closing = threading.Event(), threading.Event()

    def until_it_is_closed(self: Writer, *what: Any) -> bool:
        committing.set()
        assert closing.wait(30)
        return commit(self, *what)

    monkeypatch.setattr(Writer, "_commit", until_it_is_closed)
    cache = kvstrata.open(tmp_path, **OPTIONS)
    cache.put("a", b"1")
    assert committing.wait(30)
    closer = threading.Thread(target=cache.close)
    closer.start()
    closing.set()
    closer.join()
    monkeypatch.undo()
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert cache.get("a") == b"1"


@pytest.mark.parametrize("heals", [True, False], ids=["which works again", "which still fails"])
def test_what_the_disk_had_not_taken_is_tried_once_more_when_the_cache_is_closed(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heals: bool
) -> None:
    append = SegmentSet.append
    failing = threading.Event()
    failing.set()
    tried = []

    def sometimes(self: SegmentSet, records: Any, **options: Any) -> Any:
        tried.append(len(records))
        if failing.is_set():
            raise OSError(errno.EIO, "a fault")
        return append(self, records, **options)

    monkeypatch.setattr(SegmentSet, "append", sometimes)
    keys = [f"{i}" for i in range(40)]
    cache = kvstrata.open(tmp_path, **OPTIONS)
    for key in keys:
        cache.put(key, key.encode())
        cache.flush()
    disk = cache.stats()["disk"]
    assert (disk["write_breaker"], disk["written_records"]) == ("open", 0)
    if heals:
        failing.clear()
    before = len(tried)
    cache.close()
    assert len(tried) - before <= (3 if heals else 2), "a device that fails was asked for each record"
    monkeypatch.undo()
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert cache.get_many(keys) == [key.encode() if heals else None for key in keys]


# ---- Stopped peers

OPEN = "cache = kvstrata.open(directory, memory='8MiB', disk='64MiB'); ns = cache.namespace('ns')\n"

# Stands still when the rows are committed, until it is told that the other process is stopped.
HALF_WAY = """
import threading
from kvstrata import _core
from kvstrata.errors import TierUnavailable
from kvstrata.tiers.catalog import Catalog
add, mark = Catalog.add, _core.Store.mark_durable
committed, stopped, marking, failed = (threading.Event() for _ in range(4))
def adding(self, *what):
    alive = add(self, *what)
    committed.set()
    assert stopped.wait(60)
    return alive
def telling(self, *what):
    marking.set()
    try:
        mark(self, *what)
    except TierUnavailable:
        failed.set()
        raise
Catalog.add, _core.Store.mark_durable = adding, telling
ns.put('key', b'value')
assert committed.wait(60)
"""


@contextlib.contextmanager
def a_record_that_a_stopped_process_keeps_from_being_settled(
    directory: Path, patience: str
) -> Iterator[tuple[Process, Process]]:
    with Process(KVSTRATA_LOCK_TIMEOUT=patience) as writer, Process(core=build()) as other:
        writer.run(OPEN, directory=directory)
        other.run(OPEN + "os.environ['KVSTRATA_FAILPOINT'] = 'store.pin:0:stop'", directory=directory)
        writer.run(HALF_WAY)
        other.start("ns.pin('key')")  # stops with the lock of its shard
        os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            writer.run("stopped.set()")
            yield writer, other
        finally:
            other.kill()


def test_a_record_whose_row_is_committed_is_never_taken_for_one_without(shm: Path, tmp_path: Path) -> None:
    with a_record_that_a_stopped_process_keeps_from_being_settled(tmp_path, "0.05") as (writer, other):
        writer.run("assert failed.wait(60)")
        other.kill()
        writer.run("cache.flush(); assert cache.stats()['disk']['failed_records'] == 0")
        writer.run("assert ns.delete('key'); cache.close()")
        writer.run(OPEN + "assert ns.get('key') is None")


def test_others_run_while_records_wait_for_a_lock_to_be_settled(shm: Path, tmp_path: Path) -> None:
    with a_record_that_a_stopped_process_keeps_from_being_settled(tmp_path, "600") as (writer, _):
        writer.run("assert marking.wait(60)")
        writer.run("assert marking.is_set()")  # else hangs for as long as the lock is waited for
