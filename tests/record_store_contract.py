"""What a store of records does, whatever it is. Each store's test file runs it.

The fixture `store` is the test's: a RecordStore that holds nothing of these names yet.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from kvstrata.tiers.base import NamedRecord, RecordStore

PATIENCE_S = 20.0  # for anything that has to work: a shared machine may stall


def pattern(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng([size, seed]).bytes(size)


def record(name: bytes, data: bytes, expires: int = 0) -> NamedRecord:
    return NamedRecord(name, (data,), expires)


class RecordStoreContract:
    def read(self, store: RecordStore, *names: bytes) -> list[bytes | None]:
        return [None if item is None else bytes(item) for item in store.read(names, PATIENCE_S)]

    def test_a_read_gives_what_was_written_byte_for_byte(self, store: RecordStore) -> None:
        records = {b"r/%d" % size: pattern(size) for size in (1, 63, 64, 65, 4096, 65536, 300_000)}
        store.write([record(*item) for item in records.items()], PATIENCE_S)
        assert self.read(store, *records) == list(records.values())

    def test_a_record_is_all_of_its_parts(self, store: RecordStore) -> None:
        whole = pattern(200_000)
        parts = (whole[:64], memoryview(whole)[64:4096], np.frombuffer(whole[4096:], np.uint8))
        store.write([NamedRecord(b"parts", parts, 0)], PATIENCE_S)
        assert self.read(store, b"parts") == [whole]

    def test_a_record_may_be_of_many_megabytes(self, store: RecordStore) -> None:
        large = pattern(21 << 20)
        store.write([record(b"large", large), record(b"small", b"s")], PATIENCE_S)
        assert self.read(store, b"small", b"large", b"absent") == [b"s", large, None]
        store.write([record(b"large", b"now small")], PATIENCE_S)
        assert self.read(store, b"large") == [b"now small"]
        store.write([record(b"large", large)], PATIENCE_S)
        assert store.contains([b"large"], PATIENCE_S) == [True]
        store.delete([b"large"], PATIENCE_S)
        assert self.read(store, b"large") == [None]

    def test_names_are_any_bytes(self, store: RecordStore) -> None:
        names = [
            b"\0",
            b"\xff\xfe",
            b"a b\r\nc",
            b"{tag}",
            b"/",
            b"..",
            b"%2f",
            bytes(range(256)),
            b"a",
            b"a\0",
            "ü".encode(),
        ]
        store.write([record(name, b"value of " + name) for name in names], PATIENCE_S)
        assert self.read(store, *names) == [b"value of " + name for name in names]

    def test_the_order_of_a_batch_is_kept_and_what_is_absent_is_none(self, store: RecordStore) -> None:
        store.write([record(b"%d" % i, pattern(1000, i)) for i in range(0, 200, 2)], PATIENCE_S)
        wanted = [pattern(1000, i) if i % 2 == 0 else None for i in range(200)]
        assert self.read(store, *(b"%d" % i for i in range(200))) == wanted
        assert self.read(store, b"2", b"absent", b"2") == [pattern(1000, 2), None, pattern(1000, 2)]
        assert store.contains([b"%d" % i for i in range(200)], PATIENCE_S) == [i % 2 == 0 for i in range(200)]

    def test_nothing_asked_is_nothing_done(self, store: RecordStore) -> None:
        assert store.read([], PATIENCE_S) == []
        assert store.contains([], PATIENCE_S) == []
        store.write([], PATIENCE_S)
        store.delete([], PATIENCE_S)

    def test_a_write_replaces(self, store: RecordStore) -> None:
        for size in (100_000, 10, 3000):
            store.write([record(b"name", pattern(size))], PATIENCE_S)
            assert self.read(store, b"name") == [pattern(size)]

    def test_a_write_can_read_another_name_afterwards(self, store: RecordStore) -> None:
        assert store.write([record(b"a", b"1")], PATIENCE_S, then_read=b"b") is None
        large = pattern(100_000)
        assert bytes(store.write([record(b"b", large)], PATIENCE_S, then_read=b"b") or b"") == large
        assert bytes(store.write([], PATIENCE_S, then_read=b"a") or b"") == b"1"
        assert store.write([record(b"a", b"2")], PATIENCE_S) is None

    def test_what_is_deleted_is_gone_when_the_call_returns(self, store: RecordStore) -> None:
        store.write([record(b"%d" % i, b"x") for i in range(10)], PATIENCE_S)
        store.delete([b"1", b"3", b"absent"], PATIENCE_S)
        assert store.contains([b"%d" % i for i in range(5)], PATIENCE_S) == [True, False, True, False, True]
        assert self.read(store, b"1") == [None]

    def test_a_record_whose_time_is_far_away_is_there(self, store: RecordStore) -> None:
        store.write([record(b"name", b"x", int(time.time() * 1000) + 3_600_000)], PATIENCE_S)
        assert self.read(store, b"name") == [b"x"]

    def test_threads_get_their_own_answers(self, store: RecordStore) -> None:
        failures = []

        def work(number: int) -> None:
            try:
                for turn in range(10):
                    mine = {b"%d/%d" % (number, i): pattern(5000 + i, number + turn) for i in range(20)}
                    store.write([record(*item) for item in mine.items()], PATIENCE_S)
                    assert self.read(store, *mine) == list(mine.values())
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_stats_are_numbers_and_short_texts(self, store: RecordStore) -> None:
        assert all(value is None or isinstance(value, (int, float, str)) for value in store.stats().values())


class NativeExpiryContract:
    """For stores that forget what has expired by themselves."""

    def test_a_record_that_has_expired_is_gone(self, store: RecordStore) -> None:
        soon = int(time.time() * 1000) + 150
        store.write([record(b"soon", b"x", soon), record(b"past", b"x", 1), record(b"never", b"x")], PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while store.contains([b"soon"], PATIENCE_S) != [False]:
            assert time.monotonic() < deadline, "it never went"
        assert [item is not None for item in store.read([b"soon", b"past", b"never"], PATIENCE_S)] == [
            False,
            False,
            True,
        ]
