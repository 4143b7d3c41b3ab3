"""KVStrataConnector in vLLM itself: the same tokens with and without it, whatever happens, and less to compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.processes import Process, RemoteError

from engines.conftest import Start, need
from engines.vllm_control import BLOCK, KV_BYTES_PER_TOKEN, Engine

need("vllm")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def engines(starting_vllm: Start, place: Path) -> dict[str, Engine]:
    """An engine without kvstrata, and two that share a cache, in processes whose hashes differ."""
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"ipc://{place}/events"}
    found = {
        "plain": starting_vllm(None),
        "first": starting_vllm("cache", environment={"PYTHONHASHSEED": "1"}, kv_events_config=events, enable_lora=True),
        "second": starting_vllm("cache", environment={"PYTHONHASHSEED": "2"}, connector={"load": "layerwise"},
                                enable_lora=True, unlike=True),
    }  # fmt: skip
    for engine in found.values():
        engine.process.finish()
    return found


def test_two_processes_share_what_either_has_computed_and_say_the_same_as_one_without(
    plain: Engine, first: Engine, second: Engine
) -> None:
    prompt = plain.prompt(0, 400)
    (expected,) = plain.tokens(prompt)
    blocks = (len(prompt) + len(expected) - 1) // BLOCK  # of the last token nothing is computed

    (cold,), stored = first.counted(prompt)
    (warm,), loaded = second.counted(prompt)

    assert cold == warm == expected
    assert (stored["stored_blocks"], stored["loaded_blocks"]) == (blocks, 0)
    assert (loaded["stored_blocks"], loaded["loaded_blocks"]) == (0, len(prompt) // BLOCK)


def test_what_the_engine_has_forgotten_is_loaded_again(plain: Engine, first: Engine) -> None:
    prompt = plain.prompt(100, 300)
    expected = plain.tokens(prompt)
    assert first.tokens(prompt) == expected
    first.forget()

    tokens, counted = first.counted(prompt)

    assert tokens == expected
    assert counted["loaded_blocks"] == len(prompt) // BLOCK


def test_only_what_the_engine_lacks_itself_is_loaded(plain: Engine, first: Engine, second: Engine) -> None:
    long, short = plain.prompt(200, 320), plain.prompt(200, 160)
    second.tokens(long)
    first.tokens(short)
    shared = 160 // BLOCK

    tokens, counted = first.counted(long)

    assert tokens == plain.tokens(long)
    assert counted["loaded_blocks"] == len(long) // BLOCK - shared


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_damaged_record_in_the_middle_of_a_prefix_is_computed_again_and_healed(
    plain: Engine, engines: dict[str, Engine], which: str
) -> None:
    engine = engines[which]
    prompt = plain.prompt(300 if which == "first" else 310, 400)
    expected = plain.tokens(prompt)
    keys = engine.keys(prompt)
    assert engine.tokens(prompt) == expected
    engine.to_disk()
    engine.damage(keys[5])
    engine.forget()

    tokens, counted = engine.counted(prompt)
    engine.forget()
    again, healed = engine.counted(prompt)

    assert tokens == again == expected
    assert counted["missed_blocks"] == 1
    assert counted["stored_blocks"] == 1
    assert (healed["loaded_blocks"], healed["missed_blocks"]) == (len(keys), 0)


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_request_whose_load_fails_altogether_is_computed_and_does_not_try_again(
    plain: Engine, engines: dict[str, Engine], which: str
) -> None:
    engine = engines[which]
    prompt = plain.prompt(50, 200)
    engine.tokens(prompt)
    engine.forget()
    engine.break_loads(True)

    tokens, counted = engine.counted(prompt)
    engine.break_loads(False)

    assert tokens == plain.tokens(prompt)
    assert counted["loaded_blocks"] == 0
    assert counted["missed_blocks"] == len(prompt) // BLOCK


def test_requests_at_the_same_time_with_shared_and_disjoint_prefixes(
    plain: Engine, first: Engine, second: Engine
) -> None:
    prompts = [plain.prompt(start, 250, question) for start in (0, 500, 900) for question in ("Who?", "When?", "Why?")]
    expected = plain.tokens(*prompts)

    assert first.tokens(*prompts) == expected
    tokens, counted = second.counted(*prompts)

    assert tokens == expected
    assert counted["loaded_blocks"] >= 3 * (250 // BLOCK)
    assert counted["errors"] == 0


def test_the_tokens_of_an_answer_are_found_when_the_conversation_goes_on(
    plain: Engine, first: Engine, second: Engine
) -> None:
    prompt = plain.prompt(600, 250)
    (answer,) = first.tokens(prompt, count=100)
    conversation = [*prompt, *answer, *plain.prompt(0, 0, "And then?")]

    tokens, counted = second.counted(conversation)

    assert tokens == plain.tokens(conversation)
    assert counted["loaded_blocks"] >= (len(prompt) + len(answer)) // BLOCK - 1


def test_a_cache_salt_keeps_tenants_apart(plain: Engine, first: Engine, second: Engine) -> None:
    prompt = plain.prompt(700, 200)
    expected = first.tokens(prompt, salt="a")

    other, of_another = second.counted(prompt, salt="b")
    same, of_the_same = second.counted(prompt, salt="a")

    assert other == same == expected
    assert of_another["found_blocks"] == 0
    assert of_the_same["loaded_blocks"] == len(prompt) // BLOCK


def test_adapters_are_told_apart_by_their_weights_and_not_by_their_names(
    plain: Engine, first: Engine, second: Engine, place: Path, with_vllm: Process
) -> None:
    prompt = plain.prompt(800, 200)
    adapters = [make_adapter(place / name / "adapter", with_vllm, seed=ord(name)) for name in "ab"]
    without = first.tokens(prompt)
    expected = [first.tokens(prompt, lora=adapter) for adapter in adapters]
    assert without != expected[0] != expected[1]

    copy = str(shutil.copytree(adapters[0], place / "c" / "adapter"))
    tokens, counted = second.counted(prompt, lora=adapters[1])
    assert tokens == expected[1]
    assert counted["loaded_blocks"] == len(prompt) // BLOCK
    tokens, counted = second.counted(prompt, lora=copy)
    assert tokens == expected[0]
    assert counted["loaded_blocks"] == len(prompt) // BLOCK


def make_adapter(path: Path, with_vllm: Process, *, seed: int) -> str:
    """A LoRA adapter of random weights, large enough to change what is said."""
    with with_vllm.fork() as other:
        other.run(
            "import torch\nfrom safetensors.torch import save_file\n"
            "os.makedirs(path)\ntorch.manual_seed(seed)\n"
            "name = 'base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight'\n"
            "save_file({name.format(layer, which, part): torch.randn(shape) * 0.5\n"
            "           for layer in range(30) for which, out in (('q', 576), ('v', 192))\n"
            "           for part, shape in (('A', (8, 576)), ('B', (out, 8)))}, path + '/adapter_model.safetensors')",
            path=str(path), seed=seed,
        )  # fmt: skip
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


def test_events_say_which_blocks_were_stored(plain: Engine, first: Engine) -> None:
    prompt = plain.prompt(1000, 100)
    events = first.events_of(prompt)

    stored = [event for event in events if event["medium"] == "kvstrata"]
    on_device = [event for event in events if event["medium"] != "kvstrata"]
    hashes = [name for event in stored for name in event["block_hashes"]]
    assert len(hashes) == len(prompt) // BLOCK
    assert hashes == [name for event in on_device for name in event["block_hashes"]][: len(hashes)]
    assert [token for event in stored for token in event["token_ids"]] == prompt[: len(hashes) * BLOCK]


def test_counters_reach_prometheus(plain: Engine, first: Engine) -> None:
    prompt = plain.prompt(1100, 100)
    first.tokens(prompt)
    first.forget()
    first.tokens(prompt)

    metrics = first.metrics()

    assert metrics["vllm:kvstrata_loaded_blocks"] >= len(prompt) // BLOCK
    assert metrics["vllm:kvstrata_stored_bytes"] > 0
    assert metrics["vllm:kvstrata_lookups"] > 0


def test_after_a_reset_of_the_connector_nothing_is_found_and_others_find_all(
    plain: Engine, first: Engine, second: Engine
) -> None:
    prompt = plain.prompt(1200, 150)
    expected = second.tokens(prompt)
    second.reset_all()

    after, counted = second.counted(prompt)
    elsewhere, found = first.counted(prompt)

    assert after == elsewhere == expected
    assert counted["found_blocks"] == 0
    assert found["loaded_blocks"] == len(prompt) // BLOCK


def test_an_engine_with_little_memory_for_kv_and_a_full_cache_says_the_same(
    starting_vllm: Start, plain: Engine
) -> None:
    engine = starting_vllm("small", kv_tokens=16 * BLOCK, max_model_len=256, connector={"memory": "16MiB", "disk": 0})
    engine.process.finish()
    prompts = [plain.prompt(start, 100) for start in range(0, 500, 100)]
    expected = plain.tokens(*prompts, count=72)  # more than fits, so that some are preempted

    for _ in range(2):
        tokens, counted = engine.counted(*prompts, count=72)
        assert tokens == expected
        engine.forget()

    assert engine.preemptions() > 0
    assert engine.evicted() > 0, "the cache had room for everything"
    assert counted["errors"] == 0
    engine.process.exit()


def test_through_a_lossy_codec_kv_comes_back_nearly_the_same_and_only_to_who_asked_for_it(
    starting_vllm: Start, plain: Engine, first: Engine
) -> None:
    engine = starting_vllm("cache", connector={"codec": {"disk": "int8"}})
    engine.process.finish()
    prompt = plain.prompt(1250, 300)
    expected = first.tokens(prompt)
    tokens, counted = engine.counted(prompt)
    assert tokens == expected
    assert counted["found_blocks"] == 0  # what others have stored
    before = engine.kv(prompt)
    engine.to_disk()
    engine.forget()

    engine.tokens(prompt, count=1)
    after = engine.kv(prompt)

    off = max(abs(a - b) for a, b in zip(before, after, strict=True)) / max(map(abs, before))
    assert 0 < off < 0.02
    assert engine.bytes_on_disk() < 0.3 * (len(prompt) // BLOCK) * BLOCK * KV_BYTES_PER_TOKEN  # of 4 bytes one is left
    engine.process.exit()


def test_settings_that_cannot_be_used_are_refused_at_the_start(first: Engine) -> None:
    with pytest.raises(RemoteError, match='add "kv_load_failure_policy": "recompute"'):
        first.attach(kv_load_failure_policy="fail")
    with pytest.raises(RemoteError, match="did you mean 'memory'"):
        first.attach(kv_connector_extra_config={"memmory": "1GiB"})
    with pytest.raises(RemoteError, match="did you mean 'layerwise'"):
        first.attach(kv_connector_extra_config={"load": "layer-wise"})
    with pytest.raises(RemoteError, match="add --no-async-scheduling"):
        first.attach(overlapping=True, kv_connector_extra_config={"load": "layerwise"})
    for spec in ("recurrent", "chunked"):
        with pytest.raises(RemoteError, match="a way of their own"):
            first.attach(spec=spec)
    with pytest.raises(RemoteError, match="blocks of some layers hold 64 tokens, of others 32"):
        first.attach(spec="larger blocks")


def test_a_new_engine_finds_what_engines_that_were_killed_have_computed(
    starting_vllm: Start, plain: Engine, first: Engine, second: Engine
) -> None:
    """The last one: it kills the engines of all others."""
    prompts = [plain.prompt(1300, 300), plain.prompt(1350, 300)]
    expected = plain.tokens(*prompts)
    assert first.tokens(*prompts) == expected
    first.flush()
    first.process.kill()
    second.process.kill()

    new = starting_vllm("cache")
    new.process.finish()
    tokens, counted = new.counted(*prompts)

    assert tokens == expected
    assert counted["loaded_blocks"] == sum(len(prompt) // BLOCK for prompt in prompts)
    assert new.process.exit() == 0
