"""Segment files: appending, reading, walking through them, and what other processes and damage do to that."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstrata import _core
from kvstrata.errors import FormatError, TierFull, TierUnavailable
from kvstrata.record import (
    IMMUTABLE,
    NAMESPACE,
    PAGE,
    NamespaceInfo,
    build_descriptor,
    build_record,
    parse_record,
)
from kvstrata.tiers import blockio, segment_format, segments
from kvstrata.tiers.blockio import SHORT_READ, Read, aligned_buffer
from kvstrata.tiers.ledger import Ledger, Mark
from kvstrata.tiers.segment_format import pack_header, stored_seed
from kvstrata.tiers.segments import Segment, SegmentSet, segment_bytes_for

SEED = 77
SIZE = 1 << 20


class Out(NamedTuple):
    """A record as the store hands it over."""

    key: bytes
    view: memoryview
    ns: int = 1
    version: int = 1
    epoch: int = 0

    @property
    def length(self) -> int:
        return len(self.view)


def out(key: bytes, size: int, *, ns: int = 1, epoch: int = 0, aligned: bool = True) -> Out:
    record = build_record(key, random.Random(key).randbytes(size), seed=SEED, ns=ns, version=1, epoch=epoch, seq=1)
    buffer = aligned_buffer(len(record) + PAGE)
    view = buffer[: len(record)] if aligned else buffer[64 : 64 + len(record)]
    view[:] = record
    return Out(key, view.toreadonly(), ns, 1, epoch)


def describe(ns: int, version: int, epoch: int) -> bytes:
    return build_descriptor(NamespaceInfo(ns, f"ns{ns}", version, epoch), seed=SEED)


def no_limit(_: int) -> None:
    """Allow every file."""


def make(directory: Path, **options: object) -> SegmentSet:
    defaults: dict[str, object] = {
        "seed": SEED,
        "segment_bytes": SIZE,
        "ledger": Ledger(directory, seed=SEED),
        "make_room": no_limit,
        "describe": describe,
    }
    return SegmentSet(directory, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[SegmentSet]:
    segment_set = make(tmp_path)
    yield segment_set
    segment_set.close()


def append_all(files: SegmentSet, records: list[Out]) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    while len(places) < len(records):
        segment, offsets = files.append(records[len(places) :])
        places += [(segment, offset) for offset in offsets]
    return places


def read_back(files: SegmentSet, places: list[tuple[int, int]], lengths: list[int]) -> list[bytes | int]:
    buffers = [aligned_buffer(max(length, 1))[:length] for length in lengths]
    results: dict[int, int] = {}
    files.read(
        [Read(segment, offset, buffer) for (segment, offset), buffer in zip(places, buffers, strict=True)],
        results.__setitem__,
    )
    assert sorted(results) == list(range(len(places)))
    return [results[i] or bytes(buffers[i]) for i in range(len(places))]


# ---- Appending and reading


@pytest.mark.parametrize("direct", [True, False])
def test_records_of_all_sizes_are_read_back_as_they_were_written(tmp_path: Path, direct: bool) -> None:
    files = make(tmp_path, direct=direct)
    sizes = random.Random(1)
    records = [out(b"%d" % i, sizes.choice([0, 10, 1000, 5000, 65535, 65536, 100_000, 300_000])) for i in range(60)]
    places = append_all(files, records)
    order = list(range(60))
    sizes.shuffle(order)
    found = read_back(files, [places[i] for i in order], [records[i].length for i in order])
    assert found == [bytes(records[i].view) for i in order]
    files.close()


def test_large_records_lie_on_pages_and_small_ones_at_64_bytes(files: SegmentSet) -> None:
    records = [out(b"a", 100), out(b"b", 100_000), out(b"c", 10), out(b"d", 70_000)]
    _, offsets = files.append(records)
    assert offsets[1] % PAGE == offsets[3] % PAGE == 0
    assert offsets[0] % 64 == offsets[2] % 64 == 0
    assert offsets[2] == offsets[0] + records[0].length


def test_a_large_record_that_does_not_lie_on_a_page_is_written_too(files: SegmentSet) -> None:
    records = [out(b"a", 100_000, aligned=False), out(b"b", 100_000), out(b"c", 100_000, aligned=False)]
    places = append_all(files, records)
    found = read_back(files, places, [record.length for record in records])
    assert found == [bytes(record.view) for record in records]


def test_reads_into_buffers_that_lie_anywhere_are_right(files: SegmentSet) -> None:
    records = [out(b"%d" % i, 100_000) for i in range(3)]
    places = append_all(files, records)
    buffers = [aligned_buffer(records[0].length + 64)[64:] for _ in records]
    failed: list[int] = []
    files.read(
        [Read(*place, buffer) for place, buffer in zip(places, buffers, strict=True)],
        lambda index, error: failed.append(index) if error else None,
    )
    assert failed == []
    assert [bytes(buffer) for buffer in buffers] == [bytes(record.view) for record in records]


def test_a_record_larger_than_a_segment_gets_a_segment_of_its_own_size(files: SegmentSet) -> None:
    record = out(b"big", 3 * SIZE)
    places = append_all(files, [record])
    assert read_back(files, places, [record.length]) == [bytes(record.view)]


def test_threads_that_append_and_read_at_once_get_what_they_wrote(files: SegmentSet) -> None:
    wrong: list[bytes] = []

    def work(name: int) -> None:
        records = [out(b"%d %d" % (name, i), 40_000 * (i % 3) + 50) for i in range(20)]
        places = append_all(files, records)
        found = read_back(files, places, [record.length for record in records])
        wrong.extend(r.key for r, data in zip(records, found, strict=True) if data != bytes(r.view))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_missing_and_the_short_are_told_apart_and_the_rest_is_read(files: SegmentSet, tmp_path: Path) -> None:
    records = [out(b"%d" % i, 100_000) for i in range(3)]
    places = append_all(files, records)
    files.seal()
    os.truncate(files.path_of(places[2][0]), places[2][1] + PAGE)
    length = records[0].length
    found = read_back(files, [*places, (99, PAGE), (places[0][0], 1 << 30)], [length] * 5)
    assert found == [bytes(records[0].view), bytes(records[1].view), SHORT_READ, errno.ENOENT, SHORT_READ]


def test_no_descriptor_of_a_file_stays_open_after_reading(files: SegmentSet) -> None:
    records = [out(b"%d" % i, 600_000) for i in range(4)]
    places = append_all(files, records)
    files.seal()
    before = len(list(Path("/proc/self/fd").iterdir()))
    read_back(files, places, [record.length for record in records])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ---- Files and numbers


def test_an_active_segment_is_allocated_in_full_and_trimmed_when_it_is_sealed(files: SegmentSet) -> None:
    files.append([out(b"a", 100)])
    assert files.all() == [Segment(1, SIZE)]
    assert files.path_of(1).stat().st_blocks * 512 >= SIZE
    files.seal()
    assert files.all() == [Segment(1, 2 * PAGE)]


def test_numbers_are_not_given_out_again_when_files_are_gone(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        files = make(tmp_path)
        assert files.append([out(b"a", 100)])[0] == expected
        files.close()
        files.remove(expected)


def test_numbers_go_on_after_the_files_that_are_there_when_the_ledger_is_lost(tmp_path: Path) -> None:
    files = make(tmp_path)
    append_all(files, [out(b"%d" % i, 900_000) for i in range(3)])
    files.close()
    (tmp_path / "ledger").unlink()
    files = make(tmp_path)
    assert files.append([out(b"a", 100)])[0] == 4
    files.close()


def test_something_else_under_a_segments_name_is_neither_used_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "seg-00000007.kvs").mkdir()
    files = make(tmp_path)
    assert files.append([out(b"a", 100)])[0] == 8
    assert files.all() == [Segment(8, SIZE)]
    assert read_back(files, [(7, PAGE)], [PAGE]) == [errno.EISDIR]
    files.close()


def test_a_segment_deleted_under_its_writer_is_given_up(files: SegmentSet) -> None:
    files.append([out(b"a", 100)])
    files.path_of(1).unlink()
    assert files.append([out(b"b", 100)])[0] == 2


def test_room_is_asked_for_before_a_file_is_made_and_a_smaller_one_is_taken_where_it_must_be(
    tmp_path: Path,
) -> None:
    asked: list[int] = []

    def make_room(size: int) -> None:
        asked.append(size)
        if size > 64 * 1024:
            raise TierFull("disk", size, 64 * 1024)

    files = make(tmp_path, make_room=make_room)
    files.append([out(b"a", 100)])
    assert asked[0] == SIZE
    assert files.all() == [Segment(1, asked[1])]
    with pytest.raises(TierFull):
        files.append([out(b"b", 100_000)])
    assert len(files.all()) == 1
    files.close()


def test_a_failed_allocation_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = make(tmp_path)
    monkeypatch.setattr(segments.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        files.append([out(b"a", 100)])
    assert files.all() == []
    files.close()


def test_nothing_follows_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make(tmp_path)
    places = append_all(files, [out(b"a", 100)])
    real = os.pwritev

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(segments.os, "pwritev", broken)
    with pytest.raises(OSError, match="Input/output"):
        files.append([out(b"b", 100_000)])
    monkeypatch.setattr(segments.os, "pwritev", real)
    assert append_all(files, [out(b"c", 100)])[0][0] == 2
    assert [record.key for _, record, _ in files.scan(1)][1:] == [b"a"]
    assert places == [(1, PAGE + len(describe(1, 1, 0)))]
    files.close()


@pytest.mark.parametrize(
    ("capacity", "size"), [(4 << 20, 256 << 10), (1 << 30, 32 << 20), (8 << 30, 64 << 20), (1 << 40, 1 << 30)]
)
def test_segments_are_a_small_part_of_the_capacity(capacity: int, size: int) -> None:
    assert segment_bytes_for(capacity) == size


# ---- File systems that refuse O_DIRECT


def test_refused_direct_io_at_open_means_one_warning_and_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(blockio.os, "open", refusing)
    with caplog.at_level(logging.WARNING):
        files = make(tmp_path)
        records = [out(b"%d" % i, 30_000 * i) for i in range(5)]
        places = append_all(files, records)
        assert read_back(files, places, [r.length for r in records]) == [bytes(r.view) for r in records]
    assert not files.direct
    assert [str(errno.EINVAL) in record.message for record in caplog.records] == [True]
    files.close()


def test_direct_io_refused_only_when_it_is_used_means_one_warning_and_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = make(tmp_path)
    assert files.direct
    read, write = _core.read_pieces, os.pwritev

    def no_read(fd: int, pieces: list[tuple[int, memoryview]]) -> list[int]:
        return [errno.EINVAL] * len(pieces) if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT else read(fd, pieces)

    def no_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, buffers, offset)

    monkeypatch.setattr(_core, "read_pieces", no_read)
    monkeypatch.setattr(blockio.os, "pwritev", no_write)
    with caplog.at_level(logging.WARNING):
        records = [out(b"%d" % i, 30_000 * i) for i in range(5)]
        places = append_all(files, records)
        assert read_back(files, places, [r.length for r in records]) == [bytes(r.view) for r in records]
    assert len(caplog.records) == 1
    files.close()


def test_a_full_file_system_is_not_taken_for_one_without_direct_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(segments, "try_direct", lambda _: OSError(errno.ENOSPC, "No space left on device"))
    files = make(tmp_path)
    assert files.direct
    assert caplog.records == []
    files.close()


# ---- Walking through


def test_a_scan_yields_descriptors_and_records_in_the_order_of_the_file(files: SegmentSet) -> None:
    records = [out(b"a", 100), out(b"b", 100_000), out(b"c", 9000, ns=2), out(b"d", 10, epoch=1)]
    _, offsets = files.append(records)
    seen = list(files.scan(1))
    assert [record.key for _, record, payload in seen if payload is None] == [b"a", b"c", b"d", b"b"]
    assert {record.key: offset for offset, record, payload in seen if payload is None} == dict(
        zip([b"a", b"b", b"c", b"d"], offsets, strict=True)
    )
    described = [(record.ns, record.epoch) for _, record, payload in seen if payload is not None]
    assert described == [(1, 0), (2, 0), (1, 1)]


def test_a_descriptor_stands_before_the_first_record_of_its_namespace_in_each_segment(
    files: SegmentSet,
) -> None:
    records = [out(b"%d" % i, 200_000, ns=1 + i % 3) for i in range(20)]
    append_all(files, records)
    for segment in files.all():
        known: set[int] = set()
        for _, record, payload in files.scan(segment.number):
            if payload is not None:
                known.add(record.ns)
            else:
                assert record.ns in known


def test_a_scan_goes_over_batches_and_many_small_records(files: SegmentSet) -> None:
    records = [out(b"%d" % i, (i * 37) % 700) for i in range(1500)]
    for start in range(0, 1500, 70):
        append_all(files, records[start : start + 70])
    seen = [r.key for s in files.all() for _, r, payload in files.scan(s.number) if payload is None]
    assert seen == [record.key for record in records]


def test_a_scan_ends_at_damage_and_looks_for_nothing_behind_it(files: SegmentSet) -> None:
    # The third value is itself a whole record, on a page of its own: a search would take it for one.
    forged = build_record(b"forged", b"x" * 100, seed=SEED, ns=1, version=1, seq=9, flags=IMMUTABLE)
    payload = (bytes(PAGE) + forged).ljust(20_000, b"\0")
    record = build_record(b"c", payload, seed=SEED, ns=1, version=1, seq=1)
    carrier = Out(b"c", memoryview(record))
    _, offsets = files.append([out(b"a", 100), out(b"b", 100), carrier, out(b"d", 100)])
    assert [r.key for _, r, _ in files.scan(1)][1:] == [b"a", b"b", b"c", b"d"]
    with files.path_of(1).open("r+b") as file:
        file.seek(offsets[2] + 20)
        file.write(b"\xff")
    assert [r.key for _, r, _ in files.scan(1)][1:] == [b"a", b"b"]


def test_every_flipped_byte_of_a_segment_costs_records_and_never_adds_one(files: SegmentSet) -> None:
    records = [out(b"%d" % i, 300) for i in range(8)]
    files.append(records)
    files.seal()
    whole = {(r.key, r.seq, offset) for offset, r, _ in files.scan(1)}
    path = files.path_of(1)
    data = bytearray(path.read_bytes())
    for position in [*range(64), *range(PAGE, len(data), 7)]:
        data[position] ^= 0xA5
        path.write_bytes(data)
        assert {(r.key, r.seq, offset) for offset, r, _ in files.scan(1)} <= whole
        data[position] ^= 0xA5


def test_a_truncated_segment_yields_the_records_that_are_whole(files: SegmentSet) -> None:
    records = [out(b"%d" % i, 300) for i in range(20)]
    _, offsets = files.append(records)
    files.seal()
    os.truncate(files.path_of(1), offsets[10] + 100)
    assert [r.key for _, r, _ in files.scan(1)][1:] == [record.key for record in records[:10]]
    os.truncate(files.path_of(1), 10)
    assert list(files.scan(1)) == []


def test_segments_of_another_cache_are_not_walked_through(tmp_path: Path, files: SegmentSet) -> None:
    files.append([out(b"a", 100)])
    other = make(tmp_path, seed=SEED + 1)
    assert list(other.scan(1)) == []
    other.close()


def test_a_segment_under_another_number_is_not_walked_through(files: SegmentSet) -> None:
    files.append([out(b"a", 100)])
    files.seal()
    files.path_of(1).rename(files.path_of(5))
    assert list(files.scan(5)) == []


def test_a_segment_of_a_newer_format_is_refused_by_name(files: SegmentSet, monkeypatch: pytest.MonkeyPatch) -> None:
    files.append([out(b"a", 100)])
    files.seal()
    with monkeypatch.context() as newer:
        newer.setattr(segment_format, "FORMAT", 2)
        header = pack_header(1, SEED)
    with files.path_of(1).open("r+b") as file:
        file.write(header)
    with pytest.raises(FormatError, match=r"format 2.*up to 1"):
        list(files.scan(1))


def test_the_bytes_of_segments_and_ledgers_are_those_of_format_1(tmp_path: Path) -> None:
    header = pack_header(7, 0x01020304)
    assert header[:16].hex() == "4b565353010000000700000004030201"
    assert header[16:] == bytes(44) + bytes.fromhex("d333f440") + bytes(4032)
    ledger = Ledger(tmp_path)
    with ledger.hold():
        ledger.write(Mark(commits=3, segment=4, seed=0x01020304))
    ledger.close()
    data = ledger.path.read_bytes()
    assert data[:28].hex() == "4b56534c010000000300000000000000040000000000000004030201"
    assert data[28:] == bytes(32) + bytes.fromhex("5dfac53d")


def test_the_seed_of_a_directory_is_known_from_its_files(tmp_path: Path) -> None:
    assert stored_seed(tmp_path / "nowhere") is None
    assert stored_seed(tmp_path) is None
    files = make(tmp_path)
    files.append([out(b"a", 100)])
    files.close()
    assert stored_seed(tmp_path) == SEED
    (tmp_path / "ledger").unlink()
    assert stored_seed(tmp_path) == SEED


# ---- Other processes

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_segments import append_all, make, out
files = make(Path(sys.argv[1]))
places = append_all(files, [out(b"child", 100_000)])
print(places[0][0], flush=True)
sys.stdin.read()
"""


