"""Caches whose disk is an engine: what was acknowledged last counts, whoever else changes, reads, dies or forks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.threads import failures_of

import kvstrata
from kvstrata.errors import ConfigError, TierUnavailable, UnknownOption

ENGINES = ("lsm", "btree")
MEMORY = "1MiB"  # so that records leave it all the time
pytest.importorskip("lmdb")
pytest.importorskip("rocksdict")


def open_at(path: Path, engine: str, **options: Any) -> kvstrata.Cache:
    return kvstrata.open(path, **{"memory": MEMORY, "disk": "64MiB", "disk_engine": engine} | options)


def value(key: str, turn: int) -> bytes:
    return (f"{key} {turn} " * 40).encode()[:256]


def turn_of(key: str, data: bytes) -> int:
    turn = int(data.split()[1])
    assert data == value(key, turn)
    return turn


@pytest.mark.parametrize("engine", ENGINES)
def test_many_more_records_than_memory_holds_are_all_there(tmp_path: Path, engine: str) -> None:
    items = {f"key{i}": value(f"key{i}", i) for i in range(20_000)}
    with open_at(tmp_path, engine) as cache:
        cache.put_many(items)
        assert cache.get_many(list(items)) == list(items.values())
        assert cache.get("absent") is None
        assert cache.get("key0") == items["key0"]
        assert "key1" in cache
    with open_at(tmp_path, engine) as cache:
        assert cache.get_many(list(items)) == list(items.values())
        assert cache.delete_many(["key3"]) in (0, 1)
        assert cache.get("key3") is None
        cache.clear()
        assert cache.get_many(list(items)[:1000]) == [None] * 1000
    with open_at(tmp_path, engine) as cache:
        assert cache.get_many(list(items)[:1000]) == [None] * 1000


@pytest.mark.parametrize("engine", ENGINES)
def test_what_only_the_engine_has_can_be_brought_up_ahead(tmp_path: Path, engine: str) -> None:
    items = {f"key{i}": value(f"key{i}", i) for i in range(500)}
    with open_at(tmp_path, engine) as cache:
        cache.put_many(items)
    with open_at(tmp_path, engine) as cache:
        assert cache.warm(["key0", "absent"]).loaded == 1
        ahead = cache.prefetch(list(items))
        assert ahead.wait(60)
        assert ahead.loaded == 499
        assert cache.get_many(list(items)) == list(items.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_when_the_oldest_leave_all_younger_ones_stay(tmp_path: Path, engine: str) -> None:
    with open_at(tmp_path, engine) as cache:
        for turn in range(80):  # 160 MB
            cache.put_many({f"{turn}/{i}": bytes([turn]) * 2000 for i in range(1000)})
            for back in range(min(turn + 1, 8)):
                names = [f"{turn - back}/{i}" for i in range(1000)]
                assert cache.get_many(names) == [bytes([turn - back]) * 2000] * 1000
        disk = cache.stats()["disk"]
        assert disk.get("evicted_slices", 0) > 8 or disk.get("evicted_records", 0) > 50_000
        assert disk["generations_made"] == 1
        assert cache.get("0/0") is None
    with open_at(tmp_path, engine) as cache:
        assert cache.get_many(names) == [bytes([turn - back]) * 2000] * 1000


def hammer(cache: kvstrata.Namespace, me: int, turns: int, failures: list[str]) -> None:
    """Change keys of one's own, and see at each step that the last change counts."""
    chance = random.Random(me)
    mine = [f"{me}/{i}" for i in range(6)]
    last: dict[str, int | None] = dict.fromkeys(mine)
    for turn in range(turns):
        key = chance.choice(mine)
        action = chance.random()
        if action < 0.35:
            cache.put(key, value(key, turn))
            last[key] = turn
        elif action < 0.5:
            cache.delete(key)
            last[key] = None
        elif action < 0.6:
            chosen = chance.sample(mine, 3)
            cache.put_many({name: value(name, turn) for name in chosen})
            last.update(dict.fromkeys(chosen, turn))
        else:
            cache.put_many({f"filler{me}/{turn}/{i}": bytes(4000) for i in range(20)})  # so that others leave memory
        for name in mine:
            found = cache.get(name)
            now = None if found is None else turn_of(name, found)
            if now != last[name]:
                failures.append(f"{name}: {now} instead of {last[name]} after turn {turn}")


def look(cache: kvstrata.Namespace, of: int, stop: threading.Event, failures: list[str]) -> None:
    """Read others' keys, so that they are brought up while they change: no value may be older than one seen before."""
    newest: dict[str, int] = {}
    while not stop.is_set():
        for me in range(of):
            for i in range(6):
                name = f"{me}/{i}"
                found = cache.get(name)
                if found is None:
                    continue
                turn = turn_of(name, found)
                if turn < newest.get(name, 0):
                    failures.append(f"{name}: {turn} came back after {newest[name]}")
                newest[name] = max(turn, newest.get(name, 0))


