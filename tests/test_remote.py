"""A cache with tiers elsewhere: what it promises on this host whatever happens there."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OpenCache
from support.processes import Process
from support.servers import valkey_server
from support.stores import MemoryStore
from support.values import make_value, serial_of

import kvstrata
from kvstrata.errors import ConfigError, ConfigMismatch, MissingExtra, TierUnavailable, UnknownOption
from kvstrata.remote_url import RemoteURL
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.keyed import KeyedTier

PATIENCE_S = 30.0
Records = dict[bytes, tuple[bytes, int]]
Hosts = Callable[..., kvstrata.Cache]


class SharedStores:
    """Stores in memory by URL: every cache that opens one gets its own, all over the same records."""

    def __init__(self) -> None:
        self.records: dict[str, Records] = {}
        self.opened: dict[str, list[MemoryStore]] = {}
        self.kind: type[MemoryStore] = MemoryStore

    def open(self, url: RemoteURL) -> KeyedTier:
        store = self.kind(self.records.setdefault(url.label, {}))
        self.opened.setdefault(url.label, []).append(store)
        return KeyedTier(store, lookup_s=PATIENCE_S, breaker=Breaker(url.label, pause_s=0.01, longest_s=0.05))


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> SharedStores:
    shared = SharedStores()
    monkeypatch.setattr(RemoteURL, "open", lambda url: shared.open(url))
    return shared


ONE, TWO = "redis://one", "redis://two"


@pytest.fixture
def host(open_cache: OpenCache, stores: SharedStores, tmp_path: Path) -> Hosts:
    """Opens the cache of a host; each has a directory of its own."""

    def host(name: str = "a", **options: Any) -> kvstrata.Cache:
        return open_cache(tmp_path / name, **({"remote": ONE} | options))

    return host


def push_out(cache: kvstrata.Cache) -> None:
    """Fill the memory with other records, so that nothing else is left in it."""
    filler = cache.namespace("filler", remote=False)
    for i in range(3 * cache.options.memory // 100_000):
        filler.put(f"{i}", bytes(100_000))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---- Between hosts


def test_what_one_host_puts_another_finds(host: Hosts) -> None:
    a, b = host("a"), host("b")
    values = {f"key {size}": np.random.default_rng(size).bytes(size) for size in (0, 1, 5000, 70_000, 500_000)}
    a.put_many(values)
    a.flush()
    assert b.get_many([*values, "absent"]) == [*values.values(), None]
    assert b.get("key 5000") == values["key 5000"]
    (figures,) = b.stats()["remote"]
    assert (figures["hits"], figures["lookups"]) == (5, 6)


def test_every_way_of_reading_asks_there(host: Hosts) -> None:
    a = host("a")
    a.put_many({f"{i}": b"%d" % i for i in range(10)})
    a.flush()
    b = host("b")
    assert "0" in b
    assert b.get("0") == b"0"
    out = bytearray(5)
    assert b.get("1", out=out) == b"1"
    with b.pin("2") as view:
        assert view == b"2"
    pins = b.pin_many(["3", "absent"])
    assert pins[1] is None
    assert pins[0] is not None
    with pins[0] as view:
        assert view == b"3"
    assert b.contains_prefix(["0", "4", "1", "5", "absent", "6"]) == 4
    outs = [bytearray(3), bytearray(3)]
    assert b.get_many(["6", "absent"], out=outs) == [b"6", None]
    assert b.get("absent", "default") == "default"
    with pytest.raises(KeyError):
        b.pin("absent")


def test_what_was_found_there_lies_in_memory_afterwards_and_is_not_sent_back(host: Hosts, stores: SharedStores) -> None:
    a, b = host("a"), host("b")
    a.put("key", b"value")
    a.flush()
    assert b.get("key") == b"value"
    b.flush()
    (store,) = stores.opened[RemoteURL.parse(ONE).label][1:]
    reads = store.calls["read"]
    assert b.get("key") == b"value"
    assert (store.calls["read"], store.calls.get("write", 0)) == (reads, 0)


def test_time_to_live_goes_with_a_record(host: Hosts) -> None:
    a, b = host("a"), host("b")
    a.put("short", b"1", ttl=1.0)
    a.put("long", b"1", ttl=3600)
    a.flush()
    assert b.get("long") == b"1"
    if b.get("short") is not None:  # a slow machine may take longer than it lives
        wait_for(lambda: b.get("short") is None)


def test_several_tiers_are_asked_in_order_and_a_hit_fills_those_before(host: Hosts, stores: SharedStores) -> None:
    a = host("a", remote=TWO)
    a.put("key", b"value")
    a.flush()
    b = host("b", remote=[ONE, TWO])
    assert b.get("key") == b"value"
    b.flush()
    c = host("c", remote=ONE)
    assert c.get("key") == b"value"


def test_a_namespace_may_stay_on_its_host(host: Hosts, stores: SharedStores) -> None:
    a, b = host("a"), host("b")
    a.namespace("mine", remote=False).put("key", b"value")
    a.flush()
    assert b.namespace("mine").get("key") is None
    assert not stores.records[RemoteURL.parse(ONE).label]


def test_records_with_tags_stay_on_their_host(host: Hosts) -> None:
    a, b = host("a"), host("b")
    a.put("key", b"old")
    a.flush()
    a.put("key", b"new", tags=["tag"])
    a.flush()
    assert b.get("key") is None
    assert a.get("key") == b"new"


def test_removals_and_clear_reach_other_hosts(host: Hosts) -> None:
    a, b = host("a"), host("b")
    a.put_many({"1": b"1", "2": b"2", "3": b"3"})
    a.flush()
    a.delete("1")
    a.delete_many(["2"])
    assert b.get_many(["1", "2", "3"]) == [None, None, b"3"]
    a.clear()
    c = host("c")
    assert c.get("3") is None


def test_a_newer_version_finds_nothing_of_the_older(host: Hosts) -> None:
    a, b = host("a"), host("b")
    a.namespace("ns", version=1).put("key", b"1")
    a.flush()
    assert b.namespace("ns", version=2).get("key") is None
    assert host("c").namespace("ns", version=1).get("key") == b"1"


def test_blocks_of_a_prefix_are_found_there(host: Hosts) -> None:
    layout = kvstrata.KVLayout(model="m", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=4)
    tokens = np.arange(20)
    kv = np.random.default_rng(0).random((1, 2, 1, 20, 4), np.float32)
    a = host("a")
    assert kvstrata.PrefixCache.open(a, layout).store(tokens, kv) == 5
    a.flush()
    match = kvstrata.PrefixCache.open(host("b"), layout).match(tokens)
    assert match.tokens == 20
    loaded = match.load()
    assert loaded.tokens == 20
    assert np.array_equal(loaded.kv, kv)


def test_a_prefix_arrives_head_first_and_without_holes_also_when_it_is_sent_in_vain_at_first(
    host: Hosts, stores: SharedStores
) -> None:
    layout = kvstrata.KVLayout(model="m", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=4)
    tokens = np.arange(4 * 300)
    cache = host("a")
    prefixes = kvstrata.PrefixCache.open(cache, layout)
    (store,) = stores.opened[RemoteURL.parse(ONE).label]
    store.fault = StoreFault("timeout", "too slow")
    prefixes.store(tokens, np.zeros((1, 2, 1, len(tokens), 4), np.float32))
    wait_for(lambda: cache.stats()["remote"][0].get("error timeout", 0) >= 1)
    store.fault = None
    cache.flush()
    arrived = [name[34:] for name in store.records if name[25:26] == b"r"]  # in the order in which they came
    assert arrived == [b"k" + key for key in prefixes.keys(tokens)]


# ---- Read your writes


class SlowStore(MemoryStore):
    """Writes and deletions wait for the test; reads don't, unless it says so."""

    gate, writing, read_gate, reading = (threading.Event() for _ in range(4))

    def read(self, names: Any, timeout_s: float) -> list[bytes | None]:
        found = super().read(names, timeout_s)
        if not self.read_gate.is_set() and any(not name.endswith(b"g") for name in names):
            self.reading.set()
            assert self.read_gate.wait(PATIENCE_S)
        return found

    def write(self, records: Any, timeout_s: float, *, then_read: bytes | None = None) -> bytes | None:
        self.writing.set()
        assert self.gate.wait(PATIENCE_S)
        return super().write(records, timeout_s, then_read=then_read)


