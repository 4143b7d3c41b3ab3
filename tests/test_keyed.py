"""The tier over stores that the index knows nothing of: names, generations, checks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from record_store_contract import NativeExpiryContract, RecordStoreContract
from support.stores import MemoryStore

from kvstrata import _core
from kvstrata.bloom import BloomFilter
from kvstrata.errors import TierUnavailable
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.keyed import Found, KeyedSpace, KeyedTier

KEYS = [b"a", b"k" * 64, b"k" * 65, b"k" * 1024, "größe".encode()]


class TestMemoryStore(RecordStoreContract, NativeExpiryContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


class Host:
    """A host with records of its own: what is put can be written to a tier."""

    def __init__(self, store: MemoryStore, name: str = "ns", version: int = 1, **options: object) -> None:
        self.native = _core.Store.open_private(4 << 20)
        self.tier = KeyedTier(store, lookup_s=10.0, **options)  # type: ignore[arg-type]
        self.local = self.native.open_namespace(0, name, version, "lru", 0, 0, False)
        self.space: KeyedSpace = self.tier.open_namespace(name, version)
        self.epoch = 1

    def write(self, items: dict[bytes, bytes], ttl_ms: int = 0) -> None:
        for key, value in items.items():
            self.local.put(key, value, ttl_ms)
        self.tier.write(self.space, [r for r in self.local.records(list(items)) if r is not None])

    def load(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [None if found is None else bytes(found.value) for found in self.found(keys)]

    def found(self, keys: Sequence[bytes]) -> list[Found | None]:
        return self.tier.load(self.space, keys, self.epoch)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_another_host_finds_what_one_has_written(store: MemoryStore) -> None:
    one, other = Host(store), Host(store)
    values = {key: key * size for size, key in enumerate(KEYS)} | {b"large": b"x" * 200_000}
    one.write(values)
    assert other.load([*values, b"absent"]) == [*values.values(), None]
    assert other.tier.contains(other.space, [*values, b"absent"], 1) == [True] * len(values) + [False]


def test_namespaces_versions_and_prefixes_have_no_name_in_common(store: MemoryStore) -> None:
    hosts = [
        Host(store), Host(store, "other"), Host(store, version=2), Host(store, prefix=b"mine"), Host(store, "ns1"),
    ]  # fmt: skip
    for number, host in enumerate(hosts):
        host.write({b"key": b"%d" % number})
    assert [host.load([b"key"]) for host in hosts] == [[b"%d" % number] for number in range(len(hosts))]
    assert len(store.records) == 2 * len(hosts)


def test_names_are_short_whatever_the_key(store: MemoryStore) -> None:
    Host(store, prefix=b"p" * 64).write(dict.fromkeys(KEYS, b"x"))
    assert max(map(len, store.records)) <= 256


def test_a_damaged_record_is_a_counted_miss_wherever_it_is_damaged(store: MemoryStore) -> None:
    host = Host(store)
    host.write({b"key": b"some value"})
    (name,) = (name for name in store.records if not name.endswith(b"g"))
    whole, expires = store.records[name]
    payload_end = 80 + len(b"some value")
    for at in [*range(67), *range(80, payload_end)]:
        store.records[name] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], expires
        assert host.load([b"key"]) == [None], f"byte {at}"
    for cut in (0, 1, 63, 64, 70, len(whole) - 1):
        store.records[name] = whole[:cut], expires
        assert host.load([b"key"]) == [None], f"cut to {cut}"
    assert host.tier.stats()["rejected_records"] == 67 + len(b"some value") + 6
    store.records[name] = whole, expires
    assert host.load([b"key"]) == [b"some value"]


def test_a_record_under_another_ones_name_is_a_counted_miss(store: MemoryStore) -> None:
    host, foreign = Host(store), Host(store, "foreign")
    host.write({b"a": b"1", b"b": b"2"})
    foreign.write({b"a": b"3"})
    generation = host.space.generation
    assert generation is not None
    assert foreign.space.generation is not None
    a, b = host.space.names([b"a", b"b"], generation)
    (theirs,) = foreign.space.names([b"a"], foreign.space.generation)
    for wrong in (b, theirs, host.space.generation_name):
        store.records[a] = store.records[wrong]
        assert host.load([b"a"]) == [None]
    assert host.tier.stats()["rejected_records"] == 3


def test_clear_makes_everything_unreachable_for_every_host(store: MemoryStore) -> None:
    one, other = Host(store), Host(store, generation_s=0.0)
    one.write({b"key": b"old"})
    assert other.load([b"key"]) == [b"old"]
    one.tier.clear(one.space)
    assert one.load([b"key"]) == [None]
    assert other.load([b"key"]) == [None]
    one.write({b"key": b"new"})
    assert other.load([b"key"]) == [b"new"]


def test_a_new_epoch_of_this_host_asks_for_the_generation_at_once(store: MemoryStore) -> None:
    one, other = Host(store), Host(store, generation_s=3600.0)
    one.write({b"key": b"old"})
    assert other.load([b"key"]) == [b"old"]
    one.tier.clear(one.space)
    other.epoch = 2
    assert other.load([b"key"]) == [None]


def test_a_generation_that_is_lost_takes_everything_with_it_for_good(store: MemoryStore) -> None:
    host, other = Host(store, generation_s=0.0), Host(store, generation_s=0.0)
    host.write({b"key": b"old"})
    del store.records[host.space.generation_name]
    assert host.load([b"key"]) == [None]
    other.write({b"other": b"1"})
    assert host.load([b"key", b"other"]) == [None, b"1"]


def test_what_is_written_while_another_host_clears_is_not_taken_for_written(store: MemoryStore) -> None:
    host, other = Host(store, generation_s=3600.0), Host(store)
    host.write({b"key": b"1"})

    class ClearingStore(MemoryStore):
        def write(self, records: object, timeout_s: float, *, then_read: bytes | None = None) -> bytes | None:
            super().write(records, timeout_s)  # type: ignore[arg-type]
            host.tier.store = store
            other.tier.clear(other.space)
            return None if then_read is None else self.read([then_read], timeout_s)[0]

    host.tier.store = ClearingStore(store.records)
    with pytest.raises(StoreFault, match="cleared"):
        host.write({b"key": b"2"})


def test_a_delete_is_done_in_the_generation_that_counts(store: MemoryStore) -> None:
    host, other = Host(store, generation_s=3600.0), Host(store)
    host.write({b"key": b"1"})
    other.tier.clear(other.space)
    other.write({b"key": b"2"})
    host.tier.delete(host.space, [b"key"])
    assert other.load([b"key"]) == [None]


def test_a_record_carries_its_expiry_and_is_absent_afterwards(store: MemoryStore) -> None:
    host = Host(store)
    host.write({b"key": b"1"}, ttl_ms=3_600_000)
    (found,) = host.found([b"key"])
    assert found is not None
    assert 0 < found.expires - time.time() * 1000 <= 3_600_000 + 1000
    name = host.space.names([b"key"], host.space.generation or 0)[0]
    assert store.records[name][1] == found.expires
    host.write({b"short": b"1"}, ttl_ms=100)
    name = host.space.names([b"short"], host.space.generation or 0)[0]
    store.records[name] = store.records[name][0], 0  # a store that forgets nothing by itself
    deadline = time.monotonic() + 20
    while host.load([b"short"]) != [None]:
        assert time.monotonic() < deadline
    assert host.tier.stats()["expired_records"] == 1


def test_the_generation_is_read_along_with_records_and_only_when_it_is_due(store: MemoryStore) -> None:
    host = Host(store, generation_s=3600.0)
    host.write({b"key": b"1"})
    assert host.load([b"key"]) == [b"1"]
    before = store.calls["read"]
    for _ in range(10):
        assert host.load([b"key"]) == [b"1"]
    assert store.calls["read"] == before + 10
    host.space.known_at -= 7200
    assert host.load([b"key"]) == [b"1"]
    assert store.calls["read"] == before + 11


def test_faults_are_misses_and_open_the_breaker_which_a_probe_closes(store: MemoryStore) -> None:
    now = [0.0]
    host = Host(store, breaker=Breaker("the store", threshold=3, pause_s=1.0, clock=lambda: now[0]))
    host.write({b"key": b"1"})
    store.fault = StoreFault("ECONNREFUSED", "nobody there")
    for _ in range(10):
        assert host.load([b"key"]) == [None]
    stats = host.tier.stats()
    assert (stats["breaker"], stats["error ECONNREFUSED"], stats["refused_lookups"]) == ("open", 3, 7)
    assert stats["last_error"] == "ECONNREFUSED: nobody there"
    with pytest.raises(TierUnavailable, match="nobody there"):
        host.tier.delete(host.space, [b"key"])
    store.fault = None
    assert host.load([b"key"]) == [None]
    now[0] = 1.0
    assert host.load([b"key"]) == [b"1"]
    assert host.tier.stats()["breaker"] == "closed"


def test_a_probe_that_is_a_write_is_one_even_if_the_generation_is_not_known(store: MemoryStore) -> None:
    now = [0.0]
    host = Host(store, breaker=Breaker("the store", threshold=1, pause_s=1.0, clock=lambda: now[0]))
    store.fault = StoreFault("ECONNREFUSED", "nobody there")
    assert host.load([b"key"]) == [None]
    store.fault = None
    now[0] = 1.0
    host.write({b"key": b"1"})
    assert host.tier.stats()["breaker"] == "closed"


def test_what_a_read_got_before_its_fault_counts(store: MemoryStore) -> None:
    host = Host(store, generation_s=3600.0)
    host.write({b"a": b"1", b"b": b"2"})
    host.load([b"a"])
    names = host.space.names([b"a", b"b"], host.space.generation or 0)
    store.fault = StoreFault("timeout", "too slow", found=[store.records[names[0]][0], None])
    assert host.load([b"a", b"b"]) == [b"1", None]


def test_after_a_clear_that_failed_nothing_is_served_until_it_is_made_up_for(store: MemoryStore) -> None:
    host = Host(store)
    host.write({b"key": b"old"})
    store.fault = StoreFault("timeout", "too slow")
    with pytest.raises(TierUnavailable):
        host.tier.clear(host.space)
    store.fault = None
    assert host.load([b"key"]) == [None]
    host.write({b"other": b"new"})
    assert host.load([b"key", b"other"]) == [None, b"new"]


def test_a_bloom_filter_saves_questions_whose_answer_is_known(store: MemoryStore) -> None:
    host = Host(store, bloom=BloomFilter(1000, 1e-6), generation_s=3600.0)
    host.write({b"key": b"1"})
    assert host.load([b"key"]) == [b"1"]
    before = store.calls["read"]
    assert host.load([b"absent %d" % i for i in range(100)]) == [None] * 100
    assert store.calls["read"] == before
    assert host.load([b"absent", b"key"]) == [None, b"1"]
