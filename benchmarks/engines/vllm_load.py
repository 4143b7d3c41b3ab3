"""What kvstrata costs vLLM when nothing is found, and what it saves where many users go on talking."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from benchmarks.engines import vllm_ways as ways
from benchmarks.engines.model import KV_BYTES, saved_model
from benchmarks.engines.processes import shared_memory
from benchmarks.measure import Sample, Settings
from benchmarks.table import Row

PROMPTS, PROMPT, ANSWER = 2, 512, 32
USERS, TURNS, DOCUMENTS, DOCUMENT = 20, 5, 10, 512
ENGINE_TOKENS = 4096
ROUNDS = 5
REMARKS = [
    f"vLLM, nothing found: {PROMPTS} prompts of {PROMPT} tokens at once, {ANSWER} tokens each, with everything stored.",
    f"vLLM, conversations: {USERS} users in {TURNS} turns over {DOCUMENTS} documents of {DOCUMENT} tokens, 4 at a "
    f"time; the engine holds the KV of {ENGINE_TOKENS:,} tokens. Recomputed are tokens of prompts that weren't found. "
    f"{ROUNDS} rounds, of other documents and users each, with an engine that is started for it, since one takes up "
    "to 3 % longer than another of its kind for as long as it lives; with `--quick` one.",
]


def rows(settings: Settings) -> list[Row]:
    """Measure both."""
    model = saved_model(settings.directory)
    with shared_memory():
        return [*_nothing_found(model, settings), *_conversations(model, settings)]


def _nothing_found(model: Any, settings: Settings) -> list[Row]:
    times: dict[str, list[float]] = {"alone": [], "ours": []}
    with ExitStack() as stack:
        engines = {
            "alone": stack.enter_context(ways.engine(model)),
            "ours": stack.enter_context(ways.engine(model, ways.kvstrata(settings.directory / "unique"))),
        }
        for turn in range(settings.repeats(36) + 1):
            for name in sorted(engines, reverse=bool(turn % 2)):
                given = {"requests": PROMPTS, "length": PROMPT, "count": ANSWER}
                taken = engines[name].ask("unique", seed=1 + turn, **given)
                if turn:
                    times[name].append(taken)
    tokens = PROMPTS * (PROMPT + ANSWER)
    ours, alone = (Sample(tuple(tokens / taken for taken in times[name])) for name in ("ours", "alone"))
    return [
        Row("vLLM: nothing is found", "tokens per second, kvstrata attached", ours, "tokens/s", peer="vLLM alone",
            theirs=alone, at_least=0.98)
    ]  # fmt: skip


def _conversations(model: Any, settings: Settings) -> list[Row]:
    attached_by = {
        "alone": None,
        "ours": ways.kvstrata(settings.directory / "turns"),
        "offloading": ways.offloading([]),
    }
    small = {"kv_cache_memory_bytes": ENGINE_TOKENS * KV_BYTES, "max_model_len": 2048}
    given = {"users": USERS, "turns": TURNS, "documents": DOCUMENTS, "length": DOCUMENT, "at_once": 4}
    found: dict[str, list[Any]] = {name: [] for name in attached_by}
    for seed in range(1, 1 + (1 if settings.quick else ROUNDS)):
        for name in sorted(attached_by, reverse=bool(seed % 2)):
            with ways.engine(model, attached_by[name], **small) as engine:
                time.sleep(ways.ASLEEP_S)
                found[name].append(engine.ask("turns", seed=seed, **given))
    section = "vLLM: conversations that don't fit the engine's memory"
    result: list[Row] = []
    for name, peer in (("alone", "vLLM alone"), ("offloading", "OffloadingConnector")):
        ours, theirs = found["ours"], found[name]
        alone = name == "alone"
        result += [
            Row(section, "tokens recomputed", _each(ours, "recomputed"), "tokens", peer=peer,
                theirs=_each(theirs, "recomputed"), at_least=2 if alone else None),
            Row(section, "total time", _each(ours, "seconds"), peer=peer, theirs=_each(theirs, "seconds"),
                at_least=None if alone else 1),
            Row(section, "first token, p50", _quantile(ours, 0.5), peer=peer, theirs=_quantile(theirs, 0.5)),
            Row(section, "first token, p90", _quantile(ours, 0.9), peer=peer, theirs=_quantile(theirs, 0.9)),
        ]  # fmt: skip
    return result


def _each(rounds: list[Any], figure: str) -> Sample:
    return Sample(tuple(one[figure] for one in rounds))


def _quantile(rounds: list[Any], part: float) -> Sample:
    ordered = [sorted(one["first"]) for one in rounds]
    return Sample(tuple(first[min(len(first) - 1, int(part * len(first)))] for first in ordered))