@pytest.fixture
def slow(stores: SharedStores) -> Iterator[type[SlowStore]]:
    class Mine(SlowStore):
        gate, writing, read_gate, reading = (threading.Event() for _ in range(4))

    Mine.gate.set()
    Mine.read_gate.set()
    stores.kind = Mine
    yield Mine
    Mine.gate.set()
    Mine.read_gate.set()


def keep_busy(cache: kvstrata.Cache, slow: type[SlowStore]) -> None:
    """Let the writer wait for the gate with another record."""
    slow.gate.clear()
    slow.writing.clear()
    cache.put("another", b"x")
    assert slow.writing.wait(PATIENCE_S)


def test_an_older_record_there_never_undoes_a_put_whose_record_has_left_memory(
    host: Hosts, slow: type[SlowStore]
) -> None:
    cache = host()
    cache.put("key", b"old")
    cache.flush()
    keep_busy(cache, slow)
    cache.put("key", b"new")
    push_out(cache)
    assert cache.get("key") is None
    assert "key" not in cache
    assert cache.contains_prefix(["key"]) == 0
    slow.gate.set()
    cache.flush()
    assert cache.get("key") in (None, b"new")


def test_another_process_of_the_host_is_not_given_the_older_record_either(
    host: Hosts, slow: type[SlowStore], tmp_path: Path
) -> None:
    one, other = host("same"), host("same")
    one.put("key", b"old")
    one.flush()
    keep_busy(one, slow)
    one.put("key", b"new")
    push_out(one)
    assert other.get("key") is None
    slow.gate.set()
    one.flush()
    assert other.get("key") in (None, b"new")


