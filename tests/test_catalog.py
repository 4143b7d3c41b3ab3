"""The catalog: what it keeps over restarts and kills, who may use it at once, and every kind of damage."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstrata.errors import FormatError, TierFull, TierUnavailable
from kvstrata.record import IMMUTABLE, NamespaceInfo
from kvstrata.tiers.catalog import Catalog, CatalogDamaged, Row
from kvstrata.tiers.ledger import Ledger


def row(key: bytes, seq: int = 1, *, ns: int = 1, segment: int = 1, epoch: int = 0, expires: int = 0) -> Row:
    return (ns, key, seq, segment, 4096 + 128 * seq, 128, expires, 1, epoch, IMMUTABLE, 0)


def add(catalog: Catalog, *rows: Row) -> None:
    catalog.add(rows, lambda: [True] * len(rows))


def keys(catalog: Catalog) -> list[bytes]:
    return [found[1] for batch in catalog.rows(batch=3) for found in batch]


def make(directory: Path, **options: object) -> Catalog:
    return Catalog(directory, Ledger(directory, seed=5), **options)  # type: ignore[arg-type]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    made = make(tmp_path)
    assert not made.open()
    made.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    yield made
    made.close()


# ---- Rows


def test_rows_are_there_after_a_restart_in_the_order_of_their_keys(catalog: Catalog, tmp_path: Path) -> None:
    rows = [row(b"%03d" % i, i + 1) for i in range(10)]
    add(catalog, *random.Random(1).sample(rows, 10))
    catalog.close()
    again = make(tmp_path)
    assert again.open()
    assert [found for batch in again.rows(batch=3) for found in batch] == rows
    again.close()


def test_a_row_is_never_replaced_by_an_older_one(catalog: Catalog) -> None:
    add(catalog, row(b"k", 5, segment=2))
    add(catalog, row(b"k", 4, segment=1))
    assert [found[2:4] for batch in catalog.rows() for found in batch] == [(5, 2)]
    add(catalog, row(b"k", 6, segment=3))
    assert [found[2:4] for batch in catalog.rows() for found in batch] == [(6, 3)]


def test_only_what_is_still_live_is_added(catalog: Catalog) -> None:
    assert catalog.add([row(b"a"), row(b"b"), row(b"c")], lambda: [True, False, True]) == [True, False, True]
    assert keys(catalog) == [b"a", b"c"]


def test_nothing_is_added_when_asking_what_is_live_fails(catalog: Catalog) -> None:
    def fails() -> list[bool]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        catalog.add([row(b"a")], fails)
    assert keys(catalog) == []
    add(catalog, row(b"b"))
    assert keys(catalog) == [b"b"]


def test_a_deletion_is_never_overtaken_by_an_addition(catalog: Catalog, tmp_path: Path) -> None:
    # The deleter marks the key dead and then deletes its row: whoever asked before that commits before it.
    dead = threading.Event()
    asked = threading.Event()
    other = make(tmp_path)

    def deleter() -> None:
        asked.wait()
        dead.set()
        other.delete(1, [(b"k", None)])

    def live() -> list[bool]:
        alive = not dead.is_set()
        asked.set()
        dead.wait()
        return [alive]

    thread = threading.Thread(target=deleter)
    thread.start()
    catalog.add([row(b"k")], live)
    thread.join()
    assert keys(catalog) == []
    other.close()


def test_deleted_rows_stay_away_and_newer_ones_can_be_spared(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, row(b"a", 1), row(b"b", 9), row(b"c", 3))
    assert catalog.delete(1, [(b"a", None), (b"b", 9), (b"c", 9), (b"absent", None)]) == 2
    catalog.close()
    again = make(tmp_path)
    again.open()
    assert keys(again) == [b"b"]
    again.close()


def test_dropping_a_segment_drops_its_rows_in_small_transactions(tmp_path: Path) -> None:
    catalog = make(tmp_path, batch_rows=7)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    for start in range(0, 100, 5):
        add(catalog, *[row(b"%03d" % i, i, segment=1 + i % 2) for i in range(start, start + 5)])
    assert catalog.drop_segment(1) == 50
    assert len(keys(catalog)) == 50
    assert catalog.drop_segment(2, beyond=4096 + 128 * 99) == 1
    catalog.close()


def test_a_database_that_has_become_empty_gives_its_space_back(tmp_path: Path) -> None:
    catalog = make(tmp_path, wal_bytes=64 << 10)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    for segment in range(1, 21):
        add(catalog, *[row(os.urandom(500), i, segment=segment) for i in range(200)])
    catalog.close()
    before = catalog.path.stat().st_size
    for segment in range(1, 21):
        catalog.drop_segment(segment)
    catalog.close()
    assert catalog.path.stat().st_size < before / 2


def test_expired_rows_and_those_of_older_epochs_and_versions_are_not_served(catalog: Catalog) -> None:
    past, future = int(time.time() * 1000) - 1, int(time.time() * 1000) + 100_000
    add(catalog, row(b"a"), row(b"b", expires=past), row(b"c", expires=future), row(b"d", epoch=1))
    assert keys(catalog) == [b"a", b"c"]
    catalog.register_namespace(NamespaceInfo(1, "one", 1, 1, True))
    assert keys(catalog) == [b"d"]
    assert catalog.drop_stale() == 3
    catalog.register_namespace(NamespaceInfo(1, "one", 2, 1, True))
    assert keys(catalog) == []


# ---- Namespaces


def test_namespaces_keep_their_numbers_and_only_rise(catalog: Catalog, tmp_path: Path) -> None:
    two = catalog.register_namespace(NamespaceInfo(0, "zwei 二", 3, 4, False))
    assert two == NamespaceInfo(2, "zwei 二", 3, 4, False)
    assert catalog.register_namespace(NamespaceInfo(0, "zwei 二", 1, 1, False)) == two
    assert catalog.register_namespace(NamespaceInfo(2, "zwei 二", 3, 7, True)).epoch == 7
    raised = catalog.register_namespace(NamespaceInfo(0, "zwei 二", 5, 0, True))
    assert (raised.version, raised.epoch) == (5, 8)
    catalog.close()
    again = make(tmp_path)
    again.open()
    assert again.load_namespaces() == [NamespaceInfo(1, "one", 1, 0, True), raised]
    again.close()


def test_a_number_is_not_given_to_two_names(catalog: Catalog) -> None:
    with pytest.raises(TierUnavailable, match="belongs to another"):
        catalog.register_namespace(NamespaceInfo(1, "other", 1, 0, False))
    with pytest.raises(TierUnavailable, match="has number 1"):
        catalog.register_namespace(NamespaceInfo(9, "one", 1, 0, False))


# ---- Room


def test_room_is_asked_for_and_an_addition_fails_without_it_but_not_a_deletion(tmp_path: Path) -> None:
    full = False

    def room(need: int) -> None:
        if full:
            raise TierFull("disk", need, 0)

    catalog = make(tmp_path, room=room)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    add(catalog, row(b"a"), row(b"b"))
    full = True
    with pytest.raises(TierFull):
        add(catalog, row(b"c"))
    assert catalog.delete(1, [(b"a", None)]) == 1
    assert keys(catalog) == [b"b"]
    catalog.close()


@pytest.mark.parametrize(("key_bytes", "batch"), [(8, 1), (32, 64), (1024, 16)])
def test_the_files_never_grow_by_more_than_what_was_asked_for(tmp_path: Path, key_bytes: int, batch: int) -> None:
    allowed = 0

    def used() -> int:
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    def room(need: int) -> None:
        nonlocal allowed
        allowed = used() + need

    catalog = make(tmp_path, room=room, batch_rows=batch, wal_bytes=64 << 10)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    generator = random.Random(3)
    written = [generator.randbytes(key_bytes) for _ in range(batch * 60)]
    for start in range(0, len(written), batch):
        add(catalog, *[row(key, start + 1, segment=1 + start) for key in written[start : start + batch]])
        assert used() <= allowed
    for start in range(0, len(written), batch):
        catalog.delete(1, [(key, None) for key in written[start : start + batch]])
        assert used() <= allowed
    catalog.close()


def test_the_log_stays_short(tmp_path: Path) -> None:
    catalog = make(tmp_path, wal_bytes=128 << 10)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    for i in range(150):
        add(catalog, row(os.urandom(32), i + 1))
    assert Path(f"{catalog.path}-wal").stat().st_size < 256 << 10
    catalog.close()


# ---- Others at the same time


def test_processes_that_write_at_once_lose_nothing(catalog: Catalog, tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_catalog import add, make, row
catalog = make(Path(sys.argv[1]))
for i in range(60):
    add(catalog, row(b"%s %d" % (sys.argv[3].encode(), i), i + 1))
catalog.close()
"""
    arguments = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    children = [subprocess.Popen([*arguments, name]) for name in "abc"]
    for i in range(60):
        add(catalog, row(b"me %d" % i, i + 1))
    assert [child.wait() for child in children] == [0, 0, 0]
    assert len(keys(catalog)) == 240


