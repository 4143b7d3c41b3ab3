"""KVStrataConnector in an engine that drafts tokens with a model whose KV is stored and loaded, too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Process

from engines.conftest import Start, make_random_model, need
from engines.vllm_control import BLOCK, Engine

need("vllm")

pytestmark = pytest.mark.timeout(600)

LENGTH, COUNT = 200, 40


@pytest.fixture(scope="module")
def engine(starting_vllm: Start, place: Path, with_vllm: Process) -> Iterator[Engine]:
    """One that loads layer by layer, those of the model that drafts last, and has events to tell."""
    target, draft = (
        make_random_model(with_vllm, place / name, "LlamaForCausalLM", "LlamaConfig", num_hidden_layers=layers)
        for name, layers in (("target", 4), ("draft", 1))
    )
    engine = starting_vllm(
        "cache", model=target, skip_tokenizer_init=True, max_model_len=512, kv_cache_memory_bytes=4 << 20,
        connector={"load": "layerwise"}, async_scheduling=False,
        kv_events_config={"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"ipc://{place}/events"},
        speculative_config={"method": "draft_model", "model": draft, "num_speculative_tokens": 2},
    )  # fmt: skip
    engine.process.finish()
    yield engine
    assert engine.process.exit() == 0


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(10, 500), k=LENGTH)


def forget(engine: Engine) -> None:
    """Let it lose its own prefix cache, and have something else in every block that it had."""
    for seed in range(100, 110):
        engine.tokens(prompt(seed), count=1)
    engine.forget()


def test_the_kv_of_both_models_is_loaded(engine: Engine) -> None:
    cold = engine.tokens(prompt(1), count=COUNT)
    forget(engine)

    warm, counted = engine.counted(prompt(1), count=COUNT)

    assert warm == cold
    assert (counted["loaded_blocks"], counted["missed_blocks"]) == (LENGTH // BLOCK, 0)


def test_no_token_is_accepted_that_was_computed_with_blocks_that_could_not_be_loaded(engine: Engine) -> None:
    """vLLM asks which they are before the layers of the model that drafts have been waited for."""
    cold = engine.tokens(prompt(2), count=COUNT)
    forget(engine)
    engine.break_loads(True)

    again, counted = engine.counted(prompt(2), count=COUNT)
    engine.break_loads(False)

    assert again == cold
    assert counted["missed_blocks"] == LENGTH // BLOCK


def test_after_a_load_that_failed_no_event_is_waited_for(engine: Engine) -> None:
    engine.tokens(prompt(3), count=COUNT)
    forget(engine)
    engine.break_loads(True)

    engine.tokens(prompt(3), count=COUNT)  # and steps, as long as the connector asks for them
    engine.break_loads(False)
