"""kvstrata as an L2 adapter: LMCache's own check and benchmark, its contract, its server, and vLLM above that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.processes import Process
from support.servers import Server, free_ports

from engines.conftest import PATIENCE_S, need
from kvstrata.errors import CacheClosed, ConfigError, TierUnavailable, UnknownOption

need("lmcache")
with warnings.catch_warnings():  # LMCache's, at its import
    warnings.simplefilter("ignore")
    import torch
    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.check.check_mode_test_l2_adapter import run_test_mode
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.internal_api import L2AdapterListener
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    from lmcache.v1.platform import consume_fd

    from kvstrata.integrations.lmcache import KVStrataL2

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

ELEMENTS = 32 << 10  # 64 KiB in 16 bits
LMCACHE = [sys.executable, "-c", "import sys; from lmcache.cli.main import main; sys.exit(main())"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "LMCACHE_DISABLE_BANNER": "1",
    "OMP_NUM_THREADS": "1",
}
PLUGIN = {"type": "plugin", "module_path": "kvstrata.integrations.lmcache", "class_name": "KVStrataL2"}
Make = Callable[..., "Driver"]


def key(number: int, *, model: str = "a/model", salt: str = "", rank: int = 0x01000100, group: int = 0) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"), model, rank, group, salt)


KEYS = [key(i) for i in range(12)]


def obj(fill: int = 0, *, dtype: torch.dtype = torch.bfloat16, elements: int = ELEMENTS) -> TensorMemoryObj:
    """An object as LMCache has them, all of whose elements are a number."""
    data = torch.full((elements,), fill, dtype=dtype)
    meta = MemoryObjMetadata(
        shape=data.shape, dtype=dtype, address=data.data_ptr(), phy_size=data.nbytes, fmt=MemoryFormat.KV_2LTD,
        ref_count=1, shapes=[data.shape], dtypes=[dtype],
    )  # fmt: skip
    return TensorMemoryObj(data, meta, parent_allocator=None)


def number_in(obj: TensorMemoryObj) -> int:
    values = obj.raw_data.unique()
    assert len(values) == 1, "an object has parts of several"
    return int(values[0])


class Listener(L2AdapterListener):  # type: ignore[misc]
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.stored: list[ObjectKey] = []
        self.accessed: list[ObjectKey] = []
        self.deleted: list[ObjectKey] = []

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        assert all(size >= 2 * ELEMENTS for size in sizes)
        self.stored += keys

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.deleted += keys


class Driver:
    """Calls an adapter as LMCache's controllers do: submits, waits for the event, and asks for the result."""

    def __init__(self, **params: Any) -> None:
        self.adapter = KVStrataL2(params)
        self.listener = Listener()
        self.adapter.register_listener(self.listener)
        self.cache = self.adapter._cache

    def wait(self, fd: int) -> None:
        assert select.select([fd], [], [], 60)[0], "no event"
        consume_fd(fd)

    def store(self, keys: Sequence[ObjectKey], objects: Sequence[TensorMemoryObj]) -> int:
        """Bytes that were written, -1 for a failure."""
        task = self.adapter.submit_store_task(list(keys), list(objects))
        self.wait(self.adapter.get_store_event_fd())
        done = self.adapter.pop_completed_store_tasks()
        assert list(done) == [task]
        assert done[task].is_successful() == (int(done[task]) >= 0)
        return int(done[task])

    def lookup(self, keys: Sequence[ObjectKey]) -> list[int]:
        """Positions that are there, and locked now."""
        task = self.adapter.submit_lookup_and_lock_task(list(keys), {})
        self.wait(self.adapter.get_lookup_and_lock_event_fd())
        return self._result(self.adapter.query_lookup_and_lock_result, task)

    def load(self, keys: Sequence[ObjectKey], objects: Sequence[TensorMemoryObj]) -> list[int]:
        """Positions that were loaded."""
        task = self.adapter.submit_load_task(list(keys), list(objects))
        self.wait(self.adapter.get_load_event_fd())
        return self._result(self.adapter.query_load_result, task)

    def _result(self, query: Callable[[int], Bitmap | None], task: int) -> list[int]:
        bitmap = query(task)
        assert bitmap is not None
        assert query(task) is None, "a result is given once"
        return list(bitmap.get_indices_list())

    def numbers(self, keys: Sequence[ObjectKey], **layout: Any) -> list[int | None]:
        """What is in the objects of those keys; None where there is none."""
        objects = [obj(-1, **layout) for _ in keys]
        loaded = self.load(keys, objects)
        return [number_in(objects[i]) if i in loaded else None for i in range(len(keys))]

    def settle(self) -> None:
        """Wait until nothing is brought up any more."""
        for pool in (self.adapter._fetching, self.adapter._holding):
            pool.shutdown(wait=True)

    def to_disk(self) -> None:
        self.cache.flush()
        self.cache.demote()

    def crowd_out(self) -> None:
        """Store so much else that everything leaves memory that may."""
        for number in range(1000, 1400):
            self.store([key(number)], [obj(1)])

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.adapter.report_status())


