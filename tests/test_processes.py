"""Lives of processes that share a cache: forks, deaths, limits, and places that don't see one another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import OpenCache
from support.failpoints import build
from support.processes import Process
from test_sharing import in_a_fork

import kvstrata
from kvstrata.errors import ConfigMismatch, InvalidValue, TierUnavailable

OPEN = "cache = kvstrata.open(directory, memory='4MiB', disk=disk)"

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forks beside threads are the point
tiers = pytest.mark.parametrize("disk", [0, "32MiB"], ids=["memory", "disk"])


# ---- Forks

FIRST_USES: dict[str, Callable[[kvstrata.Cache], bool]] = {
    "get": lambda cache: cache.get("key") == b"value",
    "namespace": lambda cache: cache.namespace("of the child").put("key", b"1") is None,
    "flush": lambda cache: cache.flush() is None,
    "demote": lambda cache: cache.demote() >= 0,
    "stats": lambda cache: cache.stats()["memory"]["clients"] == 2,
    "close": lambda cache: cache.close() is None,
}


@tiers
@pytest.mark.parametrize("use", FIRST_USES)
def test_a_forked_child_may_begin_with_anything(open_cache: OpenCache, disk: str | int, use: str) -> None:
    cache = open_cache(disk=disk)
    cache.put("key", b"value")
    assert in_a_fork(lambda: FIRST_USES[use](cache))
    assert in_a_fork(lambda: in_a_fork(lambda: FIRST_USES[use](cache)))
    assert cache.get("key") == b"value"


@tiers
def test_a_child_goes_on_when_its_parent_has_closed_the_cache(shm: Path, tmp_path: Path, disk: str | int) -> None:
    # As a daemon does it: the parent leaves, the child stays, and others come.
    with Process() as parent, Process() as other:
        parent.run(OPEN + "; cache.put('key', b'value')", directory=tmp_path / "cache", disk=disk)
        parent.run(
            "there, back = os.pipe(), os.pipe()\n"
            "if os.fork() == 0:\n"
            "    os.read(there[0], 1)\n"
            "    cache.put('from the child', b'1')\n"
            "    os.write(back[1], b'.')\n"
            "    os.read(there[0], 1)\n"
            "    cache.close()\n"
            "    os.write(back[1], b'.')\n"
            "    os._exit(0)\n"
            "cache.close()\n"
            "os.write(there[1], b'.'); os.read(back[0], 1)\n"
        )
        other.run(OPEN, directory=tmp_path / "cache", disk=disk)
        assert other.eval("cache.get('from the child')") == b"1"
        assert other.eval("cache.stats()['memory']['clients']") == 2
        parent.run("os.write(there[1], b'.'); os.read(back[0], 1)")
        assert other.eval("cache.stats()['memory']['clients']") == 1


def test_the_death_of_a_parent_is_seen_while_its_child_lives(shm: Path, tmp_path: Path) -> None:
    with Process() as parent, Process() as other:
        parent.run(OPEN + "; cache.put('key', b'value'); pin = cache.pin('key')", directory=tmp_path / "c", disk=0)
        other.run(OPEN, directory=tmp_path / "c", disk=0)
        parent.run("there = os.pipe(); back = os.pipe()")
        parent.run(
            "child = os.fork()\n"
            "if child == 0:\n"
            "    os.close(there[1])\n"
            "    os.closerange(0, 3)\n"
            "    os.write(back[1], b'.')\n"  # by now it has given up its parent's place
            "    os.read(there[0], 1)\n"  # until the parent's end of the pipe is closed, by its death
            "    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "os.read(back[0], 1)\n"
        )
        child = parent.eval("child")
        parent.kill()
        try:
            other.run("cache.tiers.memory.store.reap()")
            assert other.eval("cache.stats()['memory']['reaped_pins']") == 1
            assert other.eval("cache.stats()['memory']['clients']") == 1
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_reservation_belongs_to_the_process_that_made_it(open_cache: OpenCache) -> None:
    cache = open_cache()

    def child() -> bool:
        # Leaving the block of a reservation that was made before the fork.
        with pytest.raises(InvalidValue, match="forked"):
            reservation.__exit__(None, None, None)
        return cache.get("key") is None and cache.stats()["memory"]["reservations"] == 0

    reservation = cache.reserve("key", 5)
    view = reservation.__enter__()
    view[:] = b"value"
    assert in_a_fork(child)
    reservation.__exit__(None, None, None)
    assert cache.get("key") == b"value"


def test_a_namespace_that_has_moved_on_does_not_keep_a_child_from_the_others(open_cache: OpenCache) -> None:
    cache = open_cache()
    old = cache.namespace("versioned", version=1)
    new = cache.namespace("versioned", version=2)
    new.put("key", b"new")

    def child() -> bool:
        with pytest.raises(kvstrata.errors.VersionConflict):
            old.put("key", b"late")
        return new.get("key") == b"new" and cache.get("absent") is None

    assert in_a_fork(child)


def test_threads_at_work_during_a_fork_do_not_hang_the_child(shm: Path, tmp_path: Path) -> None:
    with Process() as parent:
        parent.run(OPEN, directory=tmp_path / "cache", disk="32MiB")
        parent.run(
            "import threading\n"
            "stop = False\n"
            "def work(number):\n"
            "    i = 0\n"
            "    while not stop:\n"
            "        i += 1\n"
            "        cache.put(f'{number} {i % 50}', bytes(i % 5000))\n"
            "        cache.get(f'{number} {i % 70}')\n"
            "threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]\n"
            "for thread in threads: thread.start()\n"
        )
        parent.run(
            "import warnings\n"
            "warnings.simplefilter('ignore', DeprecationWarning)\n"
            "for i in range(20):\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        signal.alarm(30)\n"
            "        cache.put('from a child', b'1'); cache.get('0 1'); cache.flush(); cache.close()\n"
            "        os._exit(0)\n"
            "    assert os.waitpid(child, 0)[1] == 0\n"
            "stop = True\n"
            "for thread in threads: thread.join()\n"
        )


# ---- Ends


@tiers
def test_pins_that_outlive_the_cache_leave_no_shared_memory(shm: Path, tmp_path: Path, disk: str | int) -> None:
    program = (
        "import sys, kvstrata\n"
        f"cache = kvstrata.open(sys.argv[1], memory='4MiB', disk={disk!r})\n"
        "cache.put('key', bytes(100_000))\n"
        "pin = cache.pin('key')\n"
        "view = pin.__enter__()\n"
        "many = cache.pin_many(['key'] * 3)\n"
        "reservation = cache.reserve('another', 10); reservation.__enter__()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "cache"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(shm.iterdir()) == []


def test_a_pin_released_after_its_cache_was_closed_leaves_nothing_behind(open_cache: OpenCache, tmp_path: Path) -> None:
    cache = open_cache()
    with Process() as other:
        other.run(
            "cache = kvstrata.open(directory, memory='8MiB', disk=0); cache.put('key', bytes(1 << 20))",
            directory=tmp_path / "cache",
        )
        other.run("pin = cache.pin('key'); cache.close(); pin.release()")
        cache.delete("key")
        stats = cache.stats()["memory"]
        assert (stats["clients"], stats["memory_used_bytes"]) == (1, 0)


def test_a_directory_that_is_removed_while_open_leaves_no_shared_memory(open_cache: OpenCache, tmp_path: Path) -> None:
    cache = open_cache()
    cache.put("key", b"value")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache").rmdir()
    assert cache.get("key") == b"value"
    cache.close()


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN", "lambda *_: None"])
def test_signals_do_not_disturb_the_opening(shm: Path, tmp_path: Path, handler: str) -> None:
    with Process() as process:
        process.run(
            "signal.signal(signal.SIGPROF, lambda *_: None); signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)"
        )
        process.run("cache = kvstrata.open(directory, memory='200MiB', disk=0)", directory=tmp_path / "cache")
        process.run("signal.setitimer(signal.ITIMER_PROF, 0)")


# ---- Limits


def test_places_are_taken_back_from_the_dead_when_all_are_taken(shm: Path, tmp_path: Path) -> None:
    # 128 attachments is the limit; this process has them all, and dies.
    with Process() as process:
        process.run(OPEN + "; cache.put('key', b'1')", directory=tmp_path / "cache", disk=0)
        process.run(
            "from pathlib import Path\n"
            "(file,) = Path(os.environ['KVSTRATA_SHM_DIR']).iterdir()\n"
            "stores = [kvstrata._core.Store.attach_shared(str(file)) for _ in range(127)]\n"
        )
        with pytest.raises(TierUnavailable, match="128"):
            kvstrata.open(tmp_path / "cache", memory="4MiB", disk=0)
        process.kill()
    with kvstrata.open(tmp_path / "cache", memory="4MiB", disk=0) as cache:
        cache.put("key", b"2")
        assert cache.get("key") == b"2"


@tiers
def test_a_process_without_pins_left_goes_on_but_for_pinning(open_cache: OpenCache, disk: str | int) -> None:
    cache = open_cache(disk=disk)
    cache.put("key", bytes(10_000))
    cache.put("small", b"value")
    cache.flush()
    pins = [cache.pin("key") for _ in range(8192)]
    with pytest.raises(TierUnavailable, match="8192 pins"):
        cache.pin("key")
    cache.put("another", b"1")
    assert cache.get("small") == b"value"
    assert cache.delete("small")
    for pin in pins:
        pin.release()
    cache.flush()
    cache.demote()
    assert cache.get_many(["another", "key"]) == [b"1", bytes(10_000)]


# ---- Two mappings over one directory


@tiers
def test_a_process_with_another_place_for_shared_memory_is_refused(
    open_cache: OpenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str | int
) -> None:
    # As with two containers that have a directory in common, but not /dev/shm.
    cache = open_cache(disk=disk)
    monkeypatch.setenv("KVSTRATA_SHM_DIR", str(tmp_path))
    with pytest.raises(TierUnavailable, match="another container"):
        open_cache(disk=disk)
    assert list(tmp_path.glob("kvstrata-*")) == []
    cache.put("key", b"value")


def test_an_identity_that_is_lost_while_the_cache_is_open_makes_no_second_cache(
    open_cache: OpenCache, tmp_path: Path
) -> None:
    cache = open_cache(disk="32MiB")
    (tmp_path / "cache" / "identity.json").unlink()
    with pytest.raises(TierUnavailable, match=r"identity\.json"):
        open_cache(disk="32MiB")
    cache.put("key", b"value")
    cache.close()
    assert open_cache(disk="32MiB").get("key") == b"value"


def test_a_symbolic_link_to_the_directory_leads_to_the_same_cache(open_cache: OpenCache, tmp_path: Path) -> None:
    cache = open_cache()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    open_cache(tmp_path / "link", disk=0).put("key", b"value")
    assert cache.get("key") == b"value"
    with pytest.raises(ConfigMismatch):
        open_cache(tmp_path / "link", shared=False, disk=0)


@pytest.mark.parametrize("engine", ["log", "lsm", "btree"])
def test_what_is_on_disk_can_be_read_by_its_owner_only(open_cache: OpenCache, tmp_path: Path, engine: str) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        cache = open_cache(disk="64MiB", disk_engine=engine)
        cache.put("key", b"value")
        cache.flush()
        cache.get("key")
        cache.close()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]
    assert len(files) >= 2
    for path in files:
        assert path.stat().st_mode & 0o077 == 0, path


def test_what_is_in_memory_can_be_read_by_its_owner_only(open_cache: OpenCache, shm: Path) -> None:
    open_cache(disk="32MiB").put("key", b"value")
    (file,) = shm.iterdir()
    assert file.stat().st_mode & 0o077 == 0


# ---- Stopped


@pytest.mark.parametrize("place", ["store.filled", "policy.removed", "allocator.announced", "store.pin", "store.epoch"])
def test_a_process_that_is_stopped_while_it_holds_a_lock_makes_others_fail_and_not_hang(
    shm: Path, tmp_path: Path, place: str
) -> None:
    core = build()
    variables = {"directory": tmp_path / "cache", "disk": "32MiB"}
    with Process(KVSTRATA_LOCK_TIMEOUT="0.05") as other:
        other.run(OPEN, **variables)
        other.run("ns = cache.namespace('ns'); ns.put_many({f'{i}': bytes(i * 40) for i in range(500)}); cache.flush()")
        with Process(core=core, KVSTRATA_FAILPOINT=f"{place}:20:stop") as stopped:
            stopped.run(OPEN + "; ns = cache.namespace('ns')", **variables)
            stopped.start(
                "for i in range(500):\n"
                "    with cache.namespace('versioned', version=i + 1).reserve(f'{i}', 10): pass\n"
                "    ns.put(f'{i}', bytes(i * 40)); ns.get(f'{i}', out=bytearray(20_000)); ns.delete(f'{i - 9}')\n"
            )
            os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
            try:
                # Each verb for many keys: some need the lock. It returns, or it raises within its time.
                other.run(
                    "refused = 0\n"
                    "def attempt(verb):\n"
                    "    global refused\n"
                    "    try: verb()\n"
                    "    except kvstrata.errors.TierUnavailable: refused += 1\n"
                    "    except KeyError: pass\n"
                    "for i in range(0, 500, 25):\n"
                    "    attempt(lambda: ns.get(f'{i}'))\n"
                    "    attempt(lambda: ns.get_many([f'{i}', f'{i + 1}']))\n"
                    "    attempt(lambda: ns.put(f'{i}', b'2'))\n"
                    "    attempt(lambda: ns.delete(f'{i}'))\n"
                    "    attempt(lambda: ns.pin(f'{i}').release())\n"
                    "attempt(ns.clear)\n"
                    "attempt(cache.stats)\n"
                    "attempt(lambda: cache.namespace('another'))\n"
                    "attempt(lambda: cache.flush(0.5))\n"
                )
                assert other.eval("refused") > 0
            finally:
                os.kill(stopped.pid, signal.SIGCONT)
            stopped.finish()
        other.run("ns.put('key', b'value'); cache.flush(); assert ns.get('key') == b'value'; cache.close()")
