"""Time to the first token in llama.cpp: cold, from its own context, from kvstrata, and from llama_cpp's own cache."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.engines.model import LENGTHS
from benchmarks.engines.processes import Engine, shared_memory, started
from benchmarks.measure import Sample, Settings
from benchmarks.own.device import drop_page_cache
from benchmarks.table import Row
from kvstrata.demo.model import model_file

MEMORY, DISK = "1GiB", "4GiB"
OWN, RAM = "what the context still holds", "LlamaRAMCache"
REMARKS = [
    "llama.cpp: SmolLM2-135M-Instruct's GGUF by llama-cpp-python, KV in fp16, a prefix and 16 tokens more, from the "
    "call of create_completion to the logits of the first token, in a process of its own. LlamaRAMCache lives in one "
    "process. "
    '"A new process" has never seen the prefix; what it finds was stored by another one. "The state set": what '
    "llama.cpp takes to copy the state of the prefix into its context from the same process's memory, the only way in.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure all of it."""
    repeats = settings.repeats(12)
    with shared_memory():
        times = {length: _times(settings.directory / str(length), length, repeats) for length in LENGTHS}
    found: list[Row] = []
    for length, by_way in times.items():
        section = f"llama.cpp: time to first token, prefix of {length:,} tokens, fp16"
        at = {way: Sample(tuple(values)) for way, values in by_way.items()}
        memory = "from memory, the context empty"
        found += [
            Row(section, memory, at["memory"], peer=OWN, theirs=at["own"], at_least=1 / 1.1),
            Row(section, "the state set, and that", at["own and a state"], peer=OWN, theirs=at["own"]),
            Row(section, memory, at["memory"], peer=RAM, theirs=at["ram"]),
            Row(section, memory, at["memory"], peer="cold", theirs=at["cold"]),
            Row(section, "a new process, memory shared with another", at["new"], peer="cold", theirs=at["cold"]),
            Row(section, "a new process, from disk, page cache dropped", at["disk"], peer="cold", theirs=at["cold"]),
        ]
    return found


def _engine(cache: Path | str | None) -> Any:
    options: dict[str, Any] = {} if cache is None else {"cache": str(cache), "memory": MEMORY, "disk": DISK}
    return started("benchmarks.engines.llama_child", {}, model=str(model_file()), **options)


def _seconds(engine: Engine, **given: Any) -> float:
    return float(engine.ask("first_token", **given)["seconds"])


def _times(place: Path, length: int, repeats: int) -> dict[str, list[float]]:
    ways = ("cold", "own", "own and a state", "memory", "ram", "new", "disk")
    times: dict[str, list[float]] = {way: [] for way in ways}
    samples = max(3, repeats // 2)
    with ExitStack() as stack:
        alone, ram, ours, other = (stack.enter_context(_engine(cache)) for cache in (None, "ram", place, place))
        for engine in (alone, ram, ours):
            _seconds(engine, prefix=length, length=length, tail=0)
        for turn in range(repeats):
            given = {"prefix": length, "length": length, "tail": 1 + turn}
            if turn % 4 == 0:
                times["cold"].append(_seconds(alone, **given))
            times["own"].append(_seconds(alone, **given | {"tail": 100 + turn}, forget=False))
            times["own and a state"].append(times["own"][-1] + float(alone.ask("set_state")))
            times["memory"].append(ours.first_token(**given, cached=True))
            times["ram"].append(_seconds(ram, **given))
        for number in range(samples + 1):  # the first one warms the process that has seen nothing
            given = {"prefix": length * 10 + number, "length": length, "tail": 0}
            ours.first_token(**given, cached=False)
            times["new"].append(other.first_token(**given | {"tail": 1}, cached=True))
        del times["new"][0]
        ours.ask("flush")
    drop_page_cache(place)
    with _engine(place) as engine:
        for number in range(samples + 1):
            given = {"prefix": length * 10 + number, "length": length, "tail": 2}
            times["disk"].append(engine.first_token(**given, cached=True))
    del times["disk"][0]
    return times