@pytest.fixture
def make(shm: Path, tmp_path: Path) -> Iterator[Make]:
    """Makes adapters at one path, and closes them; no pin may be left."""
    made: list[Driver] = []

    def make(**params: Any) -> Driver:
        made.append(Driver(**{"path": str(tmp_path / "cache"), "memory": "8MiB", "disk": "64MiB", **params}))
        return made[-1]

    yield make
    for driver in made:
        driver.settle()  # what is locked may be on its way
        with contextlib.suppress(CacheClosed):
            driver.cache.flush()
            driver.adapter.submit_unlock(KEYS * 4)  # what a test has locked
            stats = driver.cache.stats()["memory"]
            assert (stats["pins"], stats["reservations"], stats["allocator_faults"]) == (0, 0, 0)
        driver.adapter.close()


@pytest.fixture
def alone(make: Make) -> Driver:
    """One with 8 MiB of memory and nothing below: what is evicted is gone."""
    return make(path=None, disk=0)


# ---- LMCache's own


def test_lmcaches_own_check_of_adapters_passes(shm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = json.dumps({**PLUGIN, "adapter_params": {"path": str(tmp_path / "cache"), "memory": "32MiB"}})

    asyncio.run(run_test_mode("a/model", l2_adapter=[adapter], num_keys=8, obj_size=65_536))

    said = capsys.readouterr().out
    assert "Testing L2 adapter #0 (KVStrataL2)" in said
    assert "Validation: 8/8 correctly absent" in said
    assert "Validation: 8/8 found" in said
    assert "Validation (loaded): 8/8" in said
    assert "Validation (content): 8/8" in said
    assert not any(word in said for word in ("FAIL", "Failed", "timed out", "mismatch"))


def test_lmcaches_own_benchmark_verifies_what_it_loads(tmp_path: Path) -> None:
    adapter = json.dumps({**PLUGIN, "adapter_params": {"path": str(tmp_path / "cache"), "memory": "64MiB"}})
    options = ["--num-keys", "16", "--in-flight", "2", "--lookup-max-hit-rate", "1.0", "--no-skip-verify"]

    done = subprocess.run(
        [*LMCACHE, "bench", "l2", "--l2-adapter", adapter, *options],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Total success:                                                32") == 3, done.stdout


# ---- Its contract


def test_each_kind_of_task_signals_an_event_of_its_own(alone: Driver) -> None:
    adapter = alone.adapter
    fds = [adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()]
    assert len(set(fds)) == 3

    alone.store(KEYS, [obj(i) for i in range(12)])
    assert select.select(fds, [], [], 0)[0] == []
    adapter.submit_load_task(KEYS, [obj() for _ in KEYS])
    alone.wait(fds[2])
    assert select.select(fds, [], [], 0)[0] == []


def test_objects_come_back_and_bitmaps_say_which(make: Make) -> None:
    driver = make()
    some = [i for i in range(12) if i not in (3, 7)]
    assert driver.store([KEYS[i] for i in some], [obj(i) for i in some]) == len(some) * 2 * ELEMENTS

    assert driver.lookup(KEYS) == some
    assert driver.numbers(KEYS) == [i if i in some else None for i in range(12)]
    assert driver.listener.stored == driver.listener.accessed == [KEYS[i] for i in some]
    assert driver.store(KEYS, [obj(i) for i in range(12)]) == 2 * 2 * ELEMENTS  # what was missing
    driver.to_disk()
    assert driver.numbers(KEYS) == list(range(12))


def test_keys_that_differ_in_anything_are_other_objects(alone: Driver) -> None:
    others = [key(0, model="b"), key(0, salt="s"), key(0, rank=0x02010201), key(0, group=1), key(1)]
    alone.store(KEYS[:1], [obj(1)])

    assert alone.lookup([KEYS[0], *others]) == [0]


def test_what_is_locked_stays_until_each_lock_is_let_go(alone: Driver) -> None:
    alone.store(KEYS[:2], [obj(5), obj(6)])
    assert alone.lookup(KEYS[:1]) == [0]
    assert alone.lookup(KEYS[:1]) == [0]
    alone.adapter.submit_unlock(KEYS[:1])
    assert (alone.status["locked_keys"], alone.status["locks"]) == (1, 1)

    alone.crowd_out()
    assert alone.numbers(KEYS[:2]) == [5, None]

    alone.adapter.submit_unlock(KEYS[:1])
    assert (alone.status["locked_keys"], alone.status["locked_bytes"]) == (0, 0)
    alone.crowd_out()
    assert alone.numbers(KEYS[:1]) == [None]


def test_what_is_locked_on_disk_is_brought_where_it_cannot_be_evicted(make: Make) -> None:
    driver = make(memory="4MiB", disk="8MiB")
    driver.store(KEYS, [obj(i) for i in range(12)])
    driver.to_disk()
    assert driver.cache.stats()["memory"]["pins"] == 0

    assert driver.lookup(KEYS) == list(range(12))
    driver.adapter._holding.submit(lambda: None).result(60)
    driver.adapter._fetching.submit(lambda: None).result(60)
    driver.adapter._holding.submit(lambda: None).result(60)
    assert driver.cache.stats()["memory"]["pins"] == 12

    for number in range(1000, 1400):  # more than memory and disk together hold
        driver.store([key(number)], [obj(1)])
    assert driver.numbers(KEYS) == list(range(12))


def test_what_is_let_go_before_it_was_read_is_not(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make()
    driver.store(KEYS, [obj(i) for i in range(12)])
    driver.to_disk()
    locks = driver.adapter._locks

    def let_go(names: Sequence[bytes]) -> list[bytes]:
        locks.unlock(names)  # LMCache has all of them itself
        return []

    monkeypatch.setattr(locks, "unpinned", let_go)
    assert driver.lookup(KEYS) == list(range(12))
    driver.settle()
    assert driver.cache.stats()["memory"]["memory_record_bytes"] == 0


def test_no_more_than_the_limit_is_locked_and_the_rest_counts_as_absent(make: Make) -> None:
    driver = make(lock_limit=5 * (2 * ELEMENTS + 16))
    driver.store(KEYS, [obj(i) for i in range(12)])

    assert driver.lookup(KEYS) == [0, 1, 2, 3, 4]
    assert driver.status["locks_refused"] == 7
    assert driver.lookup(KEYS[:5]) == [0, 1, 2, 3, 4]  # once more


LOCK = """
import warnings
warnings.simplefilter("ignore")
from engines.test_lmcache import KEYS, Driver, obj
driver = Driver(**params)
driver.store(KEYS, [obj(i) for i in range(12)])
locked = driver.lookup(KEYS)
"""


def test_locks_of_a_dead_client_go(make: Make, tmp_path: Path) -> None:
    params = {"path": str(tmp_path / "cache"), "memory": "8MiB", "disk": 0}
    with Process(patience=PATIENCE_S, OMP_NUM_THREADS="1") as other:
        other.run(LOCK, params=params)
        driver = make(**params)
        driver.crowd_out()
        assert other.eval("locked") == list(range(12))
        assert driver.numbers(KEYS) == list(range(12))
        everything = obj(7, elements=15 << 18)  # 7.5 of 8 MiB
        assert driver.store([key(99)], [everything]) == -1
        other.kill()

    driver.adapter._blocks.clear()
    assert driver.store([key(99)], [everything]) == 15 << 19  # who finds no room looks for the dead


def test_delete_spares_what_is_locked_and_tells_listeners(make: Make) -> None:
    driver = make()
    driver.store(KEYS, [obj(i) for i in range(12)])
    full = driver.adapter.get_usage().total_bytes_used
    assert driver.lookup(KEYS[:1]) == [0]

    driver.adapter.delete([*KEYS[:4], key(99)])

    assert driver.listener.deleted == KEYS[1:4]
    assert driver.numbers(KEYS[:5]) == [0, None, None, None, 4]
    assert driver.adapter.get_usage().total_bytes_used == full * 9 // 12
    driver.adapter.submit_unlock(KEYS[:1])
    driver.adapter.delete(KEYS[:1])
    assert driver.numbers(KEYS[:1]) == [None]


def test_lists_and_usage_are_true_also_after_a_restart(make: Make) -> None:
    keys = [key(i, salt="ab"[i % 2], model=("m", "n")[i % 3 == 0]) for i in range(12)]
    driver = make()
    driver.store(keys, [obj(i) for i in range(12)])

    def check(driver: Driver) -> None:
        usage = driver.adapter.get_usage()
        assert dict(usage.bytes_by_cache_salt) == {"a": usage.total_bytes_used // 2, "b": usage.total_bytes_used // 2}
        assert 1 <= usage.total_bytes_used / (12 * 2 * ELEMENTS) < 1.15  # headers and padding
        assert usage.total_capacity_bytes == 64 << 20
        listed, cursor = [], None
        while True:
            page = driver.adapter.list_l2_keys(page_size=5, cursor=cursor)
            listed += page.entries
            cursor = page.next_page_token
            if cursor is None:
                break
        assert {entry.key.to_object_key() for entry in listed} == set(keys)
        assert sum(entry.size_bytes for entry in listed) == usage.total_bytes_used
        only = driver.adapter.list_l2_keys(model_name="n")
        assert {entry.key.to_object_key() for entry in only.entries} == {k for k in keys if k.model_name == "n"}

    check(driver)
    driver.adapter.close()
    again = make()
    check(again)
    with pytest.raises(ValueError, match="page_size"):
        again.adapter.list_l2_keys(page_size=0)
    with pytest.raises(ValueError, match="hex"):
        again.adapter.list_l2_keys(cursor="not one")


# ---- Faults


def test_a_corrupted_object_is_never_a_hit_and_can_be_stored_again(make: Make, tmp_path: Path) -> None:
    driver = make()
    driver.store(KEYS, [obj(100 + i) for i in range(12)])
    driver.adapter.close()
    needle = bytes(torch.full((256,), 105, dtype=torch.bfloat16).view(torch.uint8).numpy())
    damaged = 0
    for file in (tmp_path / "cache").rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        if (at := data.find(needle)) >= 0:
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            damaged += 1
    assert damaged == 1

    again = make()
    assert again.numbers(KEYS) == [100 + i if i != 5 else None for i in range(12)]
    assert again.lookup(KEYS) == [i for i in range(12) if i != 5]
    assert again.store(KEYS[5:6], [obj(105)]) == 2 * ELEMENTS
    assert again.numbers(KEYS[5:6]) == [105]


def test_an_object_of_another_layout_is_not_loaded_and_makes_room_for_the_right_one(alone: Driver) -> None:
    alone.store(KEYS[:2], [obj(1), obj(2)])

    assert alone.numbers(KEYS[:1], dtype=torch.float16) == [None]  # as many bytes
    assert alone.numbers(KEYS[1:2], elements=ELEMENTS // 2) == [None]
    assert alone.listener.deleted == KEYS[:2]
    alone.store(KEYS[:1], [obj(3, dtype=torch.float16)])
    assert alone.numbers(KEYS[:1], dtype=torch.float16) == [3]


def test_a_full_cache_fails_the_store_and_keeps_what_it_has(make: Make) -> None:
    alone = make(path=None, disk=0, lock_limit="8MiB")
    keys = [key(i) for i in range(256)]

    assert alone.store(keys, [obj(i % 128) for i in range(256)]) == -1

    there = alone.lookup(keys)
    assert there == list(range(len(there)))
    assert 10 < len(there) < 256
    assert alone.listener.stored == keys[: len(there)]
    assert alone.numbers(keys) == [i % 128 if i in there else None for i in range(256)]
    assert alone.status["errors"] == 0
    alone.adapter.submit_unlock(keys)


def test_listeners_hear_of_what_the_cache_has_evicted_itself(alone: Driver) -> None:
    alone.store(KEYS, [obj(i) for i in range(12)])
    alone.crowd_out()

    assert alone.lookup(KEYS[:3]) == []
    assert alone.listener.deleted == KEYS[:3]
    usage = alone.adapter.get_usage()
    assert set(KEYS) <= set(alone.listener.deleted)
    known = set(alone.listener.stored) - set(alone.listener.deleted)
    assert len(known) == len(alone.adapter.list_l2_keys(page_size=10_000).entries)
    assert usage.total_bytes_used <= 8 << 20


WRITE = """
import warnings
warnings.simplefilter("ignore")
from engines.test_lmcache import Driver, key, obj
driver = Driver(**params)
for round in range(10_000):
    driver.store([key(100 * round + i) for i in range(20)], [obj(i) for i in range(20)])
"""


def test_a_server_killed_while_storing_leaves_only_whole_objects(make: Make, tmp_path: Path) -> None:
    params = {"path": str(tmp_path / "cache"), "memory": "8MiB", "disk": "64MiB"}
    with Process(patience=PATIENCE_S, OMP_NUM_THREADS="1") as other:
        other.start(WRITE, params=params)
        driver = make(**params)
        while not driver.lookup([key(1000)]):
            time.sleep(0.01)
        driver.adapter.submit_unlock([key(1000)])
        other.kill()

    whole = 0
    for start in range(0, 4000, 100):
        keys = [key(start + i) for i in range(20)]
        for i, found in enumerate(driver.numbers(keys)):
            assert found in (None, i)
            whole += found is not None
    assert whole > 0
    assert driver.store(KEYS, [obj(i) for i in range(12)]) >= 0


def test_a_failing_cache_is_a_miss_that_is_counted_and_soon_not_asked(
    alone: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone.store(KEYS, [obj(i) for i in range(12)])

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise TierUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(alone.adapter._blocks.ns, "_space", Broken())
        for _ in range(10):
            assert alone.lookup(KEYS) == []
            assert alone.numbers(KEYS) == [None] * 12
    assert alone.status["is_healthy"] is False
    assert (alone.status["breaker"], alone.status["errors"] > 0) == ("open", True)


def test_an_object_whose_memory_is_gone_fails_alone(alone: Driver) -> None:
    class Torn(TensorMemoryObj):  # type: ignore[misc]
        @property
        def byte_array(self) -> memoryview:
            raise RuntimeError("torn down")

    torn = Torn(obj().raw_data, obj().metadata, parent_allocator=None)
    assert alone.store(KEYS[:1], [torn]) == -1
    alone.store(KEYS[:2], [obj(1), obj(2)])
    assert alone.load(KEYS[:2], [torn, obj()]) == [1]
    assert alone.numbers(KEYS[:2]) == [1, 2]


def test_close_lets_go_of_everything_and_may_come_twice(make: Make) -> None:
    driver = make()
    driver.store(KEYS, [obj(i) for i in range(12)])
    driver.lookup(KEYS)
    fd = driver.adapter.get_load_event_fd()

    driver.adapter.close()
    driver.adapter.close()

    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    assert make().lookup(KEYS) == list(range(12))


def test_listeners_are_not_told_of_ever_more_without_a_look_what_has_left(
    alone: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.integrations.lmcache._TOLD_UNCHECKED", 200)
    alone.adapter._told_limit = 200
    alone.crowd_out()

    assert len(alone.adapter._told) <= 201
    assert set(alone.adapter._told) >= set(alone.adapter._blocks.keys())


def test_options_that_cannot_be_used_are_said_at_the_start() -> None:
    with pytest.raises(UnknownOption, match="lock_limit"):
        KVStrataL2({"lock_limits": 5})
    with pytest.raises(ConfigError, match="threads"):
        KVStrataL2({"threads": 0})


# ---- Its server, and vLLM above


class LMCacheServer(Server):
    """`lmcache server` with kvstrata below it."""

    def __init__(self, directory: Path, name: str, cache: Path) -> None:
        self.zmq, http = free_ports(2)
        directory.mkdir()
        adapter = {**PLUGIN, "adapter_params": {"path": str(cache), "memory": "128MiB", "disk": "512MiB"}}
        arguments = [
            *LMCACHE, "server", "--host", "127.0.0.1", "--port", str(self.zmq), "--http-host", "127.0.0.1",
            "--http-port", str(http), "--l1-size-gb", "0.25", "--chunk-size", "64", "--eviction-policy", "LRU",
            "--supported-transfer-mode", "engine_driven", "--shm-name", name, "--l2-adapter", json.dumps(adapter),
        ]  # fmt: skip
        super().__init__(arguments, http, directory)  # which listens last

    def ask(self, path: str, body: Any = None, method: str = "GET") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    @property
    def adapter(self) -> dict[str, Any]:
        (status,) = self.ask("/status")["storage_manager"]["l2_adapters"]
        return dict(status)

    def wait_for(self, name: str, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.adapter[name] < count:
            assert time.monotonic() < deadline, self.adapter
            time.sleep(0.05)


@contextlib.contextmanager
def running_vllm(with_vllm: Process, model: Path, port: int) -> Iterator[Process]:
    """A vLLM, `engine` in another process, which is killed at the end: without a server it may wait long."""
    with with_vllm.fork() as process:
        start = "from engines.lmcache_engine import Engine\nengine = Engine(model, port)"
        process.run(start, model=str(model), port=port)
        try:
            yield process
        finally:
            process.kill()


def test_a_vllm_finds_its_prefix_in_kvstrata_after_lmcaches_server_was_killed(
    shm: Path, tmp_path: Path, model: Path, with_vllm: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.servers.PATIENCE_S", PATIENCE_S)
    for name in ("PYTHONPATH", "LMCACHE_DISABLE_BANNER", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    cache, shm_name = tmp_path / "cache", f"{shm.name}-l1"
    first, second = (LMCacheServer(tmp_path / name, shm_name, cache) for name in ("first", "second"))
    try:
        first.start()
        with running_vllm(with_vllm, model, first.zmq) as vllm:
            cold = vllm.eval("engine.tokens(engine.prompt(0, 400))")
            assert vllm.eval("engine.loaded_tokens()") == 0
            first.wait_for("stored_blocks", 6)  # of 64 tokens
            vllm.start("for i in range(4): engine.tokens(engine.prompt(0, 400, f'And what about {i}?' * 20))")
            first.wait_for("stored_blocks", 8)
            first.kill()  # while it is storing

        second.start()
        listed = second.ask("/cache/objects?page_size=100")["entries"]
        assert len(listed) >= 6
        with running_vllm(with_vllm, model, second.zmq) as vllm:
            assert vllm.eval("engine.tokens(engine.prompt(0, 400))") == cold
            assert vllm.eval("engine.loaded_tokens()") == 6 * 64
            status = second.adapter
            assert (status["loaded_blocks"], status["missed_blocks"], status["errors"]) == (6, 0, 0)
            assert (status["is_healthy"], status["locked_keys"]) == (True, 0)

        keys = [entry["key"] for entry in listed]
        assert second.ask("/cache/objects", {"keys": keys}, "DELETE")["ok"] is True
        assert second.ask("/cache/objects")["entries"] == []
    finally:
        for server in (first, second):
            server.stop()
