"""What a cache that can't be opened, or can't go on, says."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenCache

import kvstrata
from kvstrata.errors import ConfigError, FormatError, TierFull, UnknownOption


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"memory": "much"}, "is not a size"),
        ({"memory": "12 parsecs"}, "is not a size"),
        ({"memory": -1}, "out of range"),
        ({"memory": True}, "must be an int or a string"),
        ({"memory": "10KiB"}, "too small"),
        ({"memory": "8MiB", "disk": "1KiB"}, "too small"),
    ],
)
def test_a_size_that_can_not_be_says_what_is_wrong_with_it(tmp_path: Path, options: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        kvstrata.open(tmp_path, **options)


def test_a_disk_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="disk needs a path"):
        kvstrata.open(memory="8MiB", disk="1GiB")


def test_an_unknown_option_of_open_is_refused() -> None:
    with pytest.raises(TypeError, match="mem0ry"):
        kvstrata.open(mem0ry="8MiB")  # type: ignore[call-arg]


def test_an_unknown_policy_names_the_nearest(open_cache: OpenCache) -> None:
    with pytest.raises(UnknownOption, match=r"unknown policy 'lrru'; did you mean 'lru'"):
        open_cache(None).namespace("blocks", policy="lrru")


@pytest.mark.parametrize(
    "options",
    [
        {"version": 0},
        {"version": 1.5},
        {"ttl": 0},
        {"ttl": -1.0},
        {"ttl": "1h"},
        {"quota": 0},
        {"quota": "much"},
        {"ttl_jitter": -0.1},
        {"ttl_jitter": 2},
        {"ttl_jitter": "some"},
        {"guarantee": "7MiB"},
        {"guarantee": "2MiB", "quota": "1MiB"},
    ],
)
def test_an_option_of_a_namespace_that_can_not_be_is_refused(open_cache: OpenCache, options: Any) -> None:
    with pytest.raises(ConfigError):
        open_cache(None).namespace("blocks", **options)


@pytest.mark.parametrize("name", ["", "x" * 129, 7, "\ud800"])
def test_a_namespace_has_a_name_of_1_to_128_bytes(open_cache: OpenCache, name: Any) -> None:
    with pytest.raises(ConfigError, match="name"):
        open_cache(None).namespace(name)


def test_a_path_below_a_file_can_not_be_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="can't use"):
        kvstrata.open(tmp_path / "file" / "cache", memory="8MiB")


def test_a_path_that_may_not_be_written_can_not_be_a_cache() -> None:
    with pytest.raises(ConfigError, match="can't use"):
        kvstrata.open("/proc/1/cache", memory="8MiB")


def test_an_identity_of_a_newer_format_is_refused_and_kept(open_cache: OpenCache, tmp_path: Path) -> None:
    open_cache().close()
    identity = tmp_path / "cache" / "identity.json"
    newer = json.dumps(json.loads(identity.read_text()) | {"format": 9})
    identity.write_text(newer)
    with pytest.raises(FormatError, match="format 9"):
        open_cache()
    assert identity.read_text() == newer


def test_shared_memory_of_a_newer_format_is_refused_while_in_use(open_cache: OpenCache, shm: Path) -> None:
    cache = open_cache()
    (file,) = shm.iterdir()
    with file.open("r+b") as mapping:
        mapping.seek(8)
        mapping.write(struct.pack("<I", 9))
    with pytest.raises(FormatError, match="format 9"):
        open_cache()
    with file.open("r+b") as mapping:
        mapping.seek(8)
        mapping.write(struct.pack("<I", 1))
    cache.put("a", b"1")


@pytest.fixture
def small_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 6 MiB in the place of /dev/shm."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("mounting a small file system needs the rights of root")
    monkeypatch.setenv("KVSTRATA_SHM_DIR", str(place))
    yield place
    left = sorted(path.name for path in place.iterdir())
    subprocess.run(["umount", place], check=True)
    assert left == []


def test_too_little_shared_memory_is_an_error_at_opening(small_memory: Path, tmp_path: Path) -> None:
    with pytest.raises(TierFull, match=r"no room .*open with less memory, make .* larger .*KVSTRATA_SHM_DIR") as caught:
        kvstrata.open(tmp_path / "cache", memory="64MiB", disk=0)
    assert caught.value.need == 64 << 20
    with kvstrata.open(tmp_path / "cache", memory="2MiB", disk=0) as cache:
        cache.put("a", b"1")
        assert cache.get("a") == b"1"


def test_an_index_that_can_not_grow_any_more_evicts(small_memory: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path / "cache", memory="2MiB", disk=0) as cache:
        filler = small_memory / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:  # until there's nothing left
            while file.write(bytes(4096)):
                pass
        for i in range(20_000):
            cache.put(f"key {i}", b"x")
        assert cache.get("key 19999") == b"x"
        filler.unlink()
