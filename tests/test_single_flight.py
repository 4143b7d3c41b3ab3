"""What several want at the same time is loaded from the disk once, and computed once, whoever they are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.processes import Process

import kvstrata
from kvstrata import _core
from kvstrata.errors import ConfigError

OPTIONS = {"memory": "16MiB", "disk": "64MiB"}


# ---- Loads


def test_threads_that_miss_the_same_keys_read_each_once(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        keys = [f"key {i}" for i in range(40)]
        cache.put_many({key: key.encode() * 10_000 for key in keys})
        cache.flush()
        cache.demote()
        together = threading.Barrier(4)

        def load(_: int) -> list[bytes]:
            together.wait()
            return cache.get_many(keys)

        with ThreadPoolExecutor(4) as pool:
            for values in pool.map(load, range(4)):
                assert values == [key.encode() * 10_000 for key in keys]
        assert cache.stats()["disk"]["loaded_records"] == 40


def test_a_key_asked_for_twice_at_once_is_found_twice(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.put("key", b"value")
        cache.flush()
        cache.demote()
        assert cache.get_many(["key", "key"]) == [b"value"] * 2


def test_who_finds_a_key_being_loaded_elsewhere_waits_for_it(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache, Process() as other:
        cache.put("key", b"value" * 1000)
        cache.flush()
        cache.demote()
        store = cache.tiers.live_store()
        space = cache._space.id
        (location,) = store.find_on_disk(space, ["key"])
        assert location is not None
        entry, seq, _segment, _offset, length, _encoded = location
        load = store.begin_load(space, "key", entry, seq, length)
        assert store.begin_load(space, "key", entry, seq, length) is _core.LOADING
        other.run("cache = kvstrata.open(path, **options)", path=tmp_path, options=OPTIONS)
        other.start("value = cache.get('key')")
        load.abort()  # it comes to nothing: the other one has to read it
        other.finish()
        assert other.eval("value") == b"value" * 1000
        assert other.eval("cache.stats()['disk']['loaded_records']") == 1
        assert cache.get("key") == b"value" * 1000
        assert cache.stats()["disk"]["loaded_records"] == 0


def test_what_a_process_was_loading_when_it_was_killed_is_loaded_by_the_next(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.put("key", b"value" * 1000)
        cache.flush()
        cache.demote()
        with Process() as other:
            other.run("cache = kvstrata.open(path, **options)", path=tmp_path, options=OPTIONS)
            other.run(
                "store = cache.tiers.live_store(); entry, seq, _, _, length, _ = store.find_on_disk(1, ['key'])[0]"
            )
            other.run("load = store.begin_load(1, 'key', entry, seq, length)")
            assert other.eval("type(load).__name__") == "Write"
            other.kill()
        assert cache.get("key") == b"value" * 1000
        assert cache.stats()["disk"]["loaded_records"] == 1


# ---- Computations


def test_a_value_that_is_there_is_not_computed() -> None:
    with kvstrata.open(memory="2MiB") as cache:
        cache.put("key", b"value")
        assert cache.get_or_compute("key", lambda: pytest.fail("computed")) == b"value"


def test_threads_that_miss_the_same_key_compute_it_once() -> None:
    with kvstrata.open(memory="2MiB") as cache:
        calls = []
        together = threading.Barrier(8)

        def compute() -> bytearray:
            calls.append(threading.get_ident())
            return bytearray(b"value")

        def ask(_: int) -> bytes:
            together.wait()
            return cache.get_or_compute("key", compute)

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(8))) == {b"value"}
        assert len(calls) == 1


def test_processes_that_miss_the_same_key_compute_it_once(shm: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Process() as one, Process() as two:
        for process in (one, two):
            process.run(
                "import time; cache = kvstrata.open(path, **options); calls = 0", path=tmp_path / "c", options=OPTIONS
            )
            process.run(
                "def compute():\n"
                "    global calls\n"
                "    calls += 1\n"
                "    while not go.exists(): time.sleep(0.001)\n"
                "    return name",
                go=go,
                name=b"of one" if process is one else b"of two",
            )
            process.start("value = cache.get_or_compute('key', compute)")
        go.touch()
        one.finish()
        two.finish()
        assert one.eval("value") == two.eval("value")
        assert one.eval("calls") + two.eval("calls") == 1


def test_when_the_computing_process_is_killed_another_computes(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache, Process() as other:
        other.run("cache = kvstrata.open(path, **options)", path=tmp_path, options=OPTIONS)
        assert other.eval("cache._space.promise('key', 3_600_000) is not None")
        assert cache._space.promise("key", 1000) is None
        other.kill()
        assert cache.get_or_compute("key", lambda: b"mine", lease=3600) == b"mine"


def test_a_lease_that_has_run_out_is_anothers(shm: Path) -> None:
    with kvstrata.open(memory="2MiB") as cache:
        assert cache._space.promise("key", 1) is not None
        assert cache.get_or_compute("key", lambda: b"mine") == b"mine"


def test_an_exception_goes_to_its_caller_and_the_next_one_computes() -> None:
    with kvstrata.open(memory="2MiB") as cache:
        with pytest.raises(ZeroDivisionError):
            cache.get_or_compute("key", lambda: 1 // 0)  # type: ignore[arg-type,return-value]
        assert cache.get_or_compute("key", lambda: b"value") == b"value"
        with pytest.raises(ConfigError, match="lease"):
            cache.get_or_compute("other", lambda: b"value", lease=0)


def test_a_value_for_which_there_is_no_room_is_returned_all_the_same() -> None:
    with kvstrata.open(memory="2MiB") as cache:
        assert cache.get_or_compute("key", lambda: bytes(4 << 20)) == bytes(4 << 20)
        assert "key" not in cache


def test_as_many_promises_as_anybody_makes_harm_nobody() -> None:
    with kvstrata.open(memory="2MiB") as cache:
        tokens = [(f"key {i}", cache._space.promise(f"key {i}", 60_000)) for i in range(5000)]
        assert all(token is not None for _, token in tokens)  # where the table is full, everybody may
        for key, token in tokens:
            assert token is not None
            cache._space.withdraw(key, token)
        assert cache._space.promise("key 1", 60_000) is not None
        assert cache._space.promise("key 1", 60_000) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [0, 6, 4 << 20], ids=["empty", "small", "without room"])
@pytest.mark.parametrize("step", [1, 2], ids=["contiguous", "not contiguous"])
def test_a_tensor_is_returned_as_a_get_returns_it(dtype: str, count: int, step: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.arange(count, dtype=torch.float32).to(getattr(torch, dtype))[::step]
    expected = tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
    with kvstrata.open(memory="2MiB") as cache:
        assert cache.get_or_compute("key", lambda: tensor) == expected
        assert cache.get("key") == (None if count == 4 << 20 else expected)
