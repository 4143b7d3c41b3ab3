"""Huge pages: really huge where the kernel gives them, and told why where it doesn't."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import OpenCache
from support.processes import Process

from kvstrata.errors import ConfigError

MIB = 1 << 20
SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def bytes_in_huge_pages() -> int:
    """Return how much of this process's shared memory is mapped by huge pages."""
    return 1024 * sum(map(int, re.findall(r"ShmemPmdMapped:\s+(\d+) kB", Path("/proc/self/smaps").read_text())))


def kernel_gives_huge_pages() -> bool:
    """Whether what the README asks for is there."""
    major, minor = map(int, re.findall(r"\d+", Path("/proc/sys/kernel/osrelease").read_text())[:2])
    return (major, minor) >= (6, 1) and SHMEM.exists() and "[deny]" not in SHMEM.read_text()


@pytest.mark.skipif(not kernel_gives_huge_pages(), reason="Linux older than 6.1, or shmem_enabled says deny")
@pytest.mark.parametrize("private", [True, False])
def test_the_memory_lies_in_huge_pages_in_both_mappings(open_cache: OpenCache, tmp_path: Path, private: bool) -> None:
    before = bytes_in_huge_pages()
    cache = open_cache(None if private else tmp_path / "cache", memory="32MiB", huge_pages=True)
    assert bytes_in_huge_pages() - before >= 2 * 30 * MIB
    cache.put_many({str(i): bytes([i]) * MIB for i in range(40)})
    assert cache.get("39") == bytes([39]) * MIB
    with cache.pin("39") as view:
        assert view.readonly


@pytest.mark.skipif(not kernel_gives_huge_pages(), reason="Linux older than 6.1, or shmem_enabled says deny")
def test_it_is_no_option_that_all_have_to_agree_on(open_cache: OpenCache, tmp_path: Path) -> None:
    small = open_cache(tmp_path / "cache", memory="32MiB")
    small.put("a", bytes(MIB))
    before = bytes_in_huge_pages()
    large = open_cache(tmp_path / "cache", memory="32MiB", huge_pages=True)
    assert bytes_in_huge_pages() - before >= 2 * 30 * MIB
    assert large.get("a") == bytes(MIB)
    later = open_cache(tmp_path / "cache", memory="32MiB")
    assert later.get("a") == bytes(MIB)


def test_too_little_memory_for_them_is_told(open_cache: OpenCache) -> None:
    with pytest.raises(ConfigError, match="memory=1,048,576 bytes is too little"):
        open_cache(None, memory="1MiB", huge_pages=True)


def test_a_refusal_says_what_to_do_and_leaves_nothing_behind(shm: Path, tmp_path: Path) -> None:
    with Process() as process:
        process.run(
            "import ctypes, kvstrata\n"
            "assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE\n"
            "for path in (None, directory / 'cache'):\n"
            "    try:\n"
            "        kvstrata.open(path, memory='32MiB', disk=None if path is None else 0, huge_pages=True)\n"
            "    except kvstrata.errors.ConfigError as error:\n"
            "        assert 'PR_SET_THP_DISABLE' in str(error), error\n"
            "    else:\n"
            "        raise AssertionError('it was not refused')\n",
            directory=tmp_path,
        )
        assert list(shm.iterdir()) == []


@pytest.mark.parametrize(
    ("errno", "setting", "advice"),
    [
        (22, "always [deny] force", "echo advise >"),
        (22, "always [never]", "Linux 6.1"),
        (12, "[always]", "compact_memory"),
        (11, "[always]", "compact_memory"),
    ],
)
def test_each_refusal_has_its_own_advice(
    open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch, errno: int, setting: str, advice: str
) -> None:
    from kvstrata import tiers

    def refuse(_: object) -> None:
        raise OSError(errno, "refused")

    cache = open_cache(None, memory="8MiB")
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: setting if path == SHMEM else read(path))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(cache.tiers.memory, "store", type("Refusing", (), {"use_huge_pages": refuse})())
    with pytest.raises(ConfigError, match=advice):
        tiers.memory.MemoryTier.use_huge_pages(cache.tiers.memory)
    monkeypatch.undo()
