"""KVStrataConnector and models in which some layers see a window of the tokens: the same tokens with and without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.processes import Process, RemoteError

from engines.conftest import Start, make_random_model, need
from engines.vllm_control import BLOCK, Engine

need("vllm")

pytestmark = pytest.mark.timeout(600)

WINDOW = 2 * BLOCK + 1  # a token that is computed again sees one of another block
LENGTH = 400
COUNT = 100
BLOCKS = LENGTH // BLOCK  # that are loaded for a prompt of that length
GROUPS = 3  # one of layers that see all tokens, two of layers that see a window
LOADED = BLOCKS + (GROUPS - 1) * WINDOW // BLOCK  # of the latter only the window


@pytest.fixture(scope="module")
def tiny(place: Path, with_vllm: Process) -> str:
    return make_model(place / "tiny", ["sliding_attention", "sliding_attention", "full_attention"] * 2, with_vllm)


@pytest.fixture(scope="module")
def engines(starting_vllm: Start, place: Path, tiny: str) -> dict[str, Engine]:
    """An engine without kvstrata, and two that share a cache; the second has little memory, and computes in chunks."""
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"ipc://{place}/events"}
    options = {"model": tiny, "skip_tokenizer_init": True, "max_model_len": 1024}
    found = {
        "plain": starting_vllm(None, **options, kv_cache_memory_bytes=32 << 20),
        "first": starting_vllm("cache", **options, kv_cache_memory_bytes=32 << 20, kv_events_config=events),
        "second": starting_vllm("cache", **options, kv_cache_memory_bytes=3 << 20, max_num_batched_tokens=128,
                                max_num_seqs=16),
    }  # fmt: skip
    for engine in found.values():
        engine.process.finish()
    found["first"].spoil_unused()
    found["second"].spoil_unused()
    return found


def make_model(path: Path, layers: list[str], with_vllm: Process) -> str:
    """A model of random weights, large enough for what is said to depend on all of a prompt."""
    return make_random_model(
        with_vllm, path, "Gemma3ForCausalLM", "Gemma3TextConfig", num_hidden_layers=len(layers), layer_types=layers,
        query_pre_attn_scalar=32, sliding_window=WINDOW,
    )  # fmt: skip


def prompt(seed: int, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(10, 500), k=length)


def twice(engine: Engine, tokens: list[int]) -> tuple[list[list[int]], dict[str, int], tuple[Any, dict[str, int]]]:
    """An answer and what was counted for it, and both once more when the engine has forgotten the prompt again."""
    again, counted = engine.counted(tokens, count=COUNT)
    engine.forget()
    return again, counted, engine.counted(tokens, count=COUNT)


def group_of(engine: Engine, *, window: bool) -> int:
    return next(number for number, tokens in enumerate(engine.windows()) if (tokens is not None) == window)


def test_the_engine_keeps_layers_with_a_window_apart_and_two_processes_share_all(
    plain: Engine, first: Engine, second: Engine
) -> None:
    tokens = prompt(1)
    (expected,) = plain.tokens(tokens, count=COUNT)

    (cold,), stored = first.counted(tokens, count=COUNT)
    (warm,), loaded = second.counted(tokens, count=COUNT)

    assert sorted(first.windows(), key=str) == [WINDOW, WINDOW, None]
    assert cold == warm == expected
    assert (stored["stored_blocks"], stored["loaded_blocks"]) == (GROUPS * ((LENGTH + COUNT - 1) // BLOCK), 0)
    assert (loaded["stored_blocks"], loaded["loaded_blocks"]) == (0, LOADED)


def test_what_the_engine_has_forgotten_is_loaded_again(plain: Engine, first: Engine) -> None:
    tokens = prompt(2)
    expected = plain.tokens(tokens, count=COUNT)
    assert first.tokens(tokens, count=COUNT) == expected
    first.forget()

    again, counted = first.counted(tokens, count=COUNT)

    assert again == expected
    assert (counted["loaded_blocks"], counted["missed_blocks"]) == (LOADED, 0)


def test_a_prompt_that_fills_its_blocks_is_loaded_up_to_the_last_of_them(plain: Engine, first: Engine) -> None:
    """vLLM would compute its last token again, which sees a block more than it keeps for the next one."""
    tokens = prompt(3, 10 * BLOCK)
    expected = plain.tokens(tokens, count=COUNT)
    first.tokens(tokens, count=COUNT)
    first.forget()

    again, counted = first.counted(tokens, count=COUNT)

    assert again == expected
    assert counted["loaded_blocks"] == 9 + (GROUPS - 1) * WINDOW // BLOCK


def test_a_prefix_may_end_in_the_middle_of_what_was_stored(plain: Engine, first: Engine, second: Engine) -> None:
    first.tokens(prompt(4), count=COUNT)
    tokens = [*prompt(4)[:200], *prompt(5, 150)]

    found, counted = second.counted(tokens, count=COUNT)

    assert found == plain.tokens(tokens, count=COUNT)
    assert counted["loaded_blocks"] == 200 // BLOCK + (GROUPS - 1) * WINDOW // BLOCK


def test_only_what_the_engine_lacks_itself_is_loaded(plain: Engine, first: Engine, second: Engine) -> None:
    tokens = prompt(6)
    _, stored = second.counted(tokens, count=COUNT)
    first.tokens(tokens[:170], count=COUNT)

    found, counted = first.counted(tokens, count=COUNT)

    assert found == plain.tokens(tokens, count=COUNT)
    assert stored["stored_blocks"] == GROUPS * ((LENGTH + COUNT - 1) // BLOCK)  # whatever had left the windows by then
    assert counted["loaded_blocks"] == LOADED - 170 // BLOCK


def test_without_a_record_of_the_window_a_shorter_prefix_is_used(plain: Engine, first: Engine) -> None:
    tokens = prompt(7)
    expected = plain.tokens(tokens, count=COUNT)
    first.tokens(tokens, count=COUNT)
    first.remove(first.keys(tokens)[BLOCKS - 2], group_of(first, window=True))
    first.forget()

    again, counted, healed = twice(first, tokens)

    assert again == expected
    assert (counted["loaded_blocks"], counted["stored_blocks"]) == (LOADED - 2, 1)
    assert healed == (expected, {**healed[1], "loaded_blocks": LOADED, "missed_blocks": 0})


def test_what_is_sooner_computed_than_read_from_disk_is_left_there(plain: Engine, first: Engine) -> None:
    tokens = prompt(14)
    first.tokens(tokens, count=COUNT)
    first.to_disk()
    first.forget()
    first.tokens(tokens[:200], count=1)  # now the beginning is in memory
    first.forget()
    first.computes_at(1e12)

    found, counted = first.counted(tokens, count=COUNT)
    first.computes_at(None)

    assert found == plain.tokens(tokens, count=COUNT)
    assert counted["loaded_blocks"] == 200 // BLOCK + (GROUPS - 1) * WINDOW // BLOCK


@pytest.mark.parametrize("window", [True, False])
def test_a_request_with_a_damaged_record_is_computed_again_and_the_record_is_healed(
    plain: Engine, first: Engine, window: bool
) -> None:
    tokens = prompt(8 + window)
    expected = plain.tokens(tokens, count=COUNT)
    first.tokens(tokens, count=COUNT)
    first.to_disk()
    first.damage(first.keys(tokens)[BLOCKS - 1], group_of(first, window=window))
    first.forget()

    again, counted, healed = twice(first, tokens)

    assert again == expected
    assert (counted["missed_blocks"], counted["stored_blocks"]) == (1, 1)
    assert healed == (expected, {**healed[1], "loaded_blocks": LOADED, "missed_blocks": 0})


def test_a_request_whose_load_fails_altogether_is_computed_and_does_not_try_again(plain: Engine, first: Engine) -> None:
    tokens = prompt(10)
    first.tokens(tokens, count=COUNT)
    first.forget()
    first.break_loads(True)

    found, counted = first.counted(tokens, count=COUNT)
    first.break_loads(False)

    assert found == plain.tokens(tokens, count=COUNT)
    assert counted["missed_blocks"] in (BLOCKS, WINDOW // BLOCK)  # of the group that can't be read


def test_an_engine_with_little_memory_says_the_same_while_windows_move_on(plain: Engine, second: Engine) -> None:
    prompts = [prompt(seed, 300) for seed in range(20, 28)]
    expected = plain.tokens(*prompts, count=150)

    for _ in range(2):
        tokens, counted = second.counted(*prompts, count=150)
        assert tokens == expected
        second.forget()

    assert second.preemptions() > 0
    assert counted["loaded_blocks"] > 0
    assert counted["errors"] == 0


def test_events_say_which_blocks_of_the_layers_that_see_everything_were_stored(first: Engine) -> None:
    tokens = prompt(11, 100)

    events = first.events_of(tokens)

    full = group_of(first, window=False)
    stored = [event for event in events if event["medium"] == "kvstrata"]
    on_device = [event for event in events if event["medium"] != "kvstrata" and event["group_idx"] == full]
    hashes = [name for event in stored for name in event["block_hashes"]]
    assert {event["group_idx"] for event in stored} == {full}
    assert len(hashes) == 100 // BLOCK
    assert hashes == [name for event in on_device for name in event["block_hashes"]][: len(hashes)]


def test_layers_cannot_be_loaded_one_by_one(first: Engine) -> None:
    with pytest.raises(RemoteError, match="all of whose layers see all tokens"):
        first.attach(kv_connector_extra_config={"load": "layerwise"})


def test_windows_in_all_layers(starting_vllm: Start, place: Path, with_vllm: Process) -> None:
    model = make_model(place / "windows", ["sliding_attention"] * 2, with_vllm)
    engine = starting_vllm(
        "cache", model=model, skip_tokenizer_init=True, max_model_len=1024, kv_cache_memory_bytes=8 << 20
    )
    engine.process.finish()
    tokens = prompt(12)
    expected = engine.tokens(tokens, count=COUNT)
    engine.forget()

    again, counted = engine.counted(tokens, count=COUNT)
    engine.to_disk()
    engine.damage(engine.keys(tokens)[BLOCKS - 1])
    engine.forget()
    healed, missed = engine.counted(tokens, count=COUNT)

    assert engine.windows() == [WINDOW]
    assert again == healed == expected
    assert (counted["loaded_blocks"], counted["missed_blocks"]) == (WINDOW // BLOCK, 0)
    assert (missed["stored_blocks"], missed["missed_blocks"]) == (1, 1)
    assert engine.process.exit() == 0


def test_a_new_engine_finds_what_engines_that_were_killed_have_computed(
    starting_vllm: Start, tiny: str, plain: Engine, first: Engine, second: Engine
) -> None:
    """The last one: it kills the engines of all others."""
    tokens = prompt(13)
    expected = plain.tokens(tokens, count=COUNT)
    assert first.tokens(tokens, count=COUNT) == expected
    first.flush()
    first.process.kill()
    second.process.kill()

    new = starting_vllm(
        "cache", model=tiny, skip_tokenizer_init=True, max_model_len=1024, kv_cache_memory_bytes=8 << 20
    )
    new.process.finish()
    found, counted = new.counted(tokens, count=COUNT)

    assert found == expected
    assert counted["loaded_blocks"] == LOADED
    assert new.process.exit() == 0
