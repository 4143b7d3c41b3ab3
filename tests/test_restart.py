"""What is on disk outlives its processes; what was deleted, overwritten or cleared does not come back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenCache
from support.processes import SOAK, Process

from kvstrata.errors import ConfigError, ConfigMismatch

DISK = {"memory": "4MiB", "disk": "64MiB"}
OPEN = "cache = kvstrata.open(directory, **options)"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
LONG = b"a key that lies in a block of its own, as it is longer than 32 bytes"

# With the mapping kept, as after the death of all processes, or without it, as after a reboot.
after_a_crash = pytest.mark.parametrize("reboot", [False, True], ids=["mapping kept", "reboot"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def crash(shm: Path) -> Callable[[bool], None]:
    """Does to the shared memory what a reboot does, if it is one."""

    def crash(reboot: bool) -> None:
        for file in shm.iterdir():
            if reboot:
                file.unlink()

    return crash


@pytest.fixture
def another(shm: Path, directory: Path) -> Iterator[Callable[..., Process]]:
    """Starts processes that have the cache open."""
    started: list[Process] = []

    def another(**options: Any) -> Process:
        started.append(Process())
        started[-1].run(OPEN, directory=directory, options=DISK | options)
        return started[-1]

    yield another
    for process in started:
        with process:
            pass


# ---- Orderly


@pytest.mark.parametrize("size", [0, 10, 5000, 65_536, 300_000])
def test_a_closed_cache_has_everything_when_it_is_opened_again(open_cache: OpenCache, size: int) -> None:
    with open_cache(**DISK) as cache:
        cache.put_many({f"key {i}": bytes([i]) * size for i in range(20)})
        cache.namespace("another", version=3, immutable=True).put(LONG, b"1")
    cache = open_cache(**DISK)
    assert cache.get_many([f"key {i}" for i in range(20)]) == [bytes([i]) * size for i in range(20)]
    assert cache.namespace("another", version=3, immutable=True).get(LONG) == b"1"


def test_a_closed_cache_may_be_opened_with_other_sizes(open_cache: OpenCache) -> None:
    with open_cache(memory="4MiB", disk="64MiB") as cache:
        cache.put("key", b"value")
    with open_cache(memory="8MiB", disk="128MiB") as cache:
        assert cache.get("key") == b"value"
    with open_cache(memory="2MiB", disk="32MiB", shared=False) as cache:
        assert cache.get("key") == b"value"


@pytest.mark.parametrize("shared", [True, False])
def test_what_has_a_disk_is_not_opened_without_since_older_values_would_come_back_later(
    open_cache: OpenCache, shared: bool
) -> None:
    with open_cache(**DISK) as cache:
        cache.put("key", b"value")
    with pytest.raises(ConfigError, match="has a disk tier, which with disk=0"):
        open_cache(memory="4MiB", disk=0, shared=shared)
    assert open_cache(**DISK).get("key") == b"value"


@pytest.mark.parametrize(
    ("refused", "error"),
    [({"version": 2, "policy": "slru"}, ConfigMismatch), ({"immutable": True}, ConfigMismatch)],
)
def test_a_namespace_that_could_not_be_opened_so_is_as_it_was_after_a_restart(
    open_cache: OpenCache, refused: dict[str, Any], error: type[Exception]
) -> None:
    with open_cache(**DISK) as cache:
        ns = cache.namespace("n")
        ns.put("before", b"1")
        with pytest.raises(error):
            cache.namespace("n", **refused)
        ns.put("after", b"2")
        cache.flush()
    ns = open_cache(**DISK).namespace("n")
    assert ns.get_many(["before", "after"]) == [b"1", b"2"]


def test_what_was_removed_before_closing_stays_removed(open_cache: OpenCache) -> None:
    with open_cache(**DISK) as cache:
        spaces = [cache.namespace(name) for name in ("a", "b", "c")]
        for ns in spaces:
            ns.put_many({"deleted": b"1", "overwritten": b"1", "kept": b"1"})
        cache.flush()
        spaces[0].delete("deleted")
        spaces[0].put("overwritten", b"2")
        spaces[1].clear()
        spaces[1].put("kept", b"3")
        cache.namespace("c", version=2).put("overwritten", b"4")
    cache = open_cache(**DISK)
    names = ["deleted", "overwritten", "kept"]
    assert cache.namespace("a").get_many(names) == [None, b"2", b"1"]
    assert cache.namespace("b").get_many(names) == [None, None, b"3"]
    assert cache.namespace("c", version=2).get_many(names) == [None, b"4", None]


def test_a_time_to_live_goes_on_over_a_restart(open_cache: OpenCache) -> None:
    with open_cache(**DISK) as cache:
        cache.put("short", b"1", ttl=0.3)
        cache.put("long", b"1", ttl=1000)
    cache = open_cache(**DISK)
    assert cache.get("long") == b"1"
    while "short" in cache:
        pass
    with cache:
        assert cache.get("short") is None
    assert open_cache(**DISK).get_many(["short", "long"]) == [None, b"1"]


def test_a_later_exclusive_session_makes_a_left_over_mapping_void(
    open_cache: OpenCache, another: Callable[..., Process], directory: Path
) -> None:
    process = another()
    process.run("cache.put_many({'deleted': b'1', 'overwritten': b'1', 'kept': b'1'}); cache.flush()")
    process.kill()
    with open_cache(**DISK, shared=False) as cache:
        cache.delete("deleted")
        cache.put("overwritten", b"2")
    assert open_cache(**DISK).get_many(["deleted", "overwritten", "kept"]) == [None, b"2", b"1"]


# ---- Killed


@after_a_crash
def test_all_but_what_was_not_yet_written_outlives_a_kill(
    open_cache: OpenCache, another: Callable[..., Process], crash: Callable[[bool], None], reboot: bool
) -> None:
    process = another()
    process.run("cache.put_many({b'%d' % i: bytes([i]) * i * 300 for i in range(250)}); cache.flush()")
    process.run("cache.put_many({b'new %d' % i: b'1' for i in range(100)})")
    process.kill()
    crash(reboot)
    cache = open_cache(**DISK)
    assert cache.get_many([b"%d" % i for i in range(250)]) == [bytes([i]) * i * 300 for i in range(250)]
    assert set(cache.get_many([b"new %d" % i for i in range(100)])) <= {None, b"1"}


REMOVALS = {
    "deleted": ("ns.delete(key)", None),
    "overwritten": ("ns.put(key, b'new')", b"new"),
    "overwritten by a batch": ("ns.put_many({key: b'new'})", b"new"),
    "overwritten in place": ("with ns.reserve(key, 3) as view: view[:] = b'new'", b"new"),
    "deleted with others": ("ns.delete_many(['another', key])", None),
    "deleted by prefix": ("ns.delete_prefix(key[:2])", None),
    "deleted by tag": ("ns.delete_tag('tag')", None),
    "put again after its tag was deleted": ("ns.delete_tag('tag'); ns.put(key, b'new', tags=['tag'])", b"new"),
    "cleared": ("ns.clear()", None),
}


@after_a_crash
@pytest.mark.parametrize("before", ["", "cache.demote()"], ids=["in memory", "below"])
def test_what_is_gone_before_a_kill_is_gone_after_it(
    open_cache: OpenCache,
    another: Callable[..., Process],
    crash: Callable[[bool], None],
    reboot: bool,
    before: str,
) -> None:
    process = another()
    cases = list(itertools.product(REMOVALS, [b"key", LONG]))
    process.run("spaces = [cache.namespace(f'case {i}') for i in range(count)]", count=len(cases))
    for i, (_, key) in enumerate(cases):
        process.run("spaces[i].put(key, b'old', tags=['tag'])", i=i, key=key)
    process.run(f"cache.flush(); {before}")
    for i, (how, key) in enumerate(cases):
        process.run(f"ns = spaces[i]\n{REMOVALS[how][0]}", i=i, key=key)
    process.kill()
    crash(reboot)
    cache = open_cache(**DISK)
    for i, (how, key) in enumerate(cases):
        assert cache.namespace(f"case {i}").get(key) in (None, REMOVALS[how][1]), how


def test_a_removal_that_a_kill_cut_short_does_not_mislead_the_next(
    open_cache: OpenCache, another: Callable[..., Process], crash: Callable[[bool], None]
) -> None:
    # The first process dies when its removal is seen by all, but the row of the old record is still there. For the
    # second one there is nothing on disk to be removed, as far as the index can tell.
    hows = ["deleted", "overwritten", "overwritten by a batch", "overwritten in place"]
    cases = list(itertools.product(hows, hows, [b"key", LONG]))
    one, two = another(), another()
    for process in (one, two):
        process.run("spaces = [cache.namespace(f'case {i}') for i in range(count)]", count=len(cases))
    for i, (_, _, key) in enumerate(cases):
        one.run("spaces[i].put(key, b'old')", i=i, key=key)
    one.run("cache.flush(); cache.below.forget_older = lambda *_: None")
    for i, (first, _, key) in enumerate(cases):
        one.run(f"ns = spaces[i]\n{REMOVALS[first][0]}", i=i, key=key)
    one.kill()
    for i, (_, second, key) in enumerate(cases):
        two.run(f"ns = spaces[i]\nassert ns.get(key) != b'old'\n{REMOVALS[second][0]}", i=i, key=key)
    two.kill()
    crash(True)
    cache = open_cache(**DISK)
    for i, (first, second, key) in enumerate(cases):
        found = cache.namespace(f"case {i}").get(key)
        assert found in (None, REMOVALS[second][1]), f"{first}, then {second}"


def test_a_clear_that_a_kill_cut_short_does_not_bring_back_what_came_after_it(
    open_cache: OpenCache, another: Callable[..., Process], crash: Callable[[bool], None]
) -> None:
    one, two = another(), another()
    one.run("cache.put('before', b'1'); cache.flush()")
    one.start(f"cache.below.persist_epoch = lambda *_: {DIE}\ncache.clear()")
    assert one.wait() == -9
    two.run("assert cache.get('before') is None; cache.put('after', b'1'); cache.flush()")
    two.kill()
    crash(True)
    cache = open_cache(**DISK)
    assert cache.get("before") is None
    assert cache.get("after") in (None, b"1")
    cache.clear()
    cache.close()
    assert open_cache(**DISK).get_many(["before", "after"]) == [None, None]


def test_a_clear_that_a_kill_cut_short_does_not_bring_back_what_was_overwritten_after_it(
    open_cache: OpenCache, another: Callable[..., Process], crash: Callable[[bool], None]
) -> None:
    one, two = another(), another()
    one.run("cache.put('key', b'old'); cache.flush()")
    one.start(f"cache.below.persist_epoch = lambda *_: {DIE}\ncache.clear()")
    assert one.wait() == -9
    two.run("for i in range(200): cache.put(f'{i}', bytes(100_000))")  # the index forgets what was cleared
    two.run("cache.put('key', b'new')")
    two.kill()
    crash(True)
    assert open_cache(**DISK).get("key") in (None, b"new")


def test_a_prefix_takes_what_is_put_before_it_is_looked_for_and_leaves_what_is_put_after(open_cache: OpenCache) -> None:
    cache = open_cache(**DISK)
    cache.put_many({f"user/{i}": b"old" for i in range(20)})
    cache.flush()
    removed: list[bytes] = []

    class Meanwhile:  # what other processes do while the shards are looked through
        id = cache._space.id

        def keys_of(self, shard: int, prefix: bytes) -> list[bytes]:
            if shard == 0:
                cache.put("user/late", b"old")
            elif shard == cache.below._store.shards - 1:
                cache.put(removed[0], b"new")
            cache.flush()
            return cache._space.keys_of(shard, prefix)

        def remove_many(self, keys: list[bytes]) -> tuple[int, list[int]]:
            removed.extend(keys)
            return cache._space.remove_many(keys)

    assert cache.below.remove_prefix(Meanwhile(), b"user/") == 21  # type: ignore[arg-type]
    assert list(cache.keys("user/")) == removed[:1]
    cache.close()
    cache = open_cache(**DISK)
    assert list(cache.keys("user/")) == removed[:1]
    assert cache.get(removed[0]) == b"new"


@pytest.mark.parametrize("immutable", [False, True])
def test_a_tag_deleted_before_a_restart_stays_deleted_and_can_be_used_again(
    open_cache: OpenCache, directory: Path, immutable: bool
) -> None:
    keys = [f"key {i}" for i in range(20)]
    with open_cache(**DISK) as cache:
        ns = cache.namespace("ns", immutable=immutable)
        for i, key in enumerate(keys):
            ns.put(key, b"1", tags=[f"tag {i % 2}", "all"])
        cache.flush()
        ns.delete_tag("tag 0")
    with open_cache(**DISK) as cache:
        ns = cache.namespace("ns", immutable=immutable)
        assert ns.get_many(keys) == [None, b"1"] * 10
        ns.put("key 0", b"2", tags=["tag 0"])
        ns.delete_tag("tag 1")
    with open_cache(**DISK) as cache:
        ns = cache.namespace("ns", immutable=immutable)
        assert ns.get_many(keys) == [b"2"] + [None] * 19
    for file in directory.glob("catalog-*"):
        file.unlink()
    ns = open_cache(**DISK).namespace("ns", immutable=immutable)
    assert ns.get_many(keys) == [None] * 20  # nobody can say any more which tags were deleted


@pytest.mark.parametrize("key_length", [8, 960])
def test_what_is_gone_stays_gone_when_the_index_has_no_room_for_all_that_is_on_disk(
    open_cache: OpenCache,
    another: Callable[..., Process],
    crash: Callable[[bool], None],
    key_length: int,
) -> None:
    # Entries are what is short with short keys, and the memory for keys with long ones.
    count = 14_000 if key_length < 32 else 3000
    small = {"memory": "1MiB", "disk": "16MiB"}
    process = another(**small)
    process.run(f"keys = [(b'%08d' % i) * {key_length // 8} for i in range({count})]")
    process.run("cache.put_many(dict.fromkeys(keys, b'old'))")
    process.run("cache.flush()")
    process.run("for key in keys[:200]: cache.delete(key)")
    process.run("cache.put_many(dict.fromkeys(keys[200:400], b'new'))")
    process.kill()
    crash(True)
    keys = [(b"%08d" % i) * (key_length // 8) for i in range(count)]
    with open_cache(**small) as cache:
        assert set(cache.get_many(keys[:200])) == {None}
        assert set(cache.get_many(keys[200:400])) <= {None, b"new"}
        for key in keys[400:600]:
            cache.delete(key)  # the index may not even have known it
    assert set(open_cache(**small).get_many(keys[400:600])) == {None}


def test_a_batch_that_fails_half_way_has_overwritten_what_it_stored(
    open_cache: OpenCache, another: Callable[..., Process], crash: Callable[[bool], None]
) -> None:
    process = another()
    process.run("cache.put('key', b'old'); cache.flush()")
    process.run(
        "try:\n"
        "    cache.put_many({'key': b'new', 'too large': bytes(5 << 20)})\n"
        "except kvstrata.errors.TierFull:\n"
        "    assert cache.get('key') == b'new'\n"
    )
    process.kill()
    crash(True)
    assert open_cache(**DISK).get("key") in (None, b"new")


# ---- At random


@pytest.mark.parametrize("round_number", range(2 * SOAK))
def test_nothing_outdated_comes_back_after_kills_at_random_moments(
    shm: Path, tmp_path: Path, crash: Callable[[bool], None], round_number: int
) -> None:
    options = {"memory": "2MiB", "disk": "32MiB"}
    found = []
    for part in range(3):
        with Process() as process:
            process.run("from support.churn import Boss")
            process.run(
                "boss = Boss(directory, options, writers=2, readers=1, seed=seed)\n"
                "with boss:\n"
                "    boss.kill_some(5)\n"
                "    boss.kill_all()\n",
                directory=tmp_path,
                options=options,
                seed=round_number * 10 + part,
            )
            crash(part != 1)
            process.run("found = boss.check_all()")
            found.append(process.eval("found"))
    assert max(found) > 0


def test_generations_of_processes_leave_no_shared_memory(shm: Path, directory: Path) -> None:
    for _ in itertools.repeat(None, 3):
        with Process() as process:
            process.run(OPEN + "; cache.put('key', b'value')", directory=directory, options=DISK)
        assert list(shm.iterdir()) == []