def test_a_put_that_could_not_be_sent_takes_the_older_record_away_there(host: Hosts, slow: type[SlowStore]) -> None:
    cache, b = host("a"), host("b")
    cache.put("key", b"old")
    cache.flush()
    keep_busy(cache, slow)
    cache.put("key", b"new")
    push_out(cache)
    slow.gate.set()
    cache.flush()
    assert b.get("key") is None


@pytest.mark.parametrize("change", ["delete", "put", "clear", "delete_prefix"])
def test_what_is_changed_while_it_is_being_read_there_does_not_come_back(
    host: Hosts, slow: type[SlowStore], change: str
) -> None:
    a = host("a")
    a.put("key", b"old")
    a.flush()
    cache = host("b")
    slow.read_gate.clear()
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(cache.get("key")))
    reader.start()
    assert slow.reading.wait(PATIENCE_S)  # it has the old value
    changer = threading.Thread(
        target={
            "delete": lambda: cache.delete("key"),
            "put": lambda: (cache.put("key", b"new"), push_out(cache)),
            "clear": cache.clear,
            "delete_prefix": lambda: cache.delete_prefix("k"),
        }[change]
    )  # fmt: skip
    changer.start()
    changer.join()
    slow.read_gate.set()
    reader.join()
    assert got[0] in (None, b"old", b"new")
    assert cache.get("key") in ((None, b"new") if change == "put" else (None,))


