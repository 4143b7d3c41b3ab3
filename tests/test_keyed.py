"""The tier over stores that the index knows nothing of: names, generations, checks."""

from __future__ import annotations

import time

import pytest
from record_store_contract import NativeExpiryContract, RecordStoreContract
from support.stores import Host, MemoryStore

from kvstrata.codecs import codec, encryption
from kvstrata.codecs.encryption import Keyring, Sealer
from kvstrata.errors import CorruptRecord, TierUnavailable
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.encodings import Encoding

KEYS = [b"a", b"k" * 64, b"k" * 65, b"k" * 1024, "größe".encode()]


class TestMemoryStore(RecordStoreContract, NativeExpiryContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


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
    assert len(store.records) == 3 * len(hosts)  # with the generation and the list of writers


def test_names_are_short_whatever_the_key(store: MemoryStore) -> None:
    Host(store, prefix=b"p" * 64).write(dict.fromkeys(KEYS, b"x"))
    assert max(map(len, store.records)) <= 256


def test_a_damaged_record_is_a_counted_miss_wherever_it_is_damaged(store: MemoryStore) -> None:
    host = Host(store)
    host.write({b"key": b"some value"})
    (name,) = host.space.names([b"key"], host.space.generation or 0)
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


def test_a_store_that_answers_with_refusals_goes_on_being_asked(store: MemoryStore) -> None:
    host = Host(store)
    host.write({b"key": b"1"})
    store.fault = StoreFault("OOM", "full", sent=False, answered=True)
    for _ in range(10):
        with pytest.raises(StoreFault, match="full"):
            host.write({b"other": b"2"})
    store.fault = None
    assert host.load([b"key"]) == [b"1"]
    assert host.tier.stats()["error OOM"] == 10


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


# ---- Encodings

TEXT = b"the same words again and again, " * 400


def encoded(store: MemoryStore, encoding: Encoding, memory: int = 4 << 20) -> Host:
    host = Host(store, memory=memory)
    host.space = host.tier.open_namespace("ns", 1, encoding)
    return host


def test_hosts_with_other_codecs_read_each_others_values(store: MemoryStore) -> None:
    plain, packed = Host(store), encoded(store, Encoding(codec("zstd")))
    packed.write({b"packed": TEXT})
    plain.write({b"plain": TEXT})
    assert plain.load([b"packed", b"plain"]) == packed.load([b"packed", b"plain"]) == [TEXT, TEXT]
    (record,) = [bytes(record) for record, _ in store.records.values() if b"packed" in bytes(record)]
    assert len(record) < len(TEXT) // 10


def test_a_large_value_of_which_next_to_nothing_is_left_comes_back(store: MemoryStore) -> None:
    large = bytes(80 << 20)
    host = encoded(store, Encoding(codec("zstd:3"), sealer=Sealer(Keyring([bytes(32)]))), memory=128 << 20)
    host.write({b"key": large})
    assert host.tier.stats()["written_bytes"] < 20_000
    assert host.load([b"key"]) == [large]


def test_a_payload_that_speaks_of_another_length_than_its_record_is_none() -> None:
    encoding = Encoding(codec("zstd"))
    number, payload = encoding.encode(TEXT, b"", b"key")
    assert encoding.decode(number, payload, b"", len(TEXT)) == TEXT
    for length in (0, len(TEXT) - 1, len(TEXT) + 1, 1 << 60):
        with pytest.raises(CorruptRecord):
            encoding.decode(number, payload, b"", length)
        if length < 1 << 20:
            with pytest.raises(CorruptRecord):
                encoding.decode_into(number, payload, b"", bytearray(length))


def test_what_is_encrypted_is_read_with_the_key_and_else_is_a_miss(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    def with_keys(*numbers: int) -> Host:
        keys = Keyring([bytes([number]) * 32 for number in numbers])
        return encoded(store, Encoding(codec("zstd"), sealer=Sealer(keys)))

    with_keys(1).write({b"key": TEXT, b"small": b"words"})
    assert not any(b"words" in bytes(record) for record, _ in store.records.values())
    assert with_keys(1).load([b"key", b"small"]) == [TEXT, b"words"]
    assert with_keys(1, 2).load([b"key", b"small"]) == [TEXT, b"words"]
    stranger = with_keys(2)
    assert stranger.load([b"key", b"small"]) == [None, None]
    assert stranger.tier.stats()["sealed_records"] == 2
    assert len([r for r in caplog.records if "isn't among the" in r.getMessage()]) == 1


def test_a_source_of_keys_that_fails_makes_misses_and_is_asked_once(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_ASK_AGAIN_S", 3600.0)
    calls = []

    def source() -> list[bytes]:
        calls.append(1)
        if len(calls) > 1:
            raise ConnectionError("nobody there")
        return [bytes(32)]

    keys = [b"%d" % i for i in range(20)]
    encoded(store, Encoding(sealer=Sealer(Keyring([bytes([1]) * 32])))).write(dict.fromkeys(keys, TEXT))
    host = encoded(store, Encoding(sealer=Sealer(Keyring(source))))
    assert host.load(keys) == [None] * 20
    assert host.tier.stats()["sealed_records"] == 20
    assert len(calls) == 2


def test_a_value_that_can_not_be_encrypted_is_left_out_and_takes_the_older_one_with_it(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_MOST", 1 << 20)
    host = encoded(store, Encoding(sealer=Sealer(Keyring([bytes(32)]))))
    host.write({b"a": b"1", b"b": b"1", b"c": b"1"})
    host.write({b"a": b"2", b"b": bytes(2 << 20), b"c": b"2"})
    assert host.load([b"a", b"b", b"c"]) == [b"2", None, b"2"]
    assert host.tier.stats()["unencoded_records"] == 1


def test_a_sealed_record_under_another_name_is_no_value(store: MemoryStore) -> None:
    host = encoded(store, Encoding(sealer=Sealer(Keyring([bytes(32)]))))
    host.write({b"one": TEXT, b"two": TEXT})
    one, two = host.space.names([b"one", b"two"], host.space.generation or 0)
    store.records[two] = store.records[one]
    assert host.load([b"two"]) == [None]
    assert host.tier.stats()["rejected_records"] == 1
