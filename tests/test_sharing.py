"""One cache in several processes: attaching, disagreeing, forking, leaving."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import OpenCache
from support.processes import Process

import kvstrata
from kvstrata.errors import ConfigMismatch

OPEN = "cache = kvstrata.open(directory, memory='8MiB', disk=disk)"


def in_a_fork(work: Callable[[], bool]) -> bool:
    """Run `work` in a forked child, which ends without any cleaning up; returns what it returned."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("disk", [0, "32MiB"])
def test_processes_that_open_one_path_share_one_cache(open_cache: OpenCache, tmp_path: Path, disk: str | int) -> None:
    mine = open_cache(disk=disk)
    mine.put("from here", b"1")
    with Process() as other:
        other.run(OPEN, directory=tmp_path / "cache", disk=disk)
        assert other.eval("cache.get('from here')") == b"1"
        other.run("cache.put('from there', bytes(100_000)); cache.delete('from here')")
        assert mine.get("from there") == bytes(100_000)
        assert "from here" not in mine
        other.run("cache.close()")
    assert mine.get("from there") == bytes(100_000)


def test_the_last_one_out_removes_the_shared_memory(open_cache: OpenCache, shm: Path, tmp_path: Path) -> None:
    mine = open_cache()
    with Process() as other:
        other.run(OPEN, directory=tmp_path / "cache", disk=0)
        mine.close()
        assert len(list(shm.iterdir())) == 1
        other.run("cache.close()")
    assert list(shm.iterdir()) == []


def test_a_process_that_just_exits_leaves_nothing(shm: Path, tmp_path: Path) -> None:
    with Process() as other:
        other.run(OPEN, directory=tmp_path / "cache", disk="32MiB")
        other.run("cache.put('a', b'1')")
    assert list(shm.iterdir()) == []
    with kvstrata.open(tmp_path / "cache", memory="8MiB", disk="32MiB") as cache:
        assert cache.get("a") == b"1"


def test_options_that_disagree_are_refused_with_both_values(open_cache: OpenCache, tmp_path: Path) -> None:
    open_cache(disk=0)
    with pytest.raises(ConfigMismatch, match=r"memory: open with 8388608, asked for 16777216"):
        open_cache(memory="16MiB", disk=0)
    with pytest.raises(ConfigMismatch, match=r"disk: open with 0, asked for 67108864"):
        open_cache(disk="64MiB")
    open_cache(disk=0).put("a", b"1")


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
def test_an_exclusive_cache_has_one_process_only(open_cache: OpenCache, first: bool, second: bool) -> None:
    cache = open_cache(shared=first)
    with pytest.raises(ConfigMismatch, match="already open"):
        open_cache(shared=second)
    cache.close()
    open_cache(shared=second).put("a", b"1")


def test_namespaces_that_disagree_are_refused(open_cache: OpenCache) -> None:
    first, second = open_cache(), open_cache()
    first.namespace("blocks", immutable=True, quota="1MiB")
    with pytest.raises(ConfigMismatch, match="immutable=True"):
        second.namespace("blocks", quota="1MiB")
    with pytest.raises(ConfigMismatch, match="quota 1048576"):
        second.namespace("blocks", immutable=True, quota="2MiB")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # a fork beside threads, which is the point
@pytest.mark.parametrize("options", [{"path": None}, {}, {"disk": "32MiB"}], ids=["private", "shared", "disk"])
def test_a_forked_child_shares_the_cache_from_its_first_use(open_cache: OpenCache, options: dict[str, object]) -> None:
    cache = open_cache(**options)
    ns = cache.namespace("blocks", immutable=True)
    ns.put("a", bytes(100_000))

    def child() -> bool:
        if ns.get("a") != bytes(100_000):
            return False
        cache.put("from the child", b"2")
        cache.flush()
        cache.close()
        return True

    assert in_a_fork(child)
    assert cache.get("from the child") == b"2"
    assert cache.stats()["memory"]["clients"] == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_childs_end_does_not_end_the_parents_pin(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("a", bytes(1000))
    with cache.pin("a") as view:

        def child() -> bool:
            return bytes(view) == bytes(1000)

        assert in_a_fork(child)
        cache.delete("a")
        assert cache.stats()["memory"]["pins"] == 1
        assert bytes(view) == bytes(1000)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_parents_pin_gives_a_child_nothing_to_read(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("a", bytes(1000))
    pin = cache.pin("a")

    def child() -> bool:
        for read in (memoryview, len, lambda pin: pin.__enter__()):
            with pytest.raises(ValueError, match="another process's"):
                read(pin)
        return cache.get("a") == bytes(1000)

    assert in_a_fork(child)
    assert bytes(memoryview(pin)) == bytes(1000)
    pin.release()


def _sum_of(cache: kvstrata.Cache, keys: list[str]) -> int:
    return sum(len(value) for value in cache.get_many(keys))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_workers_of_multiprocessing_use_the_cache_of_their_parent(open_cache: OpenCache) -> None:
    cache = open_cache()
    keys = [f"sample {i}" for i in range(50)]
    cache.put_many({key: bytes(i) for i, key in enumerate(keys)})
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=lambda: os._exit(_sum_of(cache, keys) == 1225)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [1, 1, 1]
