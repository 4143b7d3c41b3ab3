"""Engines in processes of their own, which are told by lines of JSON what to do and answer with what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Engine", "serve", "shared_memory", "started"]

ROOT = Path(__file__).parents[2]


class Engine:
    """An engine in another process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, **options: Any) -> None:
        """Have it made, and wait until it is there."""
        self._say(options)
        self._hear()

    def ask(self, name: str, **given: Any) -> Any:
        """Have something done; returns its answer."""
        self._say([name, given])
        return self._hear()

    def first_token(self, prefix: int, length: int, tail: int, *, cached: bool) -> float:
        """Seconds to the first token, after making sure that the prefix was, or wasn't, computed before."""
        answer = self.ask("first_token", prefix=prefix, length=length, tail=tail)
        if (answer["cached"] >= length) != cached:
            raise RuntimeError(f"{answer['cached']} of {length} tokens were there, cached={cached}")
        return float(answer["seconds"])

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the engine has ended")
        return json.loads(line)

    def _say(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


@contextmanager
def started(module: str, environment: Mapping[str, str], **options: Any) -> Iterator[Engine]:
    """An engine that `module` makes of the options. What is in this process's environment goes before `environment`."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    everything = {**environment, **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=everything,
        ) as process,
    ):  # fmt: skip
        found = Engine(process)
        try:
            found.start(**options)
            yield found
        except (RuntimeError, BrokenPipeError) as error:
            process.kill()
            errors.seek(0)
            raise RuntimeError(f"{error}\n{errors.read().decode(errors='replace')[-3000:]}") from error
        finally:
            process.communicate()


@contextmanager
def shared_memory() -> Iterator[None]:
    """Put the caches' memory where it goes at the end, also what an engine that vLLM has killed left behind."""
    before = os.environ.get("KVSTRATA_SHM_DIR")
    with tempfile.TemporaryDirectory(prefix="kvstrata-bench-", dir="/dev/shm") as directory:
        os.environ["KVSTRATA_SHM_DIR"] = directory
        try:
            yield
        finally:
            os.environ.pop("KVSTRATA_SHM_DIR")
            if before is not None:
                os.environ["KVSTRATA_SHM_DIR"] = before


def serve(make: Callable[..., Any]) -> Any:
    """In the engine's process: make it of the first line, do what the others say, and return it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print
    made = make(**json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, given = json.loads(line)
        print(json.dumps(getattr(made, name)(**given)), file=answers, flush=True)
    return made
