"""Settings and fixtures that every test file shares."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import kvstrata

# A shared machine stalls at times; an example that was slow once is no failure.
settings.register_profile("kvstrata", deadline=None)
settings.load_profile("kvstrata")

OpenCache = Callable[..., kvstrata.Cache]


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of shared memory for one test's caches, which has to be empty at the test's end."""
    directory = Path(tempfile.mkdtemp(prefix="test-of-kvstrata-", dir="/dev/shm"))
    monkeypatch.setenv("KVSTRATA_SHM_DIR", str(directory))
    yield directory
    left = sorted(path.name for path in directory.iterdir())
    shutil.rmtree(directory)
    assert left == [], "shared memory was left behind"


@pytest.fixture
def open_cache(shm: Path, tmp_path: Path) -> Iterator[OpenCache]:
    """Opens caches, by default small, shared, at one path and without a disk tier, and closes them at the end.

    Nothing may be pinned or reserved by then, and the allocator must never have been misused.
    """
    opened: list[kvstrata.Cache] = []

    def open_cache(path: Path | None = tmp_path / "cache", **options: Any) -> kvstrata.Cache:
        defaults: dict[str, Any] = {"memory": "8MiB", "disk": 0 if path else None}
        opened.append(kvstrata.open(path, **defaults | options))
        return opened[-1]

    yield open_cache
    for cache in opened:
        try:
            cache.flush()  # what is being written is pinned
            stats = cache.stats()["memory"]
        except kvstrata.errors.CacheClosed:
            continue
        cache.close()
        assert (stats["pins"], stats["reservations"], stats["allocator_faults"]) == (0, 0, 0)
