"""Filters before tiers elsewhere: what they spare, what they may cost, and when they aren't used."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenCache
from support.processes import Process
from support.servers import Server, valkey_server
from support.stores import Host, MemoryStore

from kvstrata.errors import ConfigError
from kvstrata.remote_url import RemoteURL
from kvstrata.tiers import presence
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.keyed_space import KeyedSpace
from kvstrata.tiers.presence import FilterOptions

PATIENCE_S = 30.0
SLOW = FilterOptions(refresh_s=3600.0)  # tests say themselves when filters are read


_opened: list[FilteringHost] = []


class FilteringHost(Host):
    """A host with a filter that is read when the test says so."""

    def __init__(self, store: Any, options: FilterOptions = SLOW, **more: Any) -> None:
        super().__init__(store, bloom=options, **more)
        _opened.append(self)

    @property
    def filters(self) -> Any:
        return self.tier._filters

    def refresh(self) -> str | None:
        """Read what others have published; returns why the filter isn't used."""
        self.space.filter.used = True  # type: ignore[union-attr]
        self.filters.refresh()
        with self.space.filter._refreshing:  # type: ignore[union-attr]
            pass  # what its own thread had begun meanwhile, so that there was nothing left to do here, is done
        off: str | None = self.tier.stats()["filter_off"]  # type: ignore[assignment]
        return off

    def lacks(self, key: bytes) -> bool:
        assert self.space.filter is not None
        return self.space.filter.lacks(key)


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().tier.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def numbered(count: int, prefix: str = "") -> dict[bytes, bytes]:
    return {b"%s%d" % (prefix.encode(), i): b"%d" % i for i in range(count)}


# ---- What it spares


def test_a_lookup_of_what_nobody_wrote_asks_nobody(store: MemoryStore) -> None:
    writer, reader = FilteringHost(store), FilteringHost(store)
    writer.write({b"key": b"value"})
    assert reader.refresh() is None
    before = dict(store.calls)
    assert reader.load([b"absent %d" % i for i in range(100)]).count(None) == 100
    assert not any(reader.tier.contains(reader.space, [b"absent 1", b"absent 2"], reader.epoch))
    assert store.calls == before
    assert reader.load([b"absent", b"key"]) == [None, b"value"]
    stats = reader.tier.stats()
    assert (stats["lookups"], stats["hits"], stats["misses"], stats["filtered_lookups"]) == (102, 1, 101, 101)


def test_where_nothing_was_ever_written_nobody_is_asked_either(store: MemoryStore) -> None:
    reader = FilteringHost(store)
    assert reader.refresh() is None
    before = dict(store.calls)
    assert reader.load([b"key"]) == [None]
    assert store.calls == before


def test_a_miss_of_a_cache_makes_no_command_at_the_server(open_cache: OpenCache, tmp_path: Path) -> None:
    with valkey_server() as server:
        url = f"unix://{server.directory}/socket?bloom=yes&bloom_refresh=3600&lookup_timeout=20"
        a, b = open_cache(tmp_path / "a", remote=url), open_cache(tmp_path / "b", remote=url)
        a.put_many({key.decode(): value for key, value in numbered(1000).items()})
        a.flush()
        assert b.get("absent") is None  # and lets the filter be read
        wait_for(lambda: b.stats()["remote"][0]["filter_off"] is None)
        before = commands(server)
        misses = sum(b.get(f"not there {i}") is None for i in range(2000))
        assert misses == 2000
        assert b.get_many([f"nor {i}" for i in range(100)]).count(None) == 100
        assert b.contains_prefix(["neither", "this"]) == 0
        assert commands(server) - before < 0.05 * 2100 + 10  # what the filter takes for something that is there
        assert [b.get(f"{i}") for i in range(1000)] == [b"%d" % i for i in range(1000)]


@pytest.mark.parametrize("fp_rate", [0.1, 0.01])
def test_false_positives_are_as_many_as_configured_however_many_have_written(
    store: MemoryStore, fp_rate: float
) -> None:
    reader = FilteringHost(store, FilterOptions(fp_rate, 3600.0))
    for number in range(8):
        publish(FilteringHost(store), [b"%d %d" % (number, i) for i in range(5000)])
    assert reader.refresh() is None
    others = 50_000
    wrong = sum(not reader.lacks(b"other %d" % i) for i in range(others))
    assert 0 < wrong <= others * fp_rate + 5 * (others * fp_rate) ** 0.5
    assert not any(reader.lacks(b"%d %d" % (number, i)) for number in range(8) for i in range(0, 5000, 7))


# ---- What it may cost


