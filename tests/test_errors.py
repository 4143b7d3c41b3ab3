"""What bad input and faults get: an error that says what to do, and nothing lost. test_opening_errors.py has more."""

from __future__ import annotations

import os
import pickle
import re
import sqlite3
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OpenCache
from support.processes import Process

import kvstrata
from kvstrata import errors
from kvstrata.errors import ConfigError, FormatError, InvalidValue, TierFull, TierUnavailable

DISK = {"memory": "4MiB", "disk": "32MiB"}


def instance(name: str) -> Exception:
    arguments: dict[str, tuple[Any, ...]] = {
        "PrefixShortened": (64, 3),
        "TierFull": ("memory", 100, 10),
        "UnknownOption": ("policy", "lrru", ["lru", "lfu"]),
        "MissingExtra": ("transformers", "torch"),
    }
    error: Exception = getattr(errors, name)(*arguments.get(name, ("what is wrong",)))
    return error


# ---- The errors themselves


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_gets_to_another_process_as_it_is(name: str) -> None:
    error = instance(name)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_a_full_tier_tells_which_and_by_how_much(open_cache: OpenCache) -> None:
    with pytest.raises(TierFull) as caught:
        open_cache(None, memory="2MiB").put("key", bytes(3 << 20))
    assert caught.value.tier == "memory"
    assert caught.value.need > 3 << 20
    assert caught.value.free <= 2 << 20


# ---- Values and arguments


def test_a_value_larger_than_the_disk_tier_stays_in_memory(open_cache: OpenCache) -> None:
    cache = open_cache(memory="16MiB", disk="4MiB")
    cache.put("large", bytes(6 << 20))
    cache.put("small", b"value")
    cache.flush()
    assert cache.get("large") == bytes(6 << 20)
    cache.demote()
    assert cache.get_many(["large", "small"]) == [bytes(6 << 20), b"value"]
    assert cache.stats()["disk"]["failed_records"] == 1


@pytest.mark.parametrize("nbytes", [-1, 1.5, "10", None, 1 << 70])
def test_a_reservation_of_what_is_no_size_is_refused(open_cache: OpenCache, nbytes: Any) -> None:
    with pytest.raises(InvalidValue, match="nbytes"), open_cache(None).reserve("key", nbytes):
        pass


@pytest.mark.parametrize("ttl", [0, -1, "1h", float("nan"), float("inf"), 1e300, True])
def test_a_time_to_live_that_can_not_be_is_refused(open_cache: OpenCache, ttl: Any) -> None:
    cache = open_cache(None)
    cache.put("key", b"old")
    for put in (lambda: cache.put("key", b"new", ttl=ttl), lambda: cache.put_many({"key": b"new"}, ttl=ttl)):
        with pytest.raises(ConfigError, match="ttl"):
            put()
    with pytest.raises(ConfigError, match="ttl"), cache.reserve("key", 1, ttl=ttl):
        pass
    assert cache.get("key") == b"old"


@pytest.mark.parametrize("cost", ["much", b"1", [1.0], float("nan"), np.float32("nan")])
def test_a_cost_that_is_no_number_is_refused(open_cache: OpenCache, cost: Any) -> None:
    cache = open_cache(None)
    for put in (lambda: cache.put("key", b"1", cost=cost), lambda: cache.put_many({"key": b"1"}, cost=cost)):
        with pytest.raises(InvalidValue, match="cost"):
            put()
    with pytest.raises(InvalidValue, match="cost"), cache.reserve("key", 1, cost=cost):
        pass
    assert cache.get("key") is None


def test_a_cost_may_be_any_number(open_cache: OpenCache) -> None:
    cache = open_cache(None)
    for cost in (0, 1, -2.5, 1e300, np.float32(3), float("inf")):
        cache.put("key", b"1", cost=cost)
    assert cache.get("key") == b"1"


