"""Locks of LMCache's L2 adapters: counted, limited, and never for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvstrata
from kvstrata.integrations._lmcache_locks import Locks

SIZE = 1000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def cache() -> Iterator[kvstrata.Cache]:
    with kvstrata.open(memory="2MiB") as cache:
        cache.put_many({b"a": b"a" * SIZE, b"b": b"b" * SIZE})
        yield cache
        assert cache.stats()["memory"]["pins"] == 0


def test_a_lock_is_held_as_often_as_it_was_taken(cache: kvstrata.Cache) -> None:
    locks = Locks(limit=2 * SIZE, timeout=10)
    for _ in range(2):
        assert locks.lock(b"a", SIZE, cache.pin(b"a"))
    locks.unlock([b"a", b"unknown"])
    assert b"a" in locks
    (view,) = locks.views([b"a"])
    assert view == b"a" * SIZE

    locks.unlock([b"a"])
    assert b"a" not in locks
    assert locks.views([b"a"]) == [None]
    assert view == b"a" * SIZE  # stays while it is looked at
    del view
    assert locks.stats()["locked_bytes"] == 0


def test_what_would_exceed_the_limit_is_refused_and_not_pinned(cache: kvstrata.Cache) -> None:
    locks = Locks(limit=SIZE, timeout=10)
    assert locks.lock(b"a", SIZE, cache.pin(b"a"))

    assert not locks.lock(b"b", SIZE, cache.pin(b"b"))

    assert (cache.stats()["memory"]["pins"], locks.stats()["locks_refused"]) == (1, 1)
    locks.clear()


def test_a_pin_that_comes_after_its_lock_was_let_go_is_released(cache: kvstrata.Cache) -> None:
    locks = Locks(limit=2 * SIZE, timeout=10)
    assert locks.lock(b"a", SIZE, None)
    assert locks.lock(b"b", SIZE, None)
    locks.unlock([b"b"])
    assert locks.unpinned([b"a", b"b"]) == [b"a"]

    for key in (b"a", b"b"):
        locks.attach(key, cache.pin(key))

    assert cache.stats()["memory"]["pins"] == 1
    assert locks.unpinned([b"a", b"b"]) == []
    locks.unlock([b"a"])


def test_a_lock_that_nobody_lets_go_ends(cache: kvstrata.Cache) -> None:
    clock = Clock()
    locks = Locks(limit=SIZE, timeout=10, clock=clock)
    assert locks.lock(b"a", SIZE, cache.pin(b"a"))
    clock.now = 9.0
    assert locks.lock(b"a", SIZE, None)
    clock.now = 18.0
    locks.expire()
    assert b"a" in locks

    clock.now = 19.0
    locks.expire()

    assert b"a" not in locks
    assert locks.stats() == {
        "locked_keys": 0, "locked_bytes": 0, "locks": 0, "locks_refused": 0, "locks_expired": 1,
    }  # fmt: skip