def test_what_another_host_writes_later_is_found_after_the_next_refresh(store: MemoryStore) -> None:
    writer, reader = FilteringHost(store), FilteringHost(store)
    writer.write({b"key": b"1"})
    assert reader.refresh() is None
    writer.write({b"later": b"2"})
    assert reader.load([b"later"]) == [None]
    assert reader.refresh() is None
    assert reader.load([b"later"]) == [b"2"]


def test_ones_own_writes_are_found_at_once_whoever_has_the_namespace_open(store: MemoryStore) -> None:
    host = FilteringHost(store)
    assert host.refresh() is None
    host.write({b"key": b"1"})
    other_handle = host.tier.open_namespace("ns", 1)
    assert host.load([b"key"]) == [b"1"]
    assert host.tier.load(other_handle, [b"key"], 1)[0] is not None


def test_after_a_clear_by_another_host_what_is_new_is_found_after_the_next_refresh(store: MemoryStore) -> None:
    one, other = FilteringHost(store, generation_s=0.0), FilteringHost(store, generation_s=0.0)
    one.write({b"old": b"1"})
    assert other.refresh() is None
    one.tier.clear(one.space)
    one.write({b"new": b"2"})
    assert other.refresh() is None
    assert other.load([b"old", b"new"]) == [None, b"2"]
    other.write({b"another": b"3"})
    assert one.refresh() is None
    assert one.load([b"new", b"another"]) == [b"2", b"3"]


def test_every_record_was_published_before_it_was_there() -> None:
    class Watching(MemoryStore):
        watching = True

        def write(self, records: Any, timeout_s: float, *, then_read: bytes | None = None) -> Any:
            if self.watching and then_read is not None:  # records
                self.watching = False
                reader = FilteringHost(self)
                assert reader.refresh() is None
                assert not any(reader.lacks(key) for key in keys)
                self.watching = True
                checked.append(len(records))
            return super().write(records, timeout_s, then_read=then_read)

    store, checked = Watching(), list[int]()
    writer = FilteringHost(store)
    for start in range(0, 6000, 1000):
        keys = [b"%d" % i for i in range(start, start + 1000)]
        writer.write(dict.fromkeys(keys, b"x"))
    assert checked == [1000] * 6


@pytest.mark.parametrize("writes", range(6))
def test_wherever_a_process_dies_that_publishes_for_the_first_time_the_filter_stays_complete(writes: int) -> None:
    class Dying(MemoryStore):
        left = 1 << 30

        def write(self, records: Any, timeout_s: float, *, then_read: bytes | None = None) -> Any:
            self.left -= 1
            if self.left < 0:
                raise StoreFault("timeout", "too slow")
            return super().write(records, timeout_s, then_read=then_read)

    store = Dying()
    FilteringHost(store).write({b"key": b"value"})
    store.left = writes
    dying = FilteringHost(store)
    keys = [b"%d" % i for i in range(3000)]
    with contextlib.suppress(StoreFault):
        dying.write(dict.fromkeys(keys, b"x"))
    there = [key for key in keys if dying.space.names([key], dying.space.generation or 0)[0] in store.records]
    assert len(there) == (3000 if writes >= 4 else 0)
    reader = FilteringHost(store)
    assert reader.refresh() is None
    assert not any(reader.lacks(key) for key in [b"key", *there])
    store.left = 1 << 30


def test_a_process_that_is_killed_leaves_nothing_that_others_do_not_find(open_cache: OpenCache, tmp_path: Path) -> None:
    with valkey_server() as server:
        url = f"unix://{server.directory}/socket?bloom=yes&lookup_timeout=20"
        with Process() as child:
            child.run(
                "import kvstrata, threading; cache = kvstrata.open(path, memory='8MiB', disk=0, remote=url)\n"
                "def put():\n    for n in range(10**6):\n"
                "        for i in range(500 * n, 500 * n + 500): cache.put(f'{i}', b'%d' % i)\n"
                "        cache.flush()\n"
                "threading.Thread(target=put, daemon=True).start()",
                path=str(tmp_path / "a"), url=url,
            )  # fmt: skip
            wait_for(lambda: len(keys_there(server)) > 3000)
            child.kill()
        there = keys_there(server)
        cache = open_cache(tmp_path / "b", remote=url)
        assert cache.get("absent") is None
        wait_for(lambda: cache.stats()["remote"][0]["filter_names"] > 2900)
        assert cache.stats()["remote"][0]["filter_off"] is None
        assert [key for key in there if cache.get(key) != key] == []
        open_cache(tmp_path / "a", remote=url)  # which clears up after the dead


# ---- When it isn't used: then the store is asked as if there were none