def child(directory: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory), str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate()


def test_each_process_appends_to_a_segment_of_its_own(tmp_path: Path) -> None:
    files = make(tmp_path)
    mine = files.append([out(b"mine", 100)])[0]
    process, theirs = child(tmp_path)
    assert mine != theirs
    assert files.is_being_written(mine)
    assert files.is_being_written(theirs)
    finish(process)
    files.close()


def test_a_segment_whose_writer_was_killed_becomes_an_ordinary_one(tmp_path: Path) -> None:
    files = make(tmp_path)
    process, number = child(tmp_path)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not files.is_being_written(number)
    assert [r.key for _, r, _ in files.scan(number)][1:] == [b"child"]
    end = max(offset + r.length for offset, r, _ in files.scan(number))
    files.trim(number, end)
    assert files.all() == [Segment(number, end)]
    assert [r.key for _, r, _ in files.scan(number)][1:] == [b"child"]
    files.close()


def test_a_segment_that_is_held_is_its_writers_until_it_is_released(tmp_path: Path) -> None:
    files = make(tmp_path)
    number, _ = files.append([out(b"a", 100)], hold=True)
    files.append([out(b"b", 100)], hold=True)
    sealing = threading.Thread(target=files.seal)
    sealing.start()
    files.release(number)
    sealing.join(0.2)  # it must not end
    assert sealing.is_alive(), "another one holds it"
    assert files.is_being_written(number)
    files.release(number)
    sealing.join()
    assert not files.is_being_written(number)
    files.close()