def test_an_array_of_objects_is_no_value(open_cache: OpenCache) -> None:
    cache = open_cache(None)
    for value in (np.array([object()]), np.zeros(2, [("number", "i4"), ("object", object)])):
        with pytest.raises(InvalidValue, match="objects"):
            cache.put("key", value)
    fields = np.ones(3, [("OP&", "f4"), ("P", "i8")])
    cache.put("key", fields)
    assert cache.get("key") == fields.tobytes()
    into = np.array([None])
    for key in ("key", "absent"):
        with pytest.raises(InvalidValue, match="out"):
            cache.get_many([key, "key"], out=[into, into])
    with pytest.raises(InvalidValue, match="out"):
        cache.get("key", out=into)
    assert into[0] is None


def test_an_array_that_gives_no_bytes_is_told_what_to_do(open_cache: OpenCache) -> None:
    cache = open_cache(None)
    days = np.array(["2026-01-01", "2026-01-02"], "M8[D]")
    with pytest.raises(InvalidValue, match="view"):
        cache.put("key", days)
    cache.put("key", days.view("u1"))
    assert cache.get("key") == days.tobytes()


def test_more_memory_than_a_cache_can_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory"):
        kvstrata.open(memory="300GiB")


@pytest.mark.parametrize("path", [None, "cache"], ids=["private", "shared"])
def test_more_memory_than_the_machine_has_is_refused_before_any_is_taken(
    shm: Path, tmp_path: Path, path: str | None
) -> None:
    with Process() as process:  # which may not make large files: nobody is to die if this is broken
        process.run(
            "import resource\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))\n"
            "memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') + (1 << 30)\n"
            "try:\n"
            "    kvstrata.open(path, memory=min(memory, 255 << 30), disk=0)\n"
            "except kvstrata.errors.TierFull as error:\n"
            "    assert error.tier.startswith('memory')\n"
            "else:\n"
            "    raise AssertionError('it was made')\n",
            path=path and tmp_path / path,
        )


def test_the_namespace_of_the_cache_itself_stays_at_its_version(open_cache: OpenCache) -> None:
    # At another version of it, no cache could be opened any more.
    cache = open_cache()
    with pytest.raises(ConfigError, match="default"):
        cache.namespace("default", version=2)
    cache.namespace("default").put("key", b"value")
    assert open_cache().get("key") == b"value"


# ---- Places


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_something_else_in_the_place_of_the_mapping_is_an_error(
    shm: Path, open_cache: OpenCache, tmp_path: Path, kind: str
) -> None:
    with open_cache() as cache:
        cache.put("key", b"value")
        (mapping,) = shm.iterdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"not ours")
    if kind == "link":
        mapping.symlink_to(victim)
    else:
        mapping.mkdir()
    with pytest.raises(TierUnavailable, match=re.escape(str(shm))):
        open_cache()
    assert victim.read_bytes() == b"not ours"
    if kind == "link":
        mapping.unlink()
    else:
        mapping.rmdir()
    open_cache().put("key", b"value")


def test_a_place_for_shared_memory_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_SHM_DIR", str(tmp_path / "absent"))
    with pytest.raises(TierUnavailable, match="absent"):
        kvstrata.open(tmp_path / "cache", memory="4MiB", disk=0)


@pytest.mark.parametrize("name", ["users.lock", "setup.lock", "identity.json"])
def test_a_directory_in_the_place_of_a_file_is_an_error(open_cache: OpenCache, tmp_path: Path, name: str) -> None:
    open_cache(**DISK).close()
    (tmp_path / "cache" / name).unlink()
    (tmp_path / "cache" / name).mkdir()
    with pytest.raises(ConfigError, match="can't use"):
        open_cache(**DISK)
    (tmp_path / "cache" / name).rmdir()
    open_cache(**DISK).put("key", b"value")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "mounted"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", place]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs the rights of root")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path) -> Path:
    filler = place / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def test_a_place_that_is_read_only_can_not_be_a_cache(mounted: Path, shm: Path) -> None:
    with kvstrata.open(mounted / "cache", memory="2MiB", disk=0) as cache:
        cache.put("key", b"value")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    for name in ("cache", "another"):
        with pytest.raises(ConfigError, match="Read-only"):
            kvstrata.open(mounted / name, memory="2MiB", disk=0)