def test_a_filter_that_is_too_old_is_not_used(store: MemoryStore) -> None:
    writer, reader = FilteringHost(store), FilteringHost(store, FilterOptions(refresh_s=1e-9))
    writer.write({b"key": b"1"})
    assert reader.refresh() is None
    writer.write({b"later": b"2"})
    assert reader.load([b"later"]) == [b"2"]
    reader.tier.close()


def test_where_somebody_writes_without_publishing_no_filter_is_used(store: MemoryStore) -> None:
    one, reader, plain = FilteringHost(store), FilteringHost(store), Host(store)
    one.write({b"key": b"1"})
    assert reader.refresh() is None
    plain.write({b"unpublished": b"2"})
    assert reader.refresh() == "somebody writes there with bloom=no"
    assert reader.load([b"unpublished"]) == [b"2"]
    # and the other way round: one who publishes comes later
    one.tier.clear(one.space)
    plain.tier.clear(plain.space)
    plain.write({b"first": b"3"})
    one.load([b"first"])
    one.write({b"second": b"4"})
    assert FilteringHost(store).refresh() == "somebody writes there with bloom=no"


@pytest.mark.parametrize("part", ["w", "n", "page"])
@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_where_something_that_was_published_is_lost_no_filter_is_used(
    store: MemoryStore, part: str, damage: str
) -> None:
    writer = FilteringHost(store)
    writer.write(numbered(3000))
    reader = FilteringHost(store)
    lengths = {"w": 8, "n": 16, "page": 20}
    start = writer.space.start + (b"n" if part == "page" else part.encode())
    chosen = [name for name in store.records if name.startswith(start) and len(name) == len(start) + lengths[part]]
    data, expires = store.records.pop(chosen[0])
    if damage == "damaged":
        store.records[chosen[0]] = data[:-70] + bytes([data[-70] ^ 1]) + data[-69:], expires
    assert reader.refresh() is not None
    assert reader.load([b"7", b"2999", b"absent"]) == [b"7", b"2999", None]


def test_what_a_release_without_filters_has_written_is_found(store: MemoryStore) -> None:
    writer = Host(store)
    writer.write({b"key": b"1"})
    (roll,) = [name for name in store.records if name.startswith(writer.space.start + b"w")]
    del store.records[roll]
    reader = FilteringHost(store)
    assert reader.refresh() is not None
    assert reader.load([b"key"]) == [b"1"]
    reader.write({b"another": b"2"})
    third = FilteringHost(store)
    assert third.refresh() is not None
    assert third.load([b"key", b"another"]) == [b"1", b"2"]


def test_a_fault_while_a_filter_is_read_is_counted_and_leaves_it_unused(store: MemoryStore) -> None:
    writer, reader = FilteringHost(store), FilteringHost(store)
    writer.write({b"key": b"1"})
    store.fault = StoreFault("timeout", "too slow")
    assert reader.refresh() == "not read yet"
    assert reader.tier.stats()["error timeout"] == 1
    store.fault = None
    assert reader.load([b"key"]) == [b"1"]
    assert reader.refresh() is None


def test_a_write_whose_publication_fails_is_not_made_and_may_be_made_again(store: MemoryStore) -> None:
    writer, reader = FilteringHost(store), FilteringHost(store)
    writer.write({b"first": b"1"})
    store.fault = StoreFault("timeout", "too slow")
    with pytest.raises(StoreFault) as raised:
        writer.write({b"key": b"1"})
    assert not raised.value.sent
    store.fault = None
    writer.write({b"key": b"1"})
    assert reader.refresh() is None
    assert reader.load([b"key", b"first"]) == [b"1", b"1"]


# ---- What is published


def test_what_is_overwritten_is_not_published_again(store: MemoryStore) -> None:
    writer = FilteringHost(store)
    writer.write({b"key": b"1"})
    before = store.calls["write"]
    for _ in range(5):
        writer.write({b"key": b"2"})
    assert store.calls["write"] == before + 5


