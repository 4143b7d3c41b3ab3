"""The filter before an engine: what it spares, how often it errs, and that nothing that is there is ever denied."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import Process
from test_engines import ENGINES, hammer_in_threads, open_at, value

import kvstrata
from kvstrata import _core
from kvstrata.errors import TierUnavailable
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.engines import filter_file
from kvstrata.tiers.engines.filter_file import FilterFile

pytest.importorskip("lmdb")
pytest.importorskip("rocksdict")
PATIENCE_S = 60.0
DISK = 64 << 20


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def small_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters that are full soon: of 1,000 names, then of 64,000."""
    monkeypatch.setattr(filter_file, "_LEAST_NAMES", 1000)
    monkeypatch.setattr(filter_file, "_SIZES", (1 << 20, 1024))


def tier_of(cache: kvstrata.Cache) -> Any:
    return cache.tiers.remotes.tier  # type: ignore[union-attr]


def figures(cache: kvstrata.Cache) -> dict[str, Any]:
    return dict(cache.stats()["disk"])


class Calls:
    """Counts the names that the engine is asked for."""

    def __init__(self, cache: kvstrata.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        store = tier_of(cache).store
        for method in ("read", "contains"):
            monkeypatch.setattr(store, method, self._counting(getattr(store, method)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(names: Any, *more: Any) -> Any:
            self.asked += len(names)
            return call(names, *more)

        return counting


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def complete(cache: kvstrata.Cache) -> None:
    """Look up what isn't there until the filter is filled."""

    def is_complete() -> bool:
        assert cache.get("certainly absent") is None
        return figures(cache)["filter_off"] is None

    until(is_complete)


def denied(cache: kvstrata.Cache) -> list[bytes]:
    """Return the names in the engine that the filter takes for absent; those of deleted records may be."""
    tier = tier_of(cache)
    names = [name for names in tier.store.scan() for name in names if tier.filter.bloom.lacks(name)]
    return [name for name, there in zip(names, tier.store.contains(names, PATIENCE_S), strict=True) if there]


def leave_memory(cache: kvstrata.Cache) -> None:
    """Have others in memory: it holds 1 MiB."""
    cache.put_many({f"filler{i}": bytes(4000) for i in range(600)})


def test_what_is_not_there_is_not_asked_for(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_at(tmp_path, engine) as cache:
        calls = Calls(cache, monkeypatch)
        assert cache.get("before anything was put") is None  # which reads that there is no generation
        calls.asked = 0
        assert cache.get("before anything was put") is None
        assert calls.asked == 0
        cache.put_many({f"key{i}": value(f"key{i}", 0) for i in range(5000)})
        cache.get("key0")
        before, calls.asked = figures(cache), 0
        for i in range(1000):
            assert cache.get(f"absent{i}") is None
        assert cache.get_many([f"absent{i}" for i in range(1000, 2000)]) == [None] * 1000
        assert not any(f"absent{i}" in cache for i in range(2000, 3000))
        assert cache.get(b"\xff" * 200) is None  # a name has a digest of such a key
        now = figures(cache)
        assert calls.asked < 30  # one in a hundred at most, and with 5,000 of 65,536 names far fewer
        spared = now["filtered_lookups"] - before["filtered_lookups"]
        assert spared >= 2001 - calls.asked  # `in` is no lookup
        assert now["misses"] - before["misses"] == now["lookups"] - before["lookups"] == 2001
        assert now["filter_off"] is None
        assert now["filter_scans"] == 0


def test_as_many_are_asked_for_in_vain_as_theory_says(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, absent = 65_000, 30_000
    with open_at(tmp_path, engine) as cache:
        cache.put_many({f"key{i}": b"x" for i in range(names)})
        cache.get("key0")
        calls = Calls(cache, monkeypatch)
        for i in range(absent):
            assert cache.get(f"absent{i}") is None
        bloom = tier_of(cache).filter.bloom
        assert bloom.capacity == 65_536
        bits = (bloom.nbytes - 64) * 8
        hashes = round(-math.log2(0.01))
        rate = (1 - math.exp(-hashes * names / bits)) ** hashes
        assert 0.009 < rate < 0.01
        assert abs(calls.asked - rate * absent) < 6 * math.sqrt(rate * absent)
        assert denied(cache) == []


def test_long_keys_and_keys_of_str_are_found_by_what_stands_in_their_names(tmp_path: Path, engine: str) -> None:
    keys: list[Any] = [b"a", "b" * 64, "b" * 65, "\u00fc" * 33, b"\x00" * 500, "\u00fc" * 32]
    with open_at(tmp_path, engine) as cache:
        for key in keys:
            cache.put(key, b"x")
        leave_memory(cache)
        assert [cache.get(key) for key in keys] == [b"x"] * len(keys)
        leave_memory(cache)
        assert cache.get_many(keys) == [b"x"] * len(keys)


def test_a_cleared_namespace_has_nothing_and_then_what_is_put(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(tmp_path, engine) as cache:
        one, other = cache.namespace("one"), cache.namespace("one")
        for turn in range(20):
            one.put("a", value("a", turn))
            leave_memory(cache)
            assert other.get("a") == value("a", turn)
            (one if turn % 2 else other).clear()
            assert (one.get("a"), other.get("a")) == (None, None)
            other.put("b", value("b", turn))
            leave_memory(cache)
            assert one.get("b") == value("b", turn)
        calls = Calls(cache, monkeypatch)
        one.clear()
        one.put("c", b"x")
        assert one.get("absent") is None  # which reads the generation, as it was cleared
        calls.asked = 0
        assert (one.get("a"), one.get("b"), one.get("c")) == (None, None, b"x")
        assert calls.asked == 0
        assert denied(cache) == []


@pytest.fixture
def filled_all_the_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[kvstrata.Cache], Any]:
    """Says of a cache that its filter is begun anew and filled again and again while the block runs."""

    class Filling:
        def __init__(self, cache: kvstrata.Cache) -> None:
            self._tier = tier_of(cache)
            monkeypatch.setattr(self._tier.filter, "_full", lambda: True)
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run)
            self.fills = 0
            self.failures: list[str] = []

        def _run(self) -> None:
            try:
                while not self._stop.is_set():
                    with contextlib.suppress(TierUnavailable):
                        self._tier.filter.fill()
                    self.fills = self._tier.filter._scans
            except BaseException as error:  # noqa: BLE001
                self.failures.append(repr(error))

        def __enter__(self) -> Filling:
            self._thread.start()
            return self

        def __exit__(self, *_: object) -> None:
            self._stop.set()
            self._thread.join()
            monkeypatch.undo()

    return Filling


def test_none_is_lost_while_others_change_all_and_the_filter_is_filled(
    tmp_path: Path, engine: str, small_filters: None, filled_all_the_time: Callable[[kvstrata.Cache], Any]
) -> None:
    with open_at(tmp_path, engine) as cache:
        with filled_all_the_time(cache) as filling:
            assert hammer_in_threads(cache, 0, 2) == []
            until(lambda: filling.fills > 2 or bool(filling.failures))
        assert filling.failures == []
        assert figures(cache)["hits"] > 100
        complete(cache)
        assert denied(cache) == []


def test_none_is_lost_while_a_namespace_is_cleared_and_the_filter_is_filled(
    tmp_path: Path, engine: str, filled_all_the_time: Callable[[kvstrata.Cache], Any]
) -> None:
    with open_at(tmp_path, engine) as cache:
        failures: list[str] = []

        def change(me: int) -> None:
            mine = cache.namespace(f"mine{me}", quota="64KiB")
            for turn in range(40):
                items = {f"k{i}": value(f"k{i}", turn) for i in range(20)}
                mine.put_many(items)
                mine.put_many({f"filler{i}": bytes(4000) for i in range(20)})
                if mine.get_many(list(items)) != list(items.values()):
                    failures.append(f"{me} lost some of turn {turn}")
                if [mine.get(key) for key in items] != list(items.values()):
                    failures.append(f"{me} lost some of turn {turn}, one by one")
                mine.clear()
                if any(mine.get(key) is not None for key in items):
                    failures.append(f"{me} still has some of turn {turn}")

        with filled_all_the_time(cache) as filling:
            threads = [threading.Thread(target=change, args=(me,)) for me in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert filling.failures == []
        assert failures == []
        complete(cache)
        assert denied(cache) == []


def test_after_closing_the_filter_is_complete_at_once(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = {f"key{i}": value(f"key{i}", 1) for i in range(3000)}
    for turn in range(3):
        with open_at(tmp_path, engine) as cache:
            if not turn:
                cache.put_many(items)
            assert figures(cache)["filter_off"] is None
            assert figures(cache)["filter_names"] >= 3000
            assert cache.get_many(list(items)) == list(items.values())
            calls = Calls(cache, monkeypatch)
            assert cache.get("absent") is None
            assert calls.asked == 0
            assert denied(cache) == []
            assert figures(cache)["filter_scans"] == 0


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no file": lambda names: names.unlink(),
    "no mark": lambda names: names.with_name("names.mark").unlink(),
    "another boot": lambda names: names.with_name("names.mark").write_text("in use since boot 0"),
    "empty": lambda names: os.truncate(names, 0),
    "a bit": lambda names: names.write_bytes(_with_a_bit_flipped(names.read_bytes())),
}


def _with_a_bit_flipped(data: bytes) -> bytes:
    at = next(i for i in range(4096, len(data)) if data[i])
    return data[:at] + bytes([data[at] & (data[at] - 1)]) + data[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_filter_that_may_lack_names_is_filled_anew(
    tmp_path: Path, engine: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = {f"key{i}": value(f"key{i}", 1) for i in range(5000)}
    with open_at(tmp_path, engine) as cache:
        cache.put_many(items)
    DAMAGE[damage](tmp_path / engine / "names")
    with open_at(tmp_path, engine) as cache:
        assert figures(cache)["filter_off"] is not None
        assert cache.get_many(list(items)) == list(items.values())  # which are asked for
        cache.put("new", b"x")
        complete(cache)
        assert figures(cache)["filter_scans"] == 1
        assert figures(cache)["filter_names"] >= 4950
        assert denied(cache) == []
        calls = Calls(cache, monkeypatch)
        assert cache.get("absent") is None
        assert calls.asked == 0
        assert cache.get_many(list(items)) == list(items.values())
        assert figures(cache)["damaged_directories"] == 0


def test_a_scan_that_fails_leaves_lookups_to_the_engine(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(tmp_path, engine) as cache:
        cache.put("a", b"x")
    (tmp_path / engine / "names").unlink()
    with open_at(tmp_path, engine) as cache:
        store = tier_of(cache).store
        scanned = threading.Event()

        def fail() -> Iterator[list[bytes]]:
            scanned.set()
            raise StoreFault("EIO", "the disk is broken")

        with monkeypatch.context() as patched:
            patched.setattr(store, "scan", fail)
            until(lambda: cache.get("absent") is None and scanned.is_set())
            assert cache.get("a") == b"x"
            assert figures(cache)["filter_off"] is not None
        complete(cache)
        assert cache.get("a") == b"x"


def test_a_full_filter_is_filled_anew_and_stays_within_its_bytes(
    tmp_path: Path, engine: str, small_filters: None
) -> None:
    with open_at(tmp_path, engine) as cache:
        tier = tier_of(cache)
        first = tier.filter.bloom.capacity
        cache.put_many({f"key{i}": value(f"key{i}", 0) for i in range(5000)})

        def has_grown() -> bool:
            cache.put_many({f"more{i}": b"x" for i in range(100)})
            return bool(tier.filter.bloom.capacity > first) and figures(cache)["filter_off"] is None

        until(has_grown)
        assert cache.get_many([f"key{i}" for i in range(5000)]) == [value(f"key{i}", 0) for i in range(5000)]
        largest = tier.filter.bloom.capacity
        batch = 0

        def filled_twice() -> bool:  # with names that leave the engine
            nonlocal batch
            batch += 1
            cache.put_many({f"{batch}/{i}": bytes(2000) for i in range(1000)})
            assert cache.get(f"{batch}/7") == bytes(2000)
            return batch > 150

        until(filled_twice)
        assert cache.stats()["disk"]["filter_bytes"] <= FilterFile.size(DISK)
        complete(cache)
        until(lambda: bool(tier.filter.bloom.count <= largest) or (cache.put("one more", b"x") is None and False))
        assert figures(cache)["filter_scans"] >= 2
        assert denied(cache) == []
        assert (tmp_path / engine / "names").stat().st_size == FilterFile.size(DISK)


WRITER = """
import sys
from pathlib import Path
from test_engines import open_at, value
cache = open_at(Path(path), engine, shared=False)
def write(first, last):
    for i in range(first, last):
        cache.put(f"key{i}", value(f"key{i}", 0))
        if i % 100 == 0:
            print(i, file=sys.stderr)
write(0, 500)
"""


def test_after_a_kill_all_that_was_acknowledged_is_found(tmp_path: Path, engine: str) -> None:
    writer = Process()
    writer.run(WRITER, path=str(tmp_path), engine=engine)
    writer.start("write(500, 10**9)")
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    with open_at(tmp_path, engine, shared=False) as cache:
        assert figures(cache)["filter_off"] is None  # what was told it is in the page cache
        assert figures(cache)["filter_names"] >= 500
        assert cache.get_many([f"key{i}" for i in range(500)]) == [value(f"key{i}", 0) for i in range(500)]
        assert denied(cache) == []


def test_a_fill_that_was_killed_is_done_by_another(tmp_path: Path, engine: str) -> None:
    writer = Process()
    writer.run(WRITER, path=str(tmp_path), engine=engine)
    writer.run("cache.tiers.remotes.tier.store.filter.begin(0)")
    writer.run("write(500, 600)")
    writer.kill()
    with open_at(tmp_path, engine, shared=False) as cache:
        assert figures(cache)["filter_off"] is not None
        assert cache.get_many([f"key{i}" for i in range(600)]) == [value(f"key{i}", 0) for i in range(600)]
        complete(cache)
        assert denied(cache) == []
        assert [cache.get(f"key{i}") for i in range(600)] == [value(f"key{i}", 0) for i in range(600)]


def test_what_another_process_writes_to_a_btree_is_found_at_once(tmp_path: Path) -> None:
    with open_at(tmp_path, "btree") as cache, Process() as other:
        assert cache.get("a") is None
        other.run(
            "from pathlib import Path\nfrom test_engines import open_at\nfrom test_engine_filter import leave_memory\n"
            "cache = open_at(Path(path), 'btree')",
            path=str(tmp_path),
        )
        for turn in range(5):
            for change in ("", "cache.delete('a')", "cache.clear()"):
                assert cache.get("a") is None
                other.run(f"cache.put('a', b'{turn}'); leave_memory(cache)")
                assert cache.get("a") == b"%d" % turn
                other.run("cache.clear()")
                assert cache.get("a") is None
                other.run(f"cache.put('a', b'other'); leave_memory(cache); {change}")
                assert cache.get("a") == (None if change else b"other")
                other.run("cache.delete('a')")
        assert figures(cache)["filtered_lookups"] > 0
        assert denied(cache) == []


def test_what_was_told_by_two_processes_is_in_the_filter_of_both(tmp_path: Path, small_filters: None) -> None:
    with open_at(tmp_path, "btree") as cache, Process() as other:
        other.run(
            "from kvstrata.tiers.engines import filter_file\n"
            "filter_file._LEAST_NAMES, filter_file._SIZES = 1000, (1 << 20, 1024)\n"
            "from pathlib import Path\nfrom test_engines import open_at, value\n"
            "from test_engine_filter import denied, figures\n"
            "cache = open_at(Path(path), 'btree')",
            path=str(tmp_path),
        )
        other.start("for i in range(8000): cache.put(f'other{i}', value(f'other{i}', 0))")
        for i in range(8000):
            cache.put(f"mine{i}", value(f"mine{i}", 0))
            assert cache.get(f"mine{i // 2}") == value(f"mine{i // 2}", 0)
        other.finish()
        until(lambda: figures(cache)["filter_scans"] + other.eval("figures(cache)")["filter_scans"] > 0)
        complete(cache)
        assert denied(cache) == other.eval("denied(cache)") == []
        names = [f"other{i}" for i in range(8000)]
        assert cache.get_many(names) == [value(name, 0) for name in names]


def test_what_a_forked_child_writes_to_a_btree_is_found_by_its_parent(tmp_path: Path) -> None:
    with open_at(tmp_path, "btree") as cache:
        cache.put("a", b"parent")
        assert cache.get("b") is None
        child = os.fork()
        if not child:
            try:
                cache.put("b", b"child")
                leave_memory(cache)
                found = cache.get("a")
                cache.close()
                os._exit(0 if found == b"parent" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert cache.get("b") == b"child"
        assert figures(cache)["filter_off"] is None
        assert denied(cache) == []


def test_a_mapped_filter_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="too little memory"):
        _core.MappedBloom(bytearray(8))
    bloom = _core.MappedBloom(bytearray(_core.MappedBloom.bytes_for(100, 0.01)))
    with pytest.raises(ValueError, match="enough memory"):
        bloom.begin(10_000, 0.01)
    assert bloom.complete(bloom.begin(100, 0.01))
    with pytest.raises(ValueError, match="bytes"):
        bloom.positions(["a"], True)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        bloom.lacks("a")  # type: ignore[arg-type]
    assert bloom.lacks(b"a")