def test_a_foreign_lock_on_the_database_means_unavailable_in_bounded_time(tmp_path: Path) -> None:
    catalog = make(tmp_path, patience=0.05)
    catalog.open()
    holder = sqlite3.connect(catalog.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(TierUnavailable, match="locked"):
        catalog.delete(1, [(b"k", None)])
    holder.execute("ROLLBACK")
    holder.close()
    catalog.delete(1, [(b"k", None)])
    catalog.close()


def test_a_forked_child_uses_a_connection_of_its_own(catalog: Catalog) -> None:
    add(catalog, row(b"parent"))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            add(catalog, row(b"child", 2))
            status = 0 if keys(catalog) == [b"child", b"parent"] else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    add(catalog, row(b"zarent", 3))
    assert keys(catalog) == [b"child", b"parent", b"zarent"]


def test_a_catalog_replaced_by_another_process_is_taken_up_by_those_that_have_it_open(
    catalog: Catalog, tmp_path: Path
) -> None:
    add(catalog, row(b"old"))
    other = make(tmp_path)
    other.open()
    namespaces = {7: NamespaceInfo(7, "seven", 1, 0, True)}
    other.replace(namespaces, [[row(b"new", ns=7)]])
    assert catalog.is_superseded()
    assert keys(catalog) == [b"new"]
    add(catalog, row(b"newer", ns=7))
    assert catalog.delete(7, [(b"new", None)]) == 1
    assert keys(other) == [b"newer"]
    catalog.close()
    other.close()
    again = make(tmp_path)
    again.open()
    assert keys(again) == [b"newer"]
    assert [path.name for path in tmp_path.glob("catalog-*")] == [again.path.name] or again.close() is None
    again.close()


def test_a_kill_at_any_moment_loses_no_deletion_that_has_returned(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_catalog import add, make, row
catalog = make(Path(sys.argv[1]))
catalog.open()
i = 0
while True:
    add(catalog, row(b"k%d" % i, i + 1))
    print("added", i, flush=True)
    if i % 2:
        catalog.delete(1, [(b"k%d" % i, None)])
        print("deleted", i, flush=True)
    i += 1
"""
    first = make(tmp_path)
    first.open()
    first.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    first.close()
    generator = random.Random(9)
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        said = [child.stdout.readline().split() for _ in range(generator.randrange(1, 120))]
        child.send_signal(signal.SIGKILL)
        said += [line.split() for line in child.stdout.read().splitlines() if len(line.split()) == 2]
        child.wait()
        child.stdout.close()
        again = make(tmp_path)
        assert again.open()
        there = set(keys(again))
        for i in {int(i) for verb, i in said if verb == "deleted"}:
            assert b"k%d" % i not in there
        for i in {int(i) for verb, i in said if verb == "added" and int(i) % 2 == 0}:
            assert b"k%d" % i in there
        again.delete(1, [(key, None) for key in there])
        again.close()


# ---- Damage


def fill(directory: Path, *, leave_log: bool) -> None:
    """Make a catalog with 300 rows of which the odd ones were deleted; with a log, as after a kill."""
    work = directory.with_name(directory.name + "-work")
    work.mkdir()
    catalog = make(work)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    add(catalog, *[row(b"key %03d" % i, i + 1) for i in range(300)])
    catalog.close()
    catalog.open()
    catalog.delete(1, [(b"key %03d" % i, None) for i in range(1, 300, 2)])
    catalog.register_namespace(NamespaceInfo(1, "one", 1, 0, True))
    if leave_log:
        shutil.copytree(work, directory, dirs_exist_ok=True)
        catalog.close()
    else:
        catalog.close()
        shutil.copytree(work, directory, dirs_exist_ok=True)


def survives(directory: Path) -> str:
    """Use a catalog that may be damaged; returns what became of it. Nothing deleted may come back."""
    catalog = make(directory)
    try:
        catalog.open()
        found = keys(catalog)
        catalog.drop_stale()
        outcome = "served" if len(found) == 150 else "served less"
        assert not [key for key in found if key.startswith(b"key") and key[4:7].isdigit() and int(key[4:7]) % 2]
        add(catalog, row(b"new", 1000))
        catalog.delete(1, [(b"new", None)])
    except CatalogDamaged:
        catalog.replace({1: NamespaceInfo(1, "one", 1, 0, True)}, [[row(b"recovered")]])
        assert keys(catalog) == [b"recovered"]
        add(catalog, row(b"new"))
        outcome = "replaced"
    finally:
        catalog.close()
    again = make(directory)
    assert again.open()
    assert b"recovered" in keys(again) or outcome != "replaced"
    again.close()
    return outcome


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


@pytest.mark.parametrize("leave_log", [False, True])
def test_flipped_bytes_in_any_file_never_bring_back_what_was_deleted(tmp_path: Path, leave_log: bool) -> None:
    original = tmp_path / "original"
    fill(original, leave_log=leave_log)
    generator = random.Random(11)
    for path in files_of(original):
        size = path.stat().st_size
        spots = (
            set(range(min(size, 100))) if path.suffix == ".db" else set(generator.sample(range(size), min(size, 30)))
        )
        spots |= set(generator.sample(range(size), min(size, 80)))
        for spot in spots:
            copy = tmp_path / "copy"
            shutil.copytree(original, copy)
            with (copy / path.name).open("r+b") as file:
                file.seek(spot)
                byte = file.read(1)[0]
                file.seek(spot)
                file.write(bytes([byte ^ generator.choice([0x01, 0x80, 0xFF])]))
            survives(copy)
            shutil.rmtree(copy)


@pytest.mark.parametrize("leave_log", [False, True])
def test_truncated_files_never_bring_back_what_was_deleted(tmp_path: Path, leave_log: bool) -> None:
    original = tmp_path / "original"
    fill(original, leave_log=leave_log)
    for path in files_of(original):
        size = path.stat().st_size
        for length in {0, 1, 16, 100, 4096, 5000, size // 2, size - 4096, size - 1}:
            if not 0 <= length < size:
                continue
            copy = tmp_path / "copy"
            shutil.copytree(original, copy)
            os.truncate(copy / path.name, length)
            survives(copy)
            shutil.rmtree(copy)


def remove(path: Path) -> None:
    path.unlink()


def put_a_directory_there(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "somebody's file").write_bytes(b"x")


def put_something_else_there(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def put_another_database_there(path: Path) -> None:
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE t(x)")
    other.commit()
    other.close()


@pytest.mark.parametrize(
    "damage", [remove, put_a_directory_there, put_something_else_there, put_another_database_there]
)
@pytest.mark.parametrize("leave_log", [False, True])
def test_a_catalog_that_is_gone_or_something_else_is_replaced(
    tmp_path: Path, damage: Callable[[Path], None], leave_log: bool
) -> None:
    fill(tmp_path / "c", leave_log=leave_log)
    (path,) = (tmp_path / "c").glob("catalog-*.db")
    damage(path)
    assert survives(tmp_path / "c") == "replaced"
    kept = list((tmp_path / "c").glob("*.set-aside-*/somebody's file"))
    assert len(kept) == (damage is put_a_directory_there)


def test_an_older_copy_of_the_database_is_replaced(tmp_path: Path) -> None:
    catalog = make(tmp_path)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    add(catalog, row(b"key 001"))
    catalog.close()
    older = catalog.path.read_bytes()
    catalog.delete(1, [(b"key 001", None)])
    catalog.close()
    catalog.path.write_bytes(older)
    assert survives(tmp_path) == "replaced"


def test_damage_that_is_met_while_it_is_open_is_reported_and_the_replacement_used(tmp_path: Path) -> None:
    catalog = make(tmp_path)
    catalog.open()
    catalog.register_namespace(NamespaceInfo(0, "one", 1, 0, True))
    for i in range(40):
        add(catalog, *[row(b"%d %d" % (i, j), j) for j in range(100)])
    catalog.close()
    size = catalog.path.stat().st_size
    with catalog.path.open("r+b") as file:
        file.seek(4096 * 5)
        file.write(random.Random(1).randbytes(size - 4096 * 5))
    everything = [(b"%d %d" % (i, j), None) for i in range(40) for j in range(100)]
    with pytest.raises(CatalogDamaged):
        catalog.delete(1, everything)
    catalog.replace({1: NamespaceInfo(1, "one", 1, 0, True)}, [])
    add(catalog, row(b"k"))
    assert keys(catalog) == [b"k"]
    catalog.close()


def test_rows_of_the_wrong_kind_are_left_out(catalog: Catalog) -> None:
    add(catalog, *[row(b"%d" % i, i + 1) for i in range(8)])
    catalog.close()
    tamper = sqlite3.connect(catalog.path)
    for i, change in enumerate(
        ["seq='x'", "segment=-1", "offset=5000", "length=1.5", "flags=x'00'", "seq=1<<60", "expires='never'"]
    ):
        tamper.execute(f"UPDATE records SET {change} WHERE key=?", (b"%d" % i,))
    tamper.commit()
    tamper.close()
    assert keys(catalog) == [b"7"]
    assert catalog.drop_stale() == 7


def test_a_tampered_namespace_is_noticed(catalog: Catalog) -> None:
    catalog.close()
    tamper = sqlite3.connect(catalog.path)
    tamper.execute("UPDATE namespaces SET epoch=epoch+1")
    tamper.commit()
    tamper.close()
    with pytest.raises(CatalogDamaged, match="namespace 1"):
        catalog.open()


def test_a_catalog_of_a_newer_format_is_refused_and_left_alone(catalog: Catalog) -> None:
    catalog.close()
    newer = sqlite3.connect(catalog.path)
    newer.execute("PRAGMA user_version=2")
    newer.execute("UPDATE meta SET value=2 WHERE name='format'")
    newer.commit()
    newer.close()
    with pytest.raises(FormatError, match=r"format 2.*up to 1"):
        catalog.open()
    assert catalog.path.exists()


def test_a_replacement_that_was_cut_short_is_made_again(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, row(b"key 001"))

    def cut_short() -> Iterator[list[Row]]:
        yield [row(b"half")]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.replace({}, cut_short())
    catalog.close()
    assert survives(tmp_path) == "replaced"
    assert not list(tmp_path.glob("*.new*"))