@pytest.mark.parametrize("change", ["clear", "delete_prefix"])
def test_what_was_being_read_there_does_not_come_in_while_a_namespace_is_emptied(
    host: Hosts, slow: type[SlowStore], change: str
) -> None:
    a = host("a")
    a.put("key", b"old")
    a.flush()
    cache = host("b")
    slow.read_gate.clear()
    reader = threading.Thread(target=cache.get, args=("key",))
    reader.start()
    assert slow.reading.wait(PATIENCE_S)
    slow.gate.clear()
    slow.writing.clear()
    changer = threading.Thread(target=cache.clear if change == "clear" else lambda: cache.delete_prefix("k"))
    changer.start()
    assert slow.writing.wait(PATIENCE_S)  # it is done here, and is being done there
    slow.read_gate.set()
    reader.join()
    slow.gate.set()
    changer.join()
    assert cache.get("key") is None


def test_of_two_processes_writes_the_newer_one_stays_though_the_older_one_arrives_last(
    host: Hosts, slow: type[SlowStore], stores: SharedStores
) -> None:
    one, other = host("same"), host("same")
    its_store, _ = stores.opened[RemoteURL.parse(ONE).label]
    assert isinstance(its_store, SlowStore)
    its_store.gate, its_store.writing = threading.Event(), threading.Event()  # type: ignore[misc]
    one.put("key", b"older")
    assert its_store.writing.wait(PATIENCE_S)
    other.put("key", b"newer")
    other.flush()
    its_store.gate.set()
    one.flush()
    push_out(one)
    assert one.get("key") in (None, b"newer")


def test_a_removal_that_cannot_be_made_there_raises_and_is_made_up_for(
    host: Hosts, stores: SharedStores, caplog: pytest.LogCaptureFixture
) -> None:
    cache, b = host("a"), host("b")
    cache.put_many({"1": b"1", "2": b"2"})
    cache.flush()
    store = stores.opened[RemoteURL.parse(ONE).label][0]
    store.fault = StoreFault("timeout", "too slow")
    with pytest.raises(TierUnavailable, match="removed on this host"):
        cache.delete("1")
    assert cache.get("1") is None
    store.fault = None
    cache.flush()
    assert cache.get("1") is None
    assert b.get_many(["1", "2"]) == [None, b"2"]


def test_a_clear_that_cannot_be_made_there_raises_and_nothing_is_served_until_it_is(
    host: Hosts, stores: SharedStores
) -> None:
    cache, same = host("a"), host("a")
    cache.put("key", b"1")
    cache.flush()
    store, _ = stores.opened[RemoteURL.parse(ONE).label]
    store.fault = StoreFault("timeout", "too slow")
    with pytest.raises(TierUnavailable, match="cleared on this host"):
        cache.clear()
    assert cache.get("key") is None
    assert same.get("key") is None  # whose own store answers
    store.fault = None
    cache.flush()
    assert cache.get("key") is None
    assert same.get("key") is None


def test_what_a_killed_process_had_not_sent_does_not_come_back_in_an_older_state(
    host: Hosts, open_cache: OpenCache, tmp_path: Path
) -> None:
    with valkey_server() as server:
        url = f"unix://{server.directory}/socket?lookup_timeout=10"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RemoteURL, "open", RemoteURL_open)
            watcher = open_cache(tmp_path / "a", remote=url)
            watcher.put("key", b"old")
            watcher.put("settled", b"1")
            watcher.flush()
            with Process() as child:
                child.run("import kvstrata; cache = kvstrata.open(path, memory='8MiB', disk=0, remote=url)",
                          path=str(tmp_path / "a"), url=url)  # fmt: skip
                server.pause()
                # What is being sent may arrive all the same; the next record isn't under way.
                child.run("cache.put('another', b'x')")
                child.run("while not cache.tiers.remotes.writers[0]._busy: pass")
                child.run("cache.put('key', b'new')")
                child.kill()
            server.resume()
            push_out(watcher)
            assert watcher.get("key") is None
            watcher.close()
            again = open_cache(tmp_path / "a", remote=url)
            assert again.get("key") is None
            again.put("key", b"newest")
            again.flush()  # while there is a server