def test_a_full_disk_costs_durability_and_nothing_else(mounted: Path, shm: Path) -> None:
    keys = [f"key {i}" for i in range(100)]
    with kvstrata.open(mounted / "cache", memory="4MiB", disk="64MiB") as cache:
        cache.put("early", b"value")
        cache.flush()
        filler = fill(mounted)
        cache.put_many({key: os.urandom(20_000) for key in keys})
        values = cache.get_many(keys)
        assert None not in values
        cache.flush()
        assert cache.get_many(keys) == values
        assert sum(count for name, count in cache.stats()["disk"].items() if name.startswith("error")) > 0
        filler.unlink()
        written, until = cache.stats()["disk"]["written_records"], time.monotonic() + 60
        while cache.stats()["disk"]["written_records"] == written:  # the breaker may have opened
            assert time.monotonic() < until
            cache.put("late", b"value")
            cache.flush()
    with kvstrata.open(mounted / "cache", memory="4MiB", disk="64MiB") as cache:
        assert cache.get_many(["late", "early"]) == [b"value", b"value"]


def test_a_full_disk_at_opening_is_an_error(mounted: Path, shm: Path) -> None:
    filler = fill(mounted)
    for disk in (0, "16MiB"):
        with pytest.raises(errors.KVStrataError, match=r"[Nn]o space|no room"):
            kvstrata.open(mounted / "cache", memory="2MiB", disk=disk)
    filler.unlink()
    with kvstrata.open(mounted / "cache", memory="2MiB", disk="16MiB") as cache:
        cache.put("key", b"value")


def test_a_second_process_needs_little_shared_memory_and_says_when_there_is_none(
    mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_SHM_DIR", str(mounted))
    with kvstrata.open(tmp_path / "cache", memory="2MiB", disk=0) as cache:
        cache.put("key", b"value")
        filler = fill(mounted)
        with pytest.raises(TierFull):
            kvstrata.open(tmp_path / "cache", memory="2MiB", disk=0)
        assert cache.get("key") == b"value"
        filler.unlink()
        with kvstrata.open(tmp_path / "cache", memory="2MiB", disk=0) as other:
            assert other.get("key") == b"value"


@pytest.mark.parametrize("remote", [(), "redis://127.0.0.1:1"], ids=["alone", "with a tier elsewhere"])
def test_a_process_out_of_descriptors_says_so(shm: Path, tmp_path: Path, remote: str | tuple[str, ...]) -> None:
    with Process() as process:
        process.run(
            "import resource\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
            "taken = []\n"
            "try:\n"
            "    while True: taken.append(os.open('/dev/null', os.O_RDONLY))\n"
            "except OSError: pass\n"
            "refused = 0\n"
            "for spare in range(20):\n"
            "    try:\n"
            "        kvstrata.open(directory, memory='2MiB', disk='16MiB', remote=remote).close()\n"
            "        break\n"
            "    except kvstrata.errors.KVStrataError:\n"
            "        refused += 1\n"
            "    os.close(taken.pop())\n"
            "assert 0 < refused < 20, refused\n",
            directory=tmp_path / "cache",
            remote=remote,
        )


# ---- Files of a later release


def test_a_catalog_of_a_newer_format_is_refused_and_kept(open_cache: OpenCache, tmp_path: Path) -> None:
    with open_cache(**DISK) as cache:
        cache.put("key", b"value")
    (catalog,) = (tmp_path / "cache").glob("catalog-*.db")

    def write_format(number: int) -> None:
        connection = sqlite3.connect(catalog)
        with connection:
            connection.execute(f"PRAGMA user_version={number}")
            connection.execute("UPDATE meta SET value=? WHERE name='format'", (number,))
        connection.close()

    write_format(7)
    with pytest.raises(FormatError, match=r"format 7.*\b1\b"):
        open_cache(**DISK)
    write_format(1)
    assert open_cache(**DISK).get("key") == b"value"


def test_a_mapping_of_a_newer_format_is_replaced_when_nobody_uses_it(
    shm: Path, open_cache: OpenCache, tmp_path: Path
) -> None:
    with Process() as process:
        process.run("cache = kvstrata.open(directory, memory='8MiB', disk=0)", directory=tmp_path / "cache")
        process.kill()
    (mapping,) = shm.iterdir()
    with mapping.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", 9))
    cache = open_cache()
    cache.put("key", b"value")
    assert cache.get("key") == b"value"
