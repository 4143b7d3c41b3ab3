"""KV that comes back through a lossy codec, in vLLM: bytes on disk, time to the first token, tokens that agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import kvstrata
from benchmarks.engines import vllm_ways as ways
from benchmarks.engines.model import saved_model
from benchmarks.engines.processes import shared_memory
from benchmarks.measure import Sample, Settings
from benchmarks.own.device import drop_page_cache
from benchmarks.quality import texts
from benchmarks.table import Row

PREFIX, COUNT = 1024, 32
LOSSY = "int8"
REMARKS = [
    f"vLLM, {LOSSY}: windows of {PREFIX:,} tokens of this project's documents, whose KV lies on disk through that "
    "codec or raw, read by a new process with the page cache dropped. Tokens that agree are those of "
    f"{COUNT} that a greedy answer has before the first that differs from the answer of an engine that has computed "
    "all KV itself.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure it beside raw KV."""
    model = saved_model(settings.directory)
    prompts = _windows(model, settings.size(24))
    with shared_memory():
        with ways.engine(model) as engine:
            expected = [engine.ask("answer", prompt=prompt, count=COUNT)["tokens"] for prompt in prompts]
        ours, raw = (_through(model, settings.directory / codec, codec, prompts, expected) for codec in (LOSSY, "raw"))
    section = f"vLLM: KV on disk through {LOSSY}, prefix of {PREFIX:,} tokens, bf16"
    return [
        Row(section, "bytes of a block on disk", ours["bytes"], "B", peer="raw", theirs=raw["bytes"]),
        Row(section, "first token, from disk, a new process", ours["seconds"], peer="raw", theirs=raw["seconds"]),
        Row(section, "first tokens that agree", ours["first"], "%"),
        Row(section, f"tokens of {COUNT} that agree", ours["agreed"], "%"),
        Row(section, f"tokens of {COUNT} that agree, raw", raw["agreed"], "%"),
    ]


def _through(
    model: Path, place: Path, codec: str, prompts: list[list[int]], expected: list[list[int]]
) -> dict[str, Sample]:
    attached = ways.kvstrata(place, codec={"disk": codec})
    with ways.engine(model, attached) as engine:
        for prompt in prompts:
            engine.ask("answer", prompt=prompt, count=1)
    with kvstrata.open(place, memory=ways.MEMORY, disk=ways.DISK) as cache:
        cache.flush()
        cache.demote()
        nbytes, records = max((used, count) for count, used in cache.below.usage().values())
    drop_page_cache(place)
    seconds, agreed = [], []
    with ways.engine(model, attached) as engine:
        for prompt, wanted in zip(prompts, expected, strict=True):
            answer = engine.ask("answer", prompt=prompt, count=COUNT)
            seconds.append(answer["seconds"])
            agreed.append(_alike(answer["tokens"], wanted))
    return {
        "bytes": Sample.of(nbytes / records),
        "seconds": Sample(tuple(seconds[1:])),
        "first": Sample.of(sum(count > 0 for count in agreed) / len(agreed)),
        "agreed": Sample.of(sum(agreed) / (COUNT * len(agreed))),
    }


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens are the same before the first that isn't."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _windows(model: Path, count: int) -> list[list[int]]:
    tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
    found: list[list[int]] = []
    for text in texts():
        ids = tokenizer.encode(text).ids
        found += [ids[start : start + PREFIX + 16] for start in range(0, len(ids) - PREFIX - 16, PREFIX + 16)]
    return found[:: max(1, len(found) // count)][:count]