def test_what_was_not_sent_when_the_last_process_left_is_not_served_in_an_older_state_later(
    host: Hosts, stores: SharedStores
) -> None:
    cache = host("a")
    cache.put("key", b"old")
    cache.flush()
    (store,) = stores.opened[RemoteURL.parse(ONE).label]
    store.fault = StoreFault("ECONNREFUSED", "nobody there", sent=False)
    cache.put("key", b"new")
    cache.close()
    again = host("a")
    assert again.get("key") is None
    again.close()
    assert host("a").get("key") is None
    assert host("b").get("key") == b"old"  # another host, for which it was never overwritten


def test_after_an_orderly_end_everything_counts(host: Hosts) -> None:
    cache = host("a")
    cache.put("key", b"value")
    cache.close()
    assert host("a").get("key") == b"value"


@pytest.mark.parametrize("other", [(), (TWO,), (f"{ONE}?prefix=another",)], ids=["none", "another", "another prefix"])
def test_what_was_changed_while_it_was_open_without_a_tier_does_not_come_back_from_there(
    host: Hosts, other: tuple[str, ...]
) -> None:
    with host("a") as cache:
        cache.put("removed", b"old")
        cache.put("overwritten", b"old")
    with host("a", remote=other) as cache:
        cache.delete("removed")
        cache.put("overwritten", b"new")
    with host("a") as cache:
        assert cache.get("removed") is None
        assert cache.get("overwritten") in (b"new", None)


def test_who_has_it_open_without_a_tier_that_others_have_would_remove_nothing_there_so_it_is_refused(
    host: Hosts,
) -> None:
    host("a")
    for other in ((), (TWO,), (TWO, ONE)):
        with pytest.raises(ConfigMismatch, match="remote: open with"):
            host("a", remote=other)
    host("b", remote=())
    with pytest.raises(ConfigMismatch, match="remote: open with"):
        host("b")


def test_a_namespace_stays_on_its_host_for_all_who_have_it_open_or_for_nobody(host: Hosts) -> None:
    host("a").namespace("n")
    with pytest.raises(ConfigMismatch, match="remote=True; use the same"):
        host("a").namespace("n", remote=False)
    host("c", remote=()).namespace("n")
    host("c", remote=()).namespace("n", remote=False)  # where there is nothing elsewhere


# ---- A tier that is down


def test_a_tier_that_is_down_blocks_no_put_and_fills_no_memory(host: Hosts, stores: SharedStores) -> None:
    cache = host("a")
    (store,) = stores.opened[RemoteURL.parse(ONE).label]
    store.fault = StoreFault("timeout", "too slow")
    for i in range(300):
        cache.put(f"{i}", bytes(100_000))  # several times what the memory holds
    assert cache.get("299") is not None
    assert cache.get("0") is None
    store.fault = None
    cache.put("after", b"x")
    cache.flush()
    assert host("b").get("after") == b"x"


def test_a_full_queue_drops_records_and_counts_them_and_distrusts_what_they_replaced(
    host: Hosts, slow: type[SlowStore]
) -> None:
    cache = host("a")
    cache.put("key", b"old")
    cache.flush()
    assert cache.tiers.remotes is not None
    (writer,) = cache.tiers.remotes.writers
    writer._limit = 5
    keep_busy(cache, slow)
    for i in range(20):
        cache.put(f"{i}", b"x")
    cache.put("key", b"new")
    slow.gate.set()
    cache.flush()
    push_out(cache)
    assert writer.stats()["dropped_records"] != 0
    assert cache.get("key") is None


