"""Loads from tiers elsewhere: each once however many want it, and none that takes longer than computing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OpenCache
from support.processes import Process
from support.servers import valkey_server
from support.stores import MemoryStore
from typer.testing import CliRunner

import kvstrata
from kvstrata import KVLayout, PrefixCache
from kvstrata.cli import app
from kvstrata.movement import single_flight
from kvstrata.remote_url import RemoteURL
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.keyed import KeyedTier

PATIENCE_S = 30.0
URL = "redis://there"


class Store(MemoryStore):
    """Counts how often each record is read; reads of records wait for the gate, and take time of a clock of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[bytes, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()
        self.now = 0.0
        self.seconds = 0.0

    def read(self, names: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        found = super().read(names, timeout_s)
        records = [name for name in names if name[25:26] == b"r"]
        for name in records:
            self.reads[name] = self.reads.get(name, 0) + 1
        if records:
            self.reading.set()
            assert self.gate.wait(PATIENCE_S)
        self.now += self.seconds * sum(value is not None for value in found)
        return found


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(RemoteURL, "open", lambda url: KeyedTier(store, lookup_s=PATIENCE_S))
    return store


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---- Once for all who want it


def test_threads_that_miss_the_same_keys_fetch_each_once(open_cache: OpenCache, store: Store, tmp_path: Path) -> None:
    keys = [f"{i}" for i in range(20)]
    a = open_cache(tmp_path / "a", remote=URL)
    a.put_many({key: key.encode() for key in keys})
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL)
    store.gate.clear()
    got: list[Any] = []
    first = threading.Thread(target=lambda: got.append(b.get_many(keys)))
    first.start()
    assert store.reading.wait(PATIENCE_S)  # it is fetching all of them
    threads = [threading.Thread(target=lambda: got.append(b.get_many(keys[::-1])[::-1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    store.gate.set()
    for thread in (first, *threads):
        thread.join()
    assert got == [[key.encode() for key in keys]] * 9
    assert list(store.reads.values()) == [1] * 20


def test_who_waits_for_what_another_fetches_is_counted(
    open_cache: OpenCache, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    class Time:
        monotonic = time.monotonic

        @staticmethod
        def sleep(seconds: float) -> None:
            waiting.set()
            time.sleep(seconds)

    monkeypatch.setattr(single_flight, "time", Time)
    cache = open_cache(tmp_path / "a", remote=URL)
    token = cache._space.promise("key", 3_600_000, True)
    assert token is not None
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(cache.get("key")))
    reader.start()
    assert waiting.wait(PATIENCE_S)
    cache.put("key", b"value")
    reader.join()
    cache._space.withdraw("key", token, True)
    assert got == [b"value"]
    assert cache.stats()["remote"][0]["shared_lookups"] == 1
    assert not any(b"key" in name for name in store.reads)


def test_processes_that_miss_the_same_key_fetch_it_once(open_cache: OpenCache, tmp_path: Path) -> None:
    import valkey

    size = 4 << 20
    with valkey_server() as server, valkey.Valkey(port=server.port) as client:
        url = f"unix://{server.directory}/socket?lookup_timeout=20"
        value = np.random.default_rng(0).bytes(size)
        a = open_cache(tmp_path / "a", memory="32MiB", remote=url)
        a.put("key", value)
        a.flush()
        b = open_cache(tmp_path / "b", memory="32MiB", remote=url)
        with Process() as one, Process() as two, Process() as three:
            processes = (one, two, three)
            for each in processes:
                each.run(
                    "import kvstrata; cache = kvstrata.open(path, memory='32MiB', disk=0, remote=url); cache.get('x')",
                    path=str(tmp_path / "b"), url=url,
                )  # fmt: skip
            before = client.info("stats")["total_net_output_bytes"]
            server.pause()  # until all of them ask
            for each in processes:
                each.start("value = cache.get('key')")
            wait_for(lambda: b._space.promise("key", 0, True) is None)  # one of them does
            server.resume()
            for each in processes:
                each.finish()
                assert each.eval("len(value)") == size
            assert client.info("stats")["total_net_output_bytes"] - before < 2 * size
            for each in processes:
                each.run("cache.close()")


def test_when_the_process_that_was_fetching_is_killed_another_fetches(open_cache: OpenCache, tmp_path: Path) -> None:
    with valkey_server() as server, Process() as other:
        url = f"unix://{server.directory}/socket?lookup_timeout={PATIENCE_S}"
        a = open_cache(tmp_path / "a", remote=url)
        a.put("key", b"value")
        a.flush()
        b = open_cache(tmp_path / "b", remote=url)
        other.run("import kvstrata; cache = kvstrata.open(path, memory=memory, disk=0, remote=url)",
                  path=str(tmp_path / "b"), url=url, memory=b.options.memory)  # fmt: skip
        assert other.eval("cache._space.promise('key', 3_600_000, True) is not None")
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.append(b.get("key")))
        reader.start()
        other.kill()
        reader.join()
        assert got == [b"value"]


def test_who_is_fetching_and_does_not_come_back_is_waited_for_no_longer_than_for_the_server(
    open_cache: OpenCache, tmp_path: Path
) -> None:
    with valkey_server() as server:
        a = open_cache(tmp_path / "a", remote=f"unix://{server.directory}/socket")
        a.put("key", b"value")
        a.flush()
        b = open_cache(tmp_path / "b", remote=f"unix://{server.directory}/socket?lookup_timeout=1")
        assert b._space.promise("key", 3_600_000, True) is not None
        assert b.get("key") == b"value"


def test_a_key_asked_for_twice_at_once_is_found_twice(open_cache: OpenCache, store: Store, tmp_path: Path) -> None:
    a = open_cache(tmp_path / "a", remote=URL)
    a.put("key", b"value")
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL)
    assert b.get_many(["key", "absent", "key", "absent"]) == [b"value", None, b"value", None]


def test_who_computes_a_value_may_fetch_it_first(open_cache: OpenCache, store: Store, tmp_path: Path) -> None:
    a = open_cache(tmp_path / "a", remote=URL)
    a.put("key", b"there")
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL)
    assert b.get_or_compute("key", lambda: b"computed") == b"there"
    assert b.get_or_compute("another", lambda: b"computed") == b"computed"


def test_what_is_elsewhere_can_be_warmed(open_cache: OpenCache, store: Store, tmp_path: Path) -> None:
    keys = [f"{i}" for i in range(100)]
    a = open_cache(tmp_path / "a", remote=URL)
    a.put_many({key: key.encode() * 100 for key in keys})
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL)
    done = b.warm([*keys, "absent"])
    assert (done.wanted, done.present, done.loaded, done.absent, done.complete) == (101, 0, 100, 1, True)
    reads = dict(store.reads)
    assert b.get_many(keys) == [key.encode() * 100 for key in keys]
    assert store.reads == reads
    small = open_cache(tmp_path / "c", remote=URL)
    for i in range(100):
        a.put(f"large {i}", bytes(200_000))
        a.flush()
    done = small.warm([f"large {i}" for i in range(100)])
    assert not done.complete
    assert done.nbytes < small.options.memory + 16 * 200_000  # a batch more than fits at most


def test_the_command_warms_from_elsewhere(
    open_cache: OpenCache, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = open_cache(tmp_path / "a", remote=URL)
    a.put_many({"1": b"one", "2": b"two"})
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL)
    (tmp_path / "keys").write_text("1\n2\nabsent\n")
    monkeypatch.setenv("KVSTRATA_REMOTE", URL)
    sizes = ["--memory", str(b.options.memory), "--disk", str(b.options.disk)]
    result = CliRunner().invoke(app, ["warm", str(tmp_path / "b"), "--keys", str(tmp_path / "keys"), *sizes])
    assert result.exit_code == 0, result.output
    assert "2 of 3 records loaded (6 bytes" in result.stdout
    assert [pin is not None for pin in b._space.pin_many(["1", "2"])[0]] == [True, True]


# ---- Ahead of who will ask


def test_a_prefetch_brings_what_is_on_disk_and_what_is_elsewhere(
    open_cache: OpenCache, store: Store, tmp_path: Path
) -> None:
    keys = [f"{i}" for i in range(100)]
    values = {key: key.encode() * 100 for key in keys}
    a = open_cache(tmp_path / "a", remote=URL)
    a.put_many(values)
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL, disk="64MiB")
    b.put_many({key: values[key] for key in keys[:30]})
    b.flush()
    b.demote()  # these lie on its disk
    assert b.get_many(keys[:10]) == list(values.values())[:10]  # and these in memory, too
    before = sum(store.reads.values())

    ahead = b.prefetch([*keys, "absent"])

    assert ahead.wait(PATIENCE_S)
    assert ahead.loaded == 90
    assert [pin is not None for pin in b._space.pin_many(keys)[0]] == [True] * 100
    assert sum(store.reads.values()) - before <= 71
    assert b.get_many(keys) == list(values.values())


