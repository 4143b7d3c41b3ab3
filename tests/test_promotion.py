"""What the core lets in from elsewhere: only what can't be older than a change that was made here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata import _core

STORED, PRESENT, REFUSED, NO_ROOM = range(4)
LATER = 1 << 63  # ns: newer than anything


@pytest.fixture
def store() -> Iterator[_core.Store]:
    store = _core.Store.open_private(4 << 20)
    store.watch()
    yield store
    store.close()


def opened(store: _core.Store, *, version: int = 1, immutable: bool = False) -> _core.Space:
    return store.open_namespace(0, "ns", version, "lru", 0, 0, immutable)


def promote(
    space: _core.Space,
    low: int,
    *,
    key: str = "key",
    value: bytes = b"x",
    written: int = LATER,
    epoch: int | None = None,
) -> int:
    became, _, pin = space.promote(key, value, 0, written, low, space.epoch if epoch is None else epoch)
    assert (pin is not None) == (became == STORED)
    return became


def test_a_record_is_stored_where_there_is_none(store: _core.Store) -> None:
    space = opened(store)
    assert promote(space, store.low()) == STORED
    assert space.get("key") == b"x"
    assert promote(space, store.low(), value=b"y") == PRESENT
    assert space.get("key") == b"x"


@pytest.mark.parametrize("change", ["put", "remove", "clear", "all"])
def test_what_was_read_before_a_change_is_refused_after_it(store: _core.Store, change: str) -> None:
    space = opened(store)
    low, epoch = store.low(), space.epoch
    if change == "put":
        space.put("key", b"newer")
        space.clear()  # it has left memory, one way or the other
        epoch = space.epoch
    elif change == "remove":
        space.remove("key")
    elif change == "clear":
        space.clear()
    else:
        space.change_all()
    assert promote(space, low, epoch=epoch) == REFUSED
    assert space.get("key") is None
    assert promote(space, store.low()) == STORED


def test_a_change_that_is_unsent_counts_from_before_it_is_made(store: _core.Store) -> None:
    space = opened(store)
    store.set_unsent(store.next_number())
    space.put("key", b"newer")
    space.clear()
    assert promote(space, store.low()) == REFUSED
    assert promote(space, store.low(), key="another") == STORED
    store.set_unsent(0)
    assert promote(space, store.low()) == STORED


def test_another_process_sees_what_is_unsent_and_distrusts_what_a_dead_one_left(tmp_path: Path) -> None:
    file = str(Path("/dev/shm") / f"test-of-kvstrata-{os.getpid()}")
    store = _core.Store.create_shared(file, 4 << 20)
    try:
        store.watch()
        store.mark_ready()
        space = opened(store)
        child = os.fork()
        if not child:
            store.leave_to_parent()
            mine = _core.Store.attach_shared(file)
            mine.set_unsent(mine.next_number())
            opened(mine).put("key", b"newer")
            os._exit(0)
        os.waitpid(child, 0)
        space.clear()
        now = time.time_ns()
        assert promote(space, store.low(), written=now) == REFUSED
        assert store.reap() == 1
        assert promote(space, store.low(), written=now) == REFUSED
        assert promote(space, store.low(), written=now, key="another") == STORED
        assert store.distrusted() > now
        assert promote(space, store.low(), written=store.distrusted()) == STORED
    finally:
        store.close()
        Path(file).unlink()


def test_what_was_written_before_a_time_is_distrusted_unless_the_key_implies_the_value(store: _core.Store) -> None:
    space = opened(store)
    frozen = store.open_namespace(0, "immutable", 1, "lru", 0, 0, True)
    store.distrust(1000)
    assert promote(space, store.low(), written=999) == REFUSED
    assert promote(frozen, store.low(), written=999) == STORED
    assert promote(space, store.low(), written=1000) == STORED


def test_a_namespace_that_has_moved_on_takes_nothing(store: _core.Store) -> None:
    old = opened(store)
    assert not old.moved_on
    opened(store, version=2)
    assert old.moved_on
    assert promote(old, store.low()) == REFUSED


def test_what_counts_but_has_no_room_is_told_apart_from_what_does_not(store: _core.Store) -> None:
    space = opened(store)
    large = bytes(5 << 20)
    low = store.low()
    assert promote(space, low, value=large) == NO_ROOM
    space.remove("key")
    assert promote(space, low, value=large) == REFUSED


def test_putting_what_an_immutable_namespace_implies_changes_nothing(store: _core.Store) -> None:
    frozen = opened(store, immutable=True)
    low = store.low()
    frozen.put("key", b"x")
    assert frozen.last_changes(["key"]) == [0]
    frozen.remove("key")
    assert promote(frozen, low, key="key") == REFUSED


def test_without_a_watcher_changes_cost_nothing_and_are_not_written_down() -> None:
    store = _core.Store.open_private(4 << 20)
    space = opened(store)
    space.put("key", b"x")
    assert space.last_changes(["key"]) == [0]
    assert space.last_change_of_all == 0
    store.close()