def test_a_server_that_is_killed_and_started_again_under_load_costs_hits_only(
    open_cache: OpenCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    with valkey_server() as server:
        url = f"redis://127.0.0.1:{server.port}?lookup_timeout=0.05"
        cache = open_cache(tmp_path / "a", remote=url)
        keys = [b"%d" % i for i in range(200)]
        serials = dict.fromkeys(keys, 0)
        stop = threading.Event()
        failures: list[BaseException] = []
        reads = [0]
        slowest = [0.0]

        def read() -> None:
            random = np.random.default_rng(0)
            try:
                while not stop.is_set():
                    chosen = [keys[i] for i in random.integers(0, len(keys), 16)]
                    before = [serials[key] for key in chosen]
                    start = time.monotonic()
                    values = cache.get_many(chosen)
                    slowest[0] = max(slowest[0], time.monotonic() - start)
                    for key, least, value in zip(chosen, before, values, strict=True):
                        if value is not None:
                            assert serial_of(key, value) >= least
                    reads[0] += 1
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()

        def write(rounds: int) -> None:
            for _ in range(rounds):
                for i, key in enumerate(keys):
                    serial = serials[key] + 1
                    cache.put(key, make_value(key, serial, 100 + 500 * (i % 100)))
                    serials[key] = serial
                push_out(cache)

        def figures() -> dict[str, Any]:
            found: dict[str, Any] = cache.stats()["remote"][0]
            return found

        write(3)
        server.kill()
        write(3)
        wait_for(lambda: figures()["breaker_opened"] > 0)
        done = reads[0]
        wait_for(lambda: reads[0] > done + 50 or bool(failures))
        server.start()
        write(1)
        wait_for(lambda: figures()["breaker"] == "closed" or bool(failures))
        hits = figures()["hits"]
        wait_for(lambda: (write(1), figures()["hits"] > hits)[1] or bool(failures))
        stop.set()
        reader.join()
        cache.flush()  # while there is a server
        assert failures == []
        assert slowest[0] < 20
        assert figures()["misses"] > 0
        said = [record.getMessage().split(": ")[1] for record in caplog.records if "127.0.0.1" in record.getMessage()]
        assert said[0] == "open"
        assert said[-1] == "closed"
        assert all(a != b for a, b in itertools.pairwise(said))


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru"])
def test_a_full_server_is_read_as_ever_and_written_to_less_and_less_often(
    open_cache: OpenCache, tmp_path: Path, policy: str
) -> None:
    valkey = pytest.importorskip("valkey")
    with valkey_server("--maxmemory", "20mb", "--maxmemory-policy", policy) as server:
        url = f"redis://127.0.0.1:{server.port}?lookup_timeout=10"
        values = {f"{i}": make_value(b"%d" % i, 1, 100_000) for i in range(100)}
        with open_cache(tmp_path / "a", memory="32MiB", remote=url) as writer:
            writer.namespace("ns", immutable=True).put_many(values)
            writer.flush()
        cache = open_cache(tmp_path / "b", memory="64MiB", remote=url)
        ns = cache.namespace("ns", immutable=True)
        new = {f"new {i}": bytes(100_000) for i in range(200)}
        ns.put_many(new)
        wait_for(lambda: cache.stats()["remote"][0]["refused_writes"] >= 4)
        assert [ns.get(key) == value for key, value in values.items()] == [True] * 100
        figures = cache.stats()["remote"][0]
        assert figures["breaker_opened"] == 0
        assert figures["queued_records"] > 0
        assert "OOM" in figures["last_error"]
        with valkey.Valkey(port=server.port) as client:
            client.config_set("maxmemory", 0)
        cache.flush()
        other = open_cache(tmp_path / "c", memory="64MiB", remote=url).namespace("ns", immutable=True)
        assert other.get_many(list(new)) == list(new.values())


def test_a_server_that_stands_still_costs_no_more_than_the_time_limit(open_cache: OpenCache, tmp_path: Path) -> None:
    with valkey_server() as server:
        cache = open_cache(tmp_path / "a", remote=f"redis://127.0.0.1:{server.port}?lookup_timeout=0.05")
        cache.put("key", b"value")
        cache.flush()
        push_out(cache)
        server.pause()
        start = time.monotonic()
        assert cache.get_many([f"{i}" for i in range(1000)]) == [None] * 1000
        assert [cache.get("key") for _ in range(100)] == [None] * 100
        assert time.monotonic() - start < 20
        server.resume()
        wait_for(lambda: cache.get("key") == b"value")
        cache.flush()  # while there is a server


# ---- Life


def test_a_forked_child_makes_connections_of_its_own(open_cache: OpenCache, tmp_path: Path) -> None:
    with valkey_server() as server, Process() as process:
        url = f"redis://127.0.0.1:{server.port}?lookup_timeout=10"
        process.run(
            """
import os, kvstrata
cache = kvstrata.open(path, memory='8MiB', disk=0, remote=url)
ns = cache.namespace('ns')
ns.put('parent', b'1')
cache.flush()
child = os.fork()
if child == 0:
    try:
        good = ns.get('parent') == b'1' and ns.get('absent') is None
        ns.put('child', b'2')
        cache.flush()
        made = cache.stats()['remote'][0]['connections']
        cache.close()
        os._exit(0 if good and made >= 1 else 1)
    except BaseException:
        import traceback; traceback.print_exc()
        os._exit(2)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
ns.put('after', b'3')
cache.flush()
cache.close()
""",
            path=str(tmp_path / "a"), url=url,
        )  # fmt: skip
        assert process.eval("status") == 0
        other = open_cache(tmp_path / "b", remote=url)
        assert other.namespace("ns").get_many(["parent", "child", "after"]) == [b"1", b"2", b"3"]


def test_a_cache_without_a_remote_has_none(open_cache: OpenCache) -> None:
    cache = open_cache()
    assert cache.stats()["remote"] == []
    assert cache._remote is None


def test_secrets_are_told_to_nobody(
    open_cache: OpenCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    users = ("--user", "default", "off", "--user", *["tester", "on", ">hunter2", "~*", "+@all"])
    with valkey_server(*users) as server:
        where = f"127.0.0.1:{server.port}/0"
        told = []
        for url in (f"redis://tester:hunter2@{where}", f"redis://tester:wrong-hunter2@{where}"):
            cache = open_cache(tmp_path / "a", remote=url + "?lookup_timeout=10")
            cache.put("key", b"value")
            try:
                cache.flush(0.5 if "wrong" in url else 30)
            except TierUnavailable as error:
                told.append(repr(error))
            try:
                cache.delete("key")
            except TierUnavailable as error:
                told.append(repr(error) + repr(error.__cause__))
            told += [repr(cache), repr(cache.tiers._settings), str(cache.stats()["remote"])]
            cache.close()
        monkeypatch.setenv("MY_PASSWORD", "hunter2")
        cache = open_cache(tmp_path / "b", remote=f"redis://tester@{where}?password_env=MY_PASSWORD&lookup_timeout=10")
        cache.put("key", b"value")
        cache.flush()
        assert cache.stats()["remote"][0]["written_records"] == 1
        told.append(str(cache.stats()["remote"]))
    for bad in ("redis://tester:hunter2@host:port", "redis://:hunter2@", "redos://:hunter2@host",
                "redis://tester:hunter2@host/x?prefix=", "redis://u:hunter2@[host"):  # fmt: skip
        with pytest.raises(ConfigError) as raised:
            RemoteURL.parse(bad)
        told.append(str(raised.value))
    told += [record.getMessage() for record in caplog.records]
    assert [text for text in told if "hunter2" in text] == []
    assert any("refuses this user or password" in text for text in told)


@pytest.mark.parametrize(("package", "url"), [("valkey", "redis://host"), ("obstore", "s3://bucket")])
def test_without_the_package_the_error_names_the_extra(
    open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch, package: str, url: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"kvstrata\[(valkey|s3)\]"):
        open_cache(remote=url)


def test_an_unknown_kind_or_option_is_an_error_that_names_the_nearest(open_cache: OpenCache) -> None:
    with pytest.raises(UnknownOption, match="'redis'"):
        open_cache(remote="reddis://host")
    with pytest.raises(UnknownOption, match="lookup_timeout"):
        open_cache(remote="redis://host?lookup_timeot=1")
    with pytest.raises(ConfigError, match="seconds"):
        open_cache(remote="redis://host?lookup_timeout=soon")
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        open_cache(remote="redis://host?password_env=NO_SUCH_VARIABLE")


RemoteURL_open = RemoteURL.open