def test_no_more_bytes_are_fetched_ahead_at_a_time_than_was_said(
    open_cache: OpenCache, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{i}" for i in range(20)]
    a = open_cache(tmp_path / "a", remote=URL)
    a.put_many(dict.fromkeys(keys, bytes(100_000)))
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL, prefetch="256KiB")
    asked: list[int] = []
    read = store.read

    def counted(names: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        asked.append(sum(name[25:26] == b"r" for name in names))
        return read(names, timeout_s)

    monkeypatch.setattr(store, "read", counted)

    assert b.prefetch(keys).wait(PATIENCE_S)

    assert sum(asked) == 20
    assert max(asked) == 2
    assert b.get_many(keys) == [bytes(100_000)] * 20


def test_a_cancelled_prefetch_fetches_nothing_more(open_cache: OpenCache, store: Store, tmp_path: Path) -> None:
    keys = [f"{i}" for i in range(40)]
    a = open_cache(tmp_path / "a", remote=URL)
    a.put_many(dict.fromkeys(keys, b"x"))
    a.flush()
    b = open_cache(tmp_path / "b", remote=URL)
    store.gate.clear()
    store.reading.clear()
    ahead = b.prefetch(keys)
    assert store.reading.wait(PATIENCE_S)
    ahead.cancel()
    store.gate.set()
    assert ahead.wait(PATIENCE_S)
    assert ahead.loaded == 1
    assert b.stats()["prefetch"]["cancelled_requests"] == 1


def test_faults_elsewhere_end_a_prefetch_and_are_not_raised(
    open_cache: OpenCache, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(names: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        raise StoreFault("connection", "the server is gone", sent=False)

    b = open_cache(tmp_path / "b", remote=URL)
    monkeypatch.setattr(store, "read", down)
    ahead = b.prefetch(["a", "b"])
    assert ahead.wait(PATIENCE_S)
    assert ahead.loaded == 0


# ---- Load or compute

LAYOUT = KVLayout(model="m", dtype="float32", layers=2, kv_heads=1, head_dim=4, block_tokens=4)
TOKENS = np.arange(40)
KV = np.random.default_rng(0).random((2, 2, 1, 40, 4), np.float32)


def prefixes_of(host: kvstrata.Cache, store: Store, seconds: float, tokens_per_s: float | None) -> PrefixCache:
    """The prefixes of a host that has learned that each record takes so many seconds to come."""
    host.tiers.cost.clock = lambda: store.now
    store.seconds = seconds
    for number in range(20):
        host.get(f"{number}")
    return PrefixCache.open(host, LAYOUT, prefill_tokens_per_s=tokens_per_s)


@pytest.fixture
def host(open_cache: OpenCache, store: Store, tmp_path: Path) -> kvstrata.Cache:
    a = open_cache(tmp_path / "a", remote=URL)
    PrefixCache.open(a, LAYOUT).store(TOKENS, KV)
    a.put_many({f"{number}": bytes(500) for number in range(20)})
    a.flush()
    return open_cache(tmp_path / "b", remote=URL)


def test_what_is_sooner_computed_than_loaded_from_elsewhere_is_skipped_and_counted(
    host: kvstrata.Cache, store: Store
) -> None:
    prefixes = prefixes_of(host, store, seconds=10.0, tokens_per_s=1000.0)
    match = prefixes.match(TOKENS)
    assert match.tokens == 40
    before = dict(store.reads)
    assert match.load().tokens == 0
    assert store.reads == before
    stats = prefixes.stats()
    assert (stats["skips"], stats["skipped_tokens"], stats["skipped_tokens_remote"]) == (1, 40, 40)
    assert stats["skipped_tokens_disk"] == stats["skipped_tokens_memory"] == 0
    assert host.stats()["cost"]["store in memory"]["observations"] == 20


@pytest.mark.parametrize("tokens_per_s", [None, 1000.0])
def test_what_is_sooner_loaded_from_elsewhere_is_loaded(
    host: kvstrata.Cache, store: Store, tokens_per_s: float | None
) -> None:
    seconds = 10.0 if tokens_per_s is None else 1e-6  # without a rate however slow it is
    loaded = prefixes_of(host, store, seconds, tokens_per_s).match(TOKENS).load()
    assert loaded.tokens == 40
    assert np.array_equal(loaded.kv, KV)


def test_blocks_on_this_host_are_loaded_though_those_elsewhere_are_not(host: kvstrata.Cache, store: Store) -> None:
    prefixes = prefixes_of(host, store, seconds=10.0, tokens_per_s=1000.0)
    for key in prefixes.keys(TOKENS)[:3]:
        prefixes.ns.pin(key).release()
    loaded = prefixes.match(TOKENS).load()
    assert loaded.tokens == 12
    assert np.array_equal(loaded.kv, KV[:, :, :, :12])
    assert prefixes.stats()["skipped_tokens_remote"] == 28
