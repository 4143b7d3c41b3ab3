"""Reuse around model.generate: the same tokens as without it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import transformers
from support.tiny_models import PROMPT, make, plain, reusing, tiny
from transformers.cache_utils import DynamicLayer
from transformers.utils.quantization_config import QuantizationMethod

import kvstrata
from kvstrata.integrations._transformers_cache import HeadroomLayer, KVBuffer, cache_over
from kvstrata.integrations._transformers_model import weights_identity
from kvstrata.integrations.transformers import PrefixReuse
from kvstrata.keys import KVLayout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> Any:
    return tiny()


# ---- The real model


def test_a_real_models_tokens_are_identical_over_prompts_that_share_prefixes(
    smollm: Any, cache: kvstrata.Cache
) -> None:
    model, tokenizer, document = smollm
    reuse = PrefixReuse(model, cache, block_tokens=16, buffer="64MiB")
    tails = [tokenizer(text, return_tensors="pt")["input_ids"] for text in
             (" The keepers", " In short:", " The keepers", " Nobody knew that")]  # fmt: skip
    lengths = (300, 300, 300, 137)
    reused = []
    for length, tail in zip(lengths, tails, strict=True):
        prompt = torch.cat([document[:, :length], tail], dim=1)
        assert reusing(reuse, prompt, max_new_tokens=20) == plain(model, prompt, max_new_tokens=20)
        assert reuse.last is not None
        reused.append(reuse.last.reused_tokens)

    assert reused == [0, 288, 288, 128]
    assert reuse.last is not None
    assert (reuse.last.tier, reuse.last.loaded_bytes) == ("memory", 128 * 46_080)


def test_a_real_models_next_turn_reuses_the_tokens_it_generated(smollm: Any, cache: kvstrata.Cache) -> None:
    model, tokenizer, document = smollm
    reuse = PrefixReuse(model, cache, block_tokens=16, buffer="64MiB")
    first = reuse.generate(document[:, :150], do_sample=False, max_new_tokens=30)
    prompt = torch.cat([first, tokenizer(" And then", return_tensors="pt")["input_ids"]], dim=1)

    assert reusing(reuse, prompt, max_new_tokens=16) == plain(model, prompt, max_new_tokens=16)
    assert reuse.last is not None
    assert reuse.last.reused_tokens == 176  # of 180: 179 had their KV computed


def test_a_real_models_tokens_stay_right_when_a_middle_block_is_damaged_on_disk(smollm: Any, tmp_path: Path) -> None:
    model, _, document = smollm
    prompt = document[:, :200]
    with PrefixReuse(model, tmp_path, block_tokens=32, buffer="64MiB") as reuse:
        expected = reusing(reuse, prompt, max_new_tokens=12)
        ns, keys = reuse._prefixes.ns, reuse._prefixes.keys(prompt[0])
        middle = bytes(ns.get(keys[3]) or b"")[:4096]
    segments = [path for path in tmp_path.rglob("*.kvs") if middle in path.read_bytes()]
    for segment in segments:
        data = bytearray(segment.read_bytes())
        data[data.find(middle) + 5000] ^= 0x10
        segment.write_bytes(data)

    with PrefixReuse(model, tmp_path, block_tokens=32, buffer="64MiB") as reuse:
        again = [(reusing(reuse, prompt, max_new_tokens=12), reuse.last) for _ in range(2)]

    assert segments
    assert [tokens for tokens, _ in again] == [expected, expected]
    assert [(stats.reused_tokens, stats.tier) for _, stats in again if stats] == [
        (96, "disk"),
        (192, "memory"),
    ]


def test_a_real_model_in_another_precision_finds_nothing(smollm: Any, cache: kvstrata.Cache) -> None:
    model, tokenizer, document = smollm
    del tokenizer
    PrefixReuse(model, cache, buffer=0).generate(document[:, :100], do_sample=False, max_new_tokens=2)
    half = transformers.LlamaForCausalLM(model.config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    reuse = PrefixReuse(half, cache, buffer=0)

    assert reuse._prefixes.match(document[0, :100]).tokens == 0
    for expected in (0, 96):
        reuse.generate(document[:, :100], do_sample=False, max_new_tokens=2)
        assert reuse.last is not None
        assert reuse.last.reused_tokens == expected


# ---- What is reused


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
     ("GPTNeoX", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Mixtral", {"sliding_window": None})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_of_other_kinds_generate_the_same_tokens(
    cache: kvstrata.Cache, kind: str, changes: dict[str, Any]
) -> None:
    model = tiny(kind, "LMHeadModel" if kind == "GPT2" else "ForCausalLM", **changes)
    reuse = make(model, cache)
    expected = plain(model, PROMPT, max_new_tokens=12)

    assert [reusing(reuse, PROMPT, max_new_tokens=12) for _ in range(2)] == [expected, expected]
    assert reuse.last is not None
    assert reuse.last.reused_tokens == 96


def test_the_last_prompt_token_is_always_computed(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    prompt = PROMPT[:, :64]
    for expected in (0, 56):
        assert reusing(reuse, prompt, max_new_tokens=4) == plain(model, prompt, max_new_tokens=4)
        assert reuse.last is not None
        assert reuse.last.reused_tokens == expected


def test_a_lost_middle_block_shortens_what_is_reused_and_is_stored_again(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    expected = reusing(reuse, PROMPT, max_new_tokens=4)
    reuse._prefixes.ns.delete(reuse._prefixes.keys(PROMPT[0])[5])
    seen = []
    for _ in range(2):
        assert reusing(reuse, PROMPT, max_new_tokens=4) == expected
        assert reuse.last is not None
        seen.append((reuse.last.reused_tokens, reuse.last.stored_blocks))

    assert seen == [(40, 1), (96, 0)]


def test_tenants_with_different_salts_share_nothing(model: Any, cache: kvstrata.Cache) -> None:
    make(model, cache, salt="one").generate(PROMPT, max_new_tokens=2)
    other = make(model, cache, salt="two")
    other.generate(PROMPT, max_new_tokens=2)

    assert other.last is not None
    assert other.last.reused_tokens == 0
    assert make(model, cache, salt=b"one")._prefixes.match(PROMPT[0]).tokens == 96


def test_a_reader_that_does_not_store_leaves_the_cache_as_it_is(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache, store=False)
    reuse.generate(PROMPT, max_new_tokens=2)

    assert cache.stats()["memory"]["puts"] == 0


def test_sampling_draws_the_same_tokens(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    drawn = []
    for generate in (model.generate, reuse.generate, reuse.generate):
        torch.manual_seed(7)
        drawn.append(generate(PROMPT, do_sample=True, max_new_tokens=16)[0].tolist())

    assert drawn[0] == drawn[1] == drawn[2]


def test_a_returned_cache_stays_the_callers(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    output = reuse.generate(PROMPT, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    held = output.cache if hasattr(output, "cache") else output.past_key_values
    before = held.layers[0].keys.clone()
    reuse.generate(PROMPT.flip(1), max_new_tokens=4, do_sample=False)

    assert before.shape == (1, 2, 103, 8)
    assert torch.equal(held.layers[0].keys, before)


def test_a_streamer_of_the_caller_gets_prompt_tokens_and_end(model: Any, cache: kvstrata.Cache) -> None:
    seen: list[Any] = []

    class Streamer:
        def put(self, value: Any) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append("end")

    reuse = make(model, cache)
    output = reuse.generate(PROMPT, max_new_tokens=4, do_sample=False, streamer=Streamer())

    assert seen == [*output[0].tolist(), "end"]
    assert reuse.last is not None
    assert reuse.last.ttft_s > 0


def test_totals_add_up_over_requests(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    for _ in range(3):
        reuse.generate(PROMPT, max_new_tokens=2)
    stats = reuse.stats()

    assert (stats["requests"], stats["requests_reused"]) == (3, 2)
    assert (stats["prompt_tokens"], stats["reused_tokens"], stats["stored_blocks"]) == (300, 192, 12)
    assert stats["loaded_bytes"] == 192 * reuse.layout.token_bytes
    assert (stats["load_errors"], stats["store_errors"]) == (0, 0)


def test_threads_may_share_a_reuse(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    prompts = [torch.cat([PROMPT[:, :50], torch.full((1, 3), 60 + i)], dim=1) for i in range(6)]
    expected = [plain(model, prompt, max_new_tokens=6) for prompt in prompts]

    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            assert list(pool.map(lambda p: reusing(reuse, p, max_new_tokens=6), prompts)) == expected


# ---- What changes the KV


def test_weights_have_the_same_identity_wherever_they_were_loaded(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    copy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    copy.config.quantization_config = {
        "quant_method": QuantizationMethod.GGUF,
        "gguf_file": "where-they-came-from.gguf",
    }

    assert weights_identity(copy.eval()) == weights_identity(model)
    assert weights_identity(tiny(rms_norm_eps=1e-3)) != weights_identity(model)


def test_changed_weights_find_nothing_of_the_old(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    reuse.generate(PROMPT, max_new_tokens=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-3)

    assert reusing(reuse, PROMPT, max_new_tokens=8) == plain(model, PROMPT, max_new_tokens=8)
    assert reuse.last is not None
    assert reuse.last.reused_tokens == 0


def test_another_attention_implementation_finds_nothing(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    reuse.generate(PROMPT, max_new_tokens=2)
    model.set_attn_implementation("eager")

    assert reusing(reuse, PROMPT, max_new_tokens=8) == plain(model, PROMPT, max_new_tokens=8)
    assert reuse.last is not None
    assert (reuse.last.reused_tokens, reuse.layout.attention) == (0, "eager")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_have_prefixes_of_their_own(model: Any, cache: kvstrata.Cache) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    reuse = make(model, cache)
    reuse.generate(PROMPT, max_new_tokens=2)
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    reuse = make(adapted, cache)
    seen = []
    for _ in range(2):
        assert reusing(reuse, PROMPT, max_new_tokens=8) == plain(adapted, PROMPT, max_new_tokens=8)
        assert reuse.last is not None
        seen.append(reuse.last.reused_tokens)
    with adapted.disable_adapter():
        assert reusing(reuse, PROMPT, max_new_tokens=8) == plain(adapted, PROMPT, max_new_tokens=8)
        assert reuse.last is not None
        seen.append(reuse.last.reused_tokens)

    assert seen == [0, 96, 0]


# ---- Trouble


def test_a_closed_cache_costs_the_reuse_but_no_request(model: Any) -> None:
    cache = kvstrata.open(memory="8MiB")
    reuse = make(model, cache)
    expected = reusing(reuse, PROMPT, max_new_tokens=4)
    cache.close()

    assert reusing(reuse, PROMPT, max_new_tokens=4) == expected
    assert reuse.last is not None
    assert reuse.last.error.startswith("load:")
    assert (reuse.last.reused_tokens, reuse.last.tier) == (0, "none")
    assert (reuse.stats()["load_errors"], reuse.stats()["store_errors"]) == (1, 1)


def test_a_cache_too_small_for_a_block_serves_requests_cold(cache: kvstrata.Cache) -> None:
    del cache
    model = tiny(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=8)
    with kvstrata.open(memory="1MiB") as small:
        reuse = make(model, small, block_tokens=96)
        for _ in range(2):
            assert reusing(reuse, PROMPT, max_new_tokens=4) == plain(model, PROMPT, max_new_tokens=4)
            assert reuse.last is not None
            assert (reuse.last.reused_tokens, reuse.last.stored_blocks) == (0, 0)


# ---- The layer with head-room


@pytest.mark.parametrize("steps", [[5, 1, 1], [5, 20], [3, -2, 4], [12, 1], [16, 1, -3, 2]])
def test_the_layer_grows_and_shrinks_like_a_dynamic_layer(steps: list[int]) -> None:
    ours = HeadroomLayer(torch.zeros(1, 2, 16, 4), torch.zeros(1, 2, 16, 4), 0)
    theirs = DynamicLayer()
    torch.manual_seed(1)
    for step in steps:
        if step < 0:
            ours.crop(step)
            theirs.crop(step)
        else:
            new = torch.rand(1, 2, step, 4), torch.rand(1, 2, step, 4)
            for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_the_layer_grows_in_place_from_nothing() -> None:
    room = torch.zeros(1, 2, 16, 4)
    layer = HeadroomLayer(room, room.clone(), 0)
    for _ in range(2):
        layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))

    assert layer.in_place
    assert room[0, 0, :, 0].tolist() == [1.0] * 10 + [0.0] * 6


def test_a_buffer_for_another_device_is_filled_through_a_staging_area() -> None:
    layout = KVLayout(model="m", dtype="bfloat16", layers=2, kv_heads=1, head_dim=4, block_tokens=4)
    buffer = KVBuffer(layout, 8, torch.device("cpu"), staged=True)
    buffer.host[:, :, 0, :, :4] = 0x3F80  # 1.0
    buffer.loaded(0, 0, 4)
    cache = cache_over(buffer, 4)

    assert cache.get_seq_length() == 4
    assert torch.equal(cache.layers[1].values, torch.ones(1, 1, 4, 4, dtype=torch.bfloat16))
