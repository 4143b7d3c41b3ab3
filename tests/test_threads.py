"""Threads over one cache: whatever they do at once, a value belongs to its key."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress

import pytest
from conftest import OpenCache
from support.processes import SOAK

import kvstrata
from kvstrata.errors import TierFull

KEYS = [f"key {i}" for i in range(60)]


def value_for(key: str, size: int) -> bytes:
    body = (key + "/").encode() * (size // (len(key) + 1) + 1)
    return zlib.crc32(body).to_bytes(4, "little") + body


def belongs(key: str, value: bytes | memoryview) -> bool:
    body = bytes(value[4:])
    return zlib.crc32(body) == int.from_bytes(value[:4], "little") and body.startswith(f"{key}/".encode())


def together(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads, and raise what any of them raised."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as failure:  # noqa: BLE001 - raised below, in the test's thread
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("options", [{"path": None}, {}, {"disk": "64MiB"}], ids=["private", "shared", "disk"])
def test_threads_never_see_another_keys_value(open_cache: OpenCache, options: dict[str, object]) -> None:
    cache = open_cache(**options)

    def work(number: int) -> None:
        choose = random.Random(number)
        for _ in range(150 * SOAK):
            key = choose.choice(KEYS)
            match choose.randrange(7):
                case 0 | 1:
                    with suppress(TierFull):  # for a moment, all that could leave is pinned
                        cache.put(key, value_for(key, choose.choice([10, 3000, 70_000, 400_000])))
                case 2:
                    cache.delete(key)
                case 3:
                    pins = cache.pin_many(KEYS[:5])
                    for pinned, pin in zip(KEYS[:5], pins, strict=True):
                        if pin is not None:
                            assert belongs(pinned, memoryview(pin))
                            pin.release()
                case 4:
                    values = cache.get_many(KEYS[10:20])
                    assert all(v is None or belongs(key, v) for key, v in zip(KEYS[10:20], values, strict=True))
                case 5:
                    cache.demote()
                case _:
                    value = cache.get(key)
                    assert value is None or belongs(key, value)

    together(4, work)


def test_a_cache_may_be_closed_while_others_use_it(open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.put("a", bytes(2_000_000))
    started = threading.Barrier(3)

    def work(number: int) -> None:
        started.wait()
        if number == 2:
            cache.close()
            return
        try:
            while True:
                assert cache.get("a") == bytes(2_000_000)
        except kvstrata.errors.CacheClosed:
            pass

    together(3, work)


def test_one_of_many_threads_that_put_an_immutable_key_stores_it(open_cache: OpenCache) -> None:
    ns = open_cache().namespace("blocks", immutable=True)
    together(4, lambda number: ns.put("a", bytes([number]) * 300_000))
    value = ns.get("a")
    assert value is not None
    assert value == value[:1] * 300_000