def test_what_expires_is_forgotten_with_it_and_what_is_put_again_is_published_again(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = [0.0]
    monkeypatch.setattr(presence, "time", Clock(later))
    writer = FilteringHost(store)
    publish(writer, [b"%d" % i for i in range(5000)], expires_s=60)
    later[0] = 7200.0
    publish(writer, [b"1"], expires_s=60)
    pages = [name for name in store.records if name.startswith(writer.space.start + b"n") and len(name) > 46]
    for name in pages:
        store.records.pop(name)  # as a server does that knows when they expire
    reader = FilteringHost(store)
    assert reader.refresh() is None
    assert not reader.lacks(b"1")
    assert reader.lacks(b"2")


def test_what_those_have_published_who_are_silent_is_taken_over(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_lived = [FilteringHost(store) for _ in range(20)]
    for number, host in enumerate(short_lived):
        host.write({b"%d" % number: b"x"})
    host = FilteringHost(store)
    host.write({b"mine": b"x"})
    assert host.refresh() is None
    assert writers(store, host.space) == 21
    monkeypatch.setattr(presence, "_SILENT_S", 0.0)
    assert host.refresh() is None
    assert writers(store, host.space) == 1
    # One of them wasn't dead, and finds that out.
    monkeypatch.setattr(presence, "_VERIFY_S", 0.0)
    short_lived[3].write({b"again": b"x"})
    assert writers(store, host.space) == 2
    reader = FilteringHost(store)
    assert reader.refresh() is None
    names = [b"%d" % number for number in range(20)]
    assert reader.load([*names, b"mine", b"again"]) == [b"x"] * 22


def test_of_two_who_enter_at_once_the_one_that_was_lost_enters_again(store: MemoryStore) -> None:
    for how in ("by the next write", "at the end"):
        one, other = FilteringHost(store), FilteringHost(store)
        one.write({b"one": b"1"})
        roll = next(name for name in store.records if name.startswith(one.space.start + b"w"))
        before = store.records[roll]
        other.write({b"other": b"2"})
        store.records[roll] = before  # as if both had read the list before either wrote it
        if how == "at the end":
            other.tier.close()
        else:
            other.write({b"more": b"3"})
        reader = FilteringHost(store)
        assert reader.refresh() is None
        assert reader.load([b"one", b"other"]) == [b"1", b"2"]
        store.records.clear()


def test_a_filter_of_what_has_mostly_gone_is_made_anew(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_STALE", 100)
    later = [0.0]
    monkeypatch.setattr(presence, "time", Clock(later))
    writer, reader = FilteringHost(store), FilteringHost(store)
    publish(writer, [b"%d" % i for i in range(4096)], expires_s=60)
    assert reader.refresh() is None
    assert not reader.lacks(b"7")
    later[0] = 7200.0
    publish(writer, [b"new"])
    reader.refresh()
    assert reader.refresh() is None
    assert reader.lacks(b"7")
    assert not reader.lacks(b"new")
    assert reader.tier.stats()["filter_names"] == 1


# ---- As an option


def test_filters_are_an_option_and_stand_before_object_storage_by_default() -> None:
    def options(url: str) -> FilterOptions | None:
        return RemoteURL.parse(url)._bloom()

    assert options("redis://host") is None
    assert options("redis://host?bloom=yes") == FilterOptions(0.01, 1.0)
    assert options("redis://host?bloom=yes&bloom_fp=0.001&bloom_refresh=0.2") == FilterOptions(0.001, 0.2)
    assert options("s3://bucket") == FilterOptions(0.01, 10.0)
    assert options("s3://bucket?bloom=no") is None
    for wrong in ("bloom=perhaps", "bloom_fp=0", "bloom_fp=much", "bloom_refresh=0", "bloom_refresh=often"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            RemoteURL.parse(f"redis://host?{wrong}")


# ---- Helpers


class Clock:
    """The module `time`, ahead by so many seconds of the day."""

    def __init__(self, later: list[float]) -> None:
        self._later = later
        self.monotonic = time.monotonic
        self.time_ns = time.time_ns

    def time(self) -> float:
        return time.time() + self._later[0]


def publish(host: FilteringHost, keys: list[bytes], expires_s: float = 0.0) -> None:
    """Publish keys as a write does, without the records."""
    host.tier._generation_to_change(host.space, make=True)
    until = int((presence.time.time() + expires_s) * 1000) if expires_s else 0
    names = presence.Names(host.space, host.space.generation)
    assert host.space.filter is not None
    host.space.filter.publish(host.tier.store, names, keys, [until] * len(keys), PATIENCE_S)


def writers(store: MemoryStore, space: KeyedSpace) -> int:
    names = presence.Names(space, space.generation)
    return len(presence.Roll(names, me=b"").decode(store.records[names.roll][0]))


def commands(server: Server) -> int:
    import valkey

    with valkey.Valkey(port=server.port) as client:
        return int(client.info("stats")["total_commands_processed"])


def keys_there(server: Server) -> list[bytes]:
    """The keys of all records in a server, which end the names of theirs."""
    import valkey

    with valkey.Valkey(port=server.port) as client:
        names: list[bytes] = client.keys(b"kvstrata:*")
    return [name[35:] for name in names if name[25:26] == b"r"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
