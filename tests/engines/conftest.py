"""What the tests of all engines share: `make test-engines` requires the engines, other runs skip what isn't there."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.models import kept_model
from support.processes import Process

from engines.vllm_control import Engine

REQUIRED = os.environ.get("KVSTRATA_ENGINES") == "required"
PATIENCE_S = 240.0  # for an engine to come up beside other work

Start = Callable[..., Engine]


def need(engine: str) -> None:
    """Skip the module that calls it where an engine isn't installed, or fail where it has to be."""
    if importlib.util.find_spec(engine) is None:
        if REQUIRED:
            pytest.fail(f"{engine} is not installed", pytrace=False)
        pytest.skip(f"{engine} is not installed: make test-engines", allow_module_level=True)


@pytest.fixture(scope="session")
def with_vllm() -> Iterator[Process]:
    """A process that has imported vLLM, which takes longer than anything else. Processes with engines are its forks."""
    need("vllm")
    with Process(patience=PATIENCE_S) as process:
        process.run("from engines import vllm_engine\nvllm_engine.import_all()")
        yield process
        process.kill()


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest, with_vllm: Process) -> Path:
    """SmolLM2-135M-Instruct in fp32 as a directory of safetensors, kept for later runs."""

    def save(directory: str) -> None:
        with with_vllm.fork() as other:
            other.run("from kvstrata.demo import model\nmodel.save(*model.load('float32'), path)", path=directory)

    return kept_model(request.config, save)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for caches, and one for their shared memory."""
    directory = tmp_path_factory.mktemp("vllm")
    shared = Path(tempfile.mkdtemp(prefix="test-of-kvstrata-", dir="/dev/shm"))
    (directory / "shm").symlink_to(shared)
    yield directory
    left = sorted(path.name for path in shared.iterdir())
    shutil.rmtree(shared)
    assert left == [], "shared memory was left behind"


@pytest.fixture(scope="module")
def starting_vllm(place: Path, model: Path, with_vllm: Process) -> Iterator[Start]:
    """Begins to start an engine, whose process's `finish` waits for it.

    Python's own hashes differ in one that is `unlike` the others.
    """
    with ExitStack() as stack:

        def start(
            path: str | None,
            *,
            kind: str = "connector",
            environment: dict[str, str] | None = None,
            connector: dict[str, Any] | None = None,
            unlike: bool = False,
            **options: Any,
        ) -> Engine:
            begin = functools.partial(Process, patience=PATIENCE_S) if unlike else with_vllm.fork
            process = begin(KVSTRATA_SHM_DIR=str(place / "shm"), **(environment or {}))
            stack.callback(process.__exit__)
            if path is not None:
                options["kv_transfer_config"] = None  # made there
            process.start(
                "from engines import vllm_engine\n"
                f"if path: options['kv_transfer_config'] = vllm_engine.{kind}(path, **extra)\n"
                "engine = vllm_engine.Engine(model, **options)",
                path=path and str(place / path), extra=connector or {}, options=options,
                model=options.pop("model", str(model)),
            )  # fmt: skip
            return Engine(process)

        yield start


# ---- Of the three engines that a module starts, in its fixture `engines`


@pytest.fixture(scope="module")
def plain(engines: dict[str, Engine]) -> Engine:
    return engines["plain"]


@pytest.fixture(scope="module")
def first(engines: dict[str, Engine]) -> Engine:
    return engines["first"]


@pytest.fixture(scope="module")
def second(engines: dict[str, Engine]) -> Engine:
    return engines["second"]


def make_random_model(with_vllm: Process, path: Path, kind: str, config: str, **options: Any) -> str:
    """Write a model of random weights, of the classes of transformers with those names."""
    sizes = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    with with_vllm.fork() as other:
        other.run(
            "import torch, transformers\ntorch.manual_seed(0)\n"
            "made = getattr(transformers, config)(**options)\n"
            "getattr(transformers, kind)(made).save_pretrained(path)",
            path=str(path), kind=kind, config=config, options=sizes | options,
        )  # fmt: skip
    return str(path)