def hammer_in_threads(opened: kvstrata.Cache, first: int, of: int) -> list[str]:
    cache = opened.namespace("hammered", quota="64KiB")  # less than one batch of filler
    return failures_of(
        [partial(hammer, cache, first + n, 150) for n in range(2)], [partial(look, cache, of) for _ in range(2)]
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_last_change_counts_while_others_read_and_memory_is_short(tmp_path: Path, engine: str) -> None:
    with open_at(tmp_path, engine) as cache:
        assert hammer_in_threads(cache, 0, 2) == []
        assert cache.stats()["disk"]["hits"] > 100


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_that_change_the_same_keys_agree_with_what_is_on_disk(tmp_path: Path, engine: str) -> None:
    names = [f"shared{i}" for i in range(3)]
    with open_at(tmp_path, engine) as cache:

        def change(me: int) -> None:
            chance = random.Random(me)
            for turn in range(300):
                name = chance.choice(names)
                if chance.random() < 0.4:
                    cache.delete(name)
                else:
                    cache.put(name, value(name, turn * 4 + me))
                cache.get(chance.choice(names))

        threads = [threading.Thread(target=change, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        there = [cache.get(name) for name in names]
        cache.put_many({f"filler{i}": bytes(4000) for i in range(600)})  # they leave memory
        assert [cache.get(name) for name in names] == there
    with open_at(tmp_path, engine) as cache:
        assert [cache.get(name) for name in names] == there


def _process(path: str, first: int, results: Any) -> None:
    with open_at(Path(path), "btree") as cache:
        results.put(hammer_in_threads(cache, first, 4))


def test_two_processes_change_and_read_a_btree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_process, args=(str(tmp_path), first, results)) for first in (0, 2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=100) for _ in workers] == [[], []]
    for worker in workers:
        worker.join(30)


_WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_engines import open_at, value
cache = open_at(Path(sys.argv[1]), sys.argv[2])
turn = 0
while True:
    turn += 1
    key = f"k{turn % 50}"
    if turn % 7 == 0:
        cache.delete(key)
    else:
        cache.put(key, value(key, turn))
    print(turn, flush=True)
"""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shm_survives", [True, False])
def test_what_was_acknowledged_before_a_kill_is_there_or_is_a_miss(
    tmp_path: Path, engine: str, shm_survives: bool
) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path), engine, str(Path(__file__).parent)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 1500:
            break
    os.kill(writer.pid, signal.SIGKILL)
    done = int(line)
    for line in writer.stdout:
        done = int(line) if line.endswith("\n") else done
    writer.stdout.close()
    writer.wait()
    hits = 0
    with open_at(tmp_path, engine, shared=shm_survives) as cache:
        for i in range(50):
            found = cache.get(f"k{i}")
            turn = next(turn for turn in range(done, 0, -1) if turn % 50 == i)  # the last acknowledged one
            allowed = {turn}
            if (done + 1) % 50 == i:
                allowed.add(done + 1)
            if found is not None:
                hits += 1
                assert turn_of(f"k{i}", found) in {t for t in allowed if t % 7}, i
        assert hits >= 40
        cache.put("after", b"x")
        assert cache.get("after") == b"x"


_RIVAL = """
import random, sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_engines import RIVAL_KEYS, open_at, value
me = int(sys.argv[2])
chance = random.Random(me)
with open_at(Path(sys.argv[1]), "btree") as opened:
    cache = opened.namespace("rivals", quota="64KiB")
    for turn in range(1, 10**9):
        key = chance.choice(RIVAL_KEYS)
        if chance.random() < 0.1:
            cache.put_many({f"filler{me}/{turn}/{i}": bytes(4000) for i in range(20)})  # so that others leave memory
        began = time.monotonic_ns()
        if chance.random() < 0.25:
            cache.delete(key)
        else:
            cache.put(key, value(key, me * 10**6 + turn))
        print(key, me * 10**6 + turn, began, time.monotonic_ns(), flush=True)
"""
RIVAL_KEYS = [f"k{i}" for i in range(4)]


def test_processes_that_change_the_same_keys_and_are_killed_leave_the_last_change(tmp_path: Path) -> None:
    def start(me: int) -> subprocess.Popen[bytes]:
        with (tmp_path / f"said-{me}").open("wb") as said:
            command = [sys.executable, "-c", _RIVAL, str(tmp_path / "cache"), str(me), str(Path(__file__).parent)]
            return subprocess.Popen(command, stdout=said)

    def changes(me: int) -> list[tuple[str, int, int, int]]:
        lines = (line.split() for line in (tmp_path / f"said-{me}").read_text().split("\n")[:-1])
        return [(key, int(turn), int(began), int(ended)) for key, turn, began, ended in lines]

    seen: list[tuple[str, int, int]] = []  # key, when it was asked for, and the turn of what was found
    with open_at(tmp_path / "cache", "btree") as opened:
        cache = opened.namespace("rivals", quota="64KiB")

        def look() -> None:
            for key in RIVAL_KEYS:
                asked = time.monotonic_ns()
                found = cache.get(key)
                if found is not None:
                    seen.append((key, asked, turn_of(key, found)))

        rivals = {me: start(me) for me in (1, 2)}
        for newcomer in range(3, 8):
            until = time.monotonic() + 60
            while min(len(changes(me)) for me in rivals) < 40:
                look()
                assert time.monotonic() < until, "the processes change nothing"
                assert all(rival.poll() is None for rival in rivals.values())
            oldest = min(rivals)
            rivals[oldest].kill()
            rivals.pop(oldest).wait()
            for _ in range(20):
                look()
            rivals[newcomer] = start(newcomer)
        for rival in rivals.values():
            rival.kill()
            rival.wait()
        look()

    made = {turn: change for me in range(1, 8) for change in changes(me) for turn in [change[1]]}
    assert len(seen) > 500
    assert len({turn for _, _, turn in seen}) > 100
    for key, asked, turn in seen:
        if turn not in made:
            assert turn - 1 in made or turn % 10**6 == 1, "it was under way when its process was killed"
            continue
        assert made[turn][0] == key
        later = [change for change in made.values() if change[0] == key and made[turn][3] < change[2]]
        assert not [change for change in later if change[3] < asked], f"{key}: {turn} came back"


def test_a_second_process_is_told_that_lsm_is_for_one(tmp_path: Path) -> None:
    with open_at(tmp_path, "lsm") as cache:
        cache.put("a", b"x")
        program = (
            "import sys, kvstrata\n"
            "try: kvstrata.open(sys.argv[1], memory='1MiB', disk='64MiB', disk_engine='lsm')\n"
            "except kvstrata.errors.TierUnavailable as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
        )
        assert "is for one" in done.stdout
        assert cache.get("a") == b"x"


def _in_child(cache: kvstrata.Cache, engine: str) -> Any:
    if engine == "lsm":
        try:
            cache.get("a")
        except TierUnavailable as error:
            return str(error)
        return "no error"
    found = cache.get("a")
    cache.put("b", b"child")
    cache.close()
    return None if found is None else found.decode()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_uses_none_of_its_parents_handles(tmp_path: Path, engine: str) -> None:
    with open_at(tmp_path, engine) as cache:
        cache.put("a", b"parent")
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(writing, json.dumps(_in_child(cache, engine)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            said = json.loads(answer.read())
        os.waitpid(child, 0)
        assert ("one process" in said) if engine == "lsm" else (said == "parent")
        assert cache.get("a") == b"parent"
        assert cache.get("b") == (None if engine == "lsm" else b"child")
        cache.put("c", b"parent")
        assert cache.get("c") == b"parent"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [{"disk_policy": "lru"}, {"disk_write_limit": "1MiB/s"}, {"disk": "4MiB"}, {"disk": 0}, {"remote": "redis://x"}],
)
def test_what_an_engine_cannot_do_is_refused(tmp_path: Path, engine: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        open_at(tmp_path, engine, **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{"admission": "reused"}, {"write": "back"}, {"disk_quota": "1MiB"}])
def test_what_a_namespace_of_an_engine_cannot_do_is_refused(
    tmp_path: Path, engine: str, options: dict[str, Any]
) -> None:
    with open_at(tmp_path, engine) as cache, pytest.raises(ConfigError, match="disk_engine"):
        cache.namespace("n", **options)


def test_a_directory_is_of_one_engine(tmp_path: Path) -> None:
    with pytest.raises(UnknownOption):
        open_at(tmp_path, "tree")
    open_at(tmp_path, "btree").close()
    for other in ("lsm", "log"):
        with pytest.raises(ConfigError, match="'btree'"):
            open_at(tmp_path, other)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_that_fails_is_raised_and_leaves_memory_too(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstrata.tiers.base import StoreFault

    with open_at(tmp_path, engine) as cache:
        cache.put("a", b"old")
        store = cache.tiers.remotes.engine  # type: ignore[union-attr]

        def refuse(*_: Any, **__: Any) -> None:
            raise StoreFault("ENOSPC", "the disk is full", sent=False)

        with monkeypatch.context() as patched:
            patched.setattr(store, "write", refuse)
            for _ in range(5):
                with pytest.raises(TierUnavailable):
                    cache.put("a", b"new")
            assert cache.stats()["disk"]["breaker_opened"] >= 1
        assert cache.get("a") in (b"old", None)