def test_a_forked_child_does_not_wait_for_what_its_parent_holds(tmp_path: Path) -> None:
    files = make(tmp_path)
    number, _ = files.append([out(b"a", 100)], hold=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            theirs, _ = files.append([out(b"b", 100)])
            files.close()
            code = int(theirs == number)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    files.release(number)
    files.close()


def test_a_forked_child_neither_writes_to_nor_keeps_its_parents_segment(tmp_path: Path) -> None:
    files = make(tmp_path)
    mine = files.append([out(b"mine", 100)])[0]
    said, say = os.pipe()
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(tell)
            theirs = files.append([out(b"theirs", 100)])[0]
            os.write(say, bytes([theirs]))
            os.read(go, 1)
        finally:
            os._exit(0)
    os.close(go)
    theirs = os.read(said, 1)[0]
    assert theirs != mine
    assert files.append([out(b"more", 100)])[0] == mine
    files.seal()
    assert not files.is_being_written(mine)
    assert files.is_being_written(theirs)
    os.close(tell)
    os.waitpid(pid, 0)
    os.close(said)
    os.close(say)
    assert parse_record(files.path_of(theirs).read_bytes(), seed=SEED, offset=PAGE).flags == NAMESPACE
    files.close()


def test_a_stopped_holder_of_the_ledger_makes_others_fail_and_not_hang(tmp_path: Path) -> None:
    holder = Ledger(tmp_path)
    impatient = Ledger(tmp_path, patience=0.05)
    with holder.hold():
        with pytest.raises(TierUnavailable, match="another process holds"), impatient.hold():
            raise AssertionError("entered twice")
        with holder.hold():
            pass
    with impatient.hold():
        pass
    holder.close()
    impatient.close()


def test_a_ledger_file_that_was_replaced_excludes_others_all_the_same(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path, patience=0.05), Ledger(tmp_path, patience=0.05)
    with first.hold():
        pass
    (tmp_path / "ledger").unlink()
    with second.hold(), pytest.raises(TierUnavailable), first.hold():
        raise AssertionError("entered twice")
    first.close()
    second.close()
