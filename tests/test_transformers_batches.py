"""Batches, padding, beams, static and sliding-window caches, streams and chats: the same tokens as without reuse."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import transformers
from support.tiny_models import PROMPT, make, plain, reusing, tiny

import kvstrata
from kvstrata.errors import UnsupportedModel
from kvstrata.integrations._transformers_cache import cache_of_output
from kvstrata.integrations._transformers_request import _OPTIONS
from kvstrata.integrations.transformers import PrefixReuse

pytestmark = pytest.mark.usefixtures("one_thread")

GEMMA = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
PLAN = dict[str, Any]


@pytest.fixture
def model() -> Any:
    return tiny()


def padded(*prompts: list[int]) -> PLAN:
    """The prompts as a batch, padded on the left with token 0."""
    length = max(map(len, prompts))
    pads = [length - len(prompt) for prompt in prompts]
    return {
        "inputs": torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads]),
    }


def sequence(start: int, length: int) -> list[int]:
    return [3 + (start + 7 * i) % 120 for i in range(length)]


def own_kv(model: Any, prompt: list[int]) -> list[torch.Tensor]:
    """What the model computes of a prompt by itself, [2, kv_heads, tokens, head_dim] of each layer."""
    with torch.no_grad():
        layers = cache_of_output(model(torch.tensor([prompt]), use_cache=True)).layers
    return [torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]


def last(reuse: PrefixReuse) -> Any:
    assert reuse.last is not None
    assert reuse.last.error == ""
    return reuse.last


# ---- Batches


def test_each_prompt_of_a_batch_reuses_its_own_prefix(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    one, two, three = sequence(0, 50), sequence(40, 33), sequence(80, 7)
    for prompt in (one[:30], two[:25]):
        reuse.generate(torch.tensor([prompt]), max_new_tokens=1)
    batch = padded(one, two, three)
    expected = model.generate(**batch, do_sample=False, max_new_tokens=12)
    first = reuse.generate(**batch, do_sample=False, max_new_tokens=12)
    seen = [last(reuse).reused_by_prompt]
    second = reuse.generate(**batch, do_sample=False, max_new_tokens=12)
    seen.append(last(reuse).reused_by_prompt)

    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert seen == [(24, 24, 0), (48, 32, 0)]
    assert (last(reuse).prompt_tokens, last(reuse).reused_tokens) == (90, 80)


def test_what_a_batch_stored_serves_each_prompt_alone(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    prompts = sequence(0, 50), sequence(40, 33)
    output = reuse.generate(**padded(*prompts), do_sample=False, max_new_tokens=12)
    for row, prompt in enumerate(prompts):
        longer = torch.tensor([[*prompt, *output[row, 50:].tolist(), 5]])
        assert reusing(reuse, longer, max_new_tokens=8) == plain(model, longer, max_new_tokens=8)
        assert last(reuse).reused_tokens == (len(prompt) + 11) // 8 * 8


def test_a_batch_without_a_mask_is_padded_where_generate_says_so(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    ids = padded(sequence(0, 40), sequence(9, 20))["inputs"]
    expected = model.generate(ids, do_sample=False, max_new_tokens=6)
    for _ in range(2):
        assert torch.equal(reuse.generate(ids, do_sample=False, max_new_tokens=6), expected)

    assert last(reuse).reused_by_prompt == (32, 16)
    alone = torch.tensor([sequence(9, 20)])
    assert reusing(reuse, alone, max_new_tokens=6) == plain(model, alone, max_new_tokens=6)
    assert last(reuse).reused_tokens == 16


def test_padding_behind_a_sequence_that_ended_early_is_not_stored(model: Any, cache: kvstrata.Cache) -> None:
    prompts = sequence(0, 20), sequence(9, 24)
    ends = model.generate(torch.tensor([prompts[0]]), do_sample=False, max_new_tokens=3)[0, -1].item()
    reuse = make(model, cache)
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": ends}
    expected = model.generate(**padded(*prompts), **options)
    assert torch.equal(reuse.generate(**padded(*prompts), **options), expected)

    short = expected[0][4:].tolist()
    assert short[23:] == [0] * len(short[23:])
    assert len(short[23:]) > 8
    assert reuse._prefixes.match(short).tokens == 16


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}), ("Qwen3", {"head_dim": 16})],
    ids=["GPT2", "Qwen3"],
)
def test_batches_of_models_of_other_kinds(cache: kvstrata.Cache, kind: str, changes: PLAN) -> None:
    model = tiny(kind, "LMHeadModel" if kind == "GPT2" else "ForCausalLM", **changes)
    reuse = make(model, cache)
    batch = padded(sequence(0, 50), sequence(40, 33))
    expected = model.generate(**batch, do_sample=False, max_new_tokens=8)
    for _ in range(2):
        assert torch.equal(reuse.generate(**batch, do_sample=False, max_new_tokens=8), expected)
    assert last(reuse).reused_by_prompt == (48, 32)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_a_prefill_in_chunks_goes_on_behind_the_prefix(model: Any, cache: kvstrata.Cache, options: PLAN) -> None:
    reuse = make(model, cache)
    one, two = sequence(0, 50), sequence(40, 33)
    for prompt in (one[:20], two[:9]):
        reuse.generate(torch.tensor([prompt]), max_new_tokens=1)
    options = {**padded(one, two), **options, "do_sample": False, "max_new_tokens": 4, "prefill_chunk_size": 8}
    if "prefill_chunk_size" in _OPTIONS:  # before transformers 5.21
        with pytest.raises(UnsupportedModel, match="upgrade transformers"):
            reuse.generate(**options)
        return
    assert torch.equal(reuse.generate(**options), model.generate(**options))
    assert last(reuse).reused_by_prompt == (16, 8)
    for prompt, tokens in ((one, 48), (two, 32)):
        stored = reuse._prefixes.match(prompt).load().kv
        assert stored.shape[3] == tokens
        for layer, kv in zip(own_kv(model, prompt), stored, strict=True):
            torch.testing.assert_close(torch.from_numpy(kv.view("f4")), layer[..., :tokens, :])


# ---- Beams and several sequences


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}],
    ids=["three", "two-of-four"],
)
def test_beam_search_finds_the_same_sequences(model: Any, cache: kvstrata.Cache, options: PLAN) -> None:
    reuse = make(model, cache)
    batch = padded(sequence(0, 50), sequence(40, 33))
    options = {**options, "do_sample": False, "max_new_tokens": 10}
    expected = model.generate(**batch, **options)
    for _ in range(2):
        assert torch.equal(reuse.generate(**batch, **options), expected)
    assert last(reuse).reused_by_prompt == (48, 32)
    assert reusing(reuse, PROMPT, max_new_tokens=4) == plain(model, PROMPT, max_new_tokens=4)


def test_several_samples_of_a_prompt_are_the_same_and_are_all_stored(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    drawn = []
    for generate in (model.generate, reuse.generate, reuse.generate):
        torch.manual_seed(7)
        drawn.append(generate(PROMPT, do_sample=True, num_return_sequences=3, max_new_tokens=16))

    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert [reuse._prefixes.match(row).tokens for row in drawn[0]] == [112, 112, 112]


# ---- Static and sliding-window caches


@pytest.mark.parametrize("changes", [{}, {"kind": "Mistral", "sliding_window": 16}], ids=["full", "sliding"])
def test_a_static_cache_starts_with_the_prefix(cache: kvstrata.Cache, changes: PLAN) -> None:
    model = tiny(**changes)
    reuse = make(model, cache)
    batch = padded(sequence(0, 50), sequence(40, 33))
    options = {"do_sample": False, "max_new_tokens": 10, "cache_implementation": "static"}
    expected = model.generate(**batch, **options)
    for _ in range(2):
        output = reuse.generate(**batch, **options, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)
    assert type(output.cache) is transformers.StaticCache
    assert last(reuse).reused_by_prompt == (48, 32)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
def test_a_static_cache_has_a_row_for_each_sequence(model: Any, cache: kvstrata.Cache, options: PLAN) -> None:
    reuse = make(model, cache)
    options = {**padded(sequence(0, 50), sequence(40, 33)), "max_new_tokens": 10, "cache_implementation": "static"} | (
        {"do_sample": False} | options
    )
    generated = []
    for generate in (model.generate, reuse.generate, reuse.generate):  # by itself, cold and warm
        torch.manual_seed(7)
        generated.append(generate(**options).tolist())
    assert generated[1:] == generated[:1] * 2
    assert last(reuse).reused_by_prompt == (48, 32)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Mistral", {"sliding_window": 16}), ("Gemma2", GEMMA), ("Gemma3", GEMMA)],
    ids=["Mistral", "Gemma2", "Gemma3"],
)  # fmt: skip
def test_models_with_a_sliding_window_generate_the_same_tokens(cache: kvstrata.Cache, kind: str, changes: PLAN) -> None:
    model = tiny(kind, **changes)
    reuse = make(model, cache)
    expected = plain(model, PROMPT, max_new_tokens=24)
    assert [reusing(reuse, PROMPT, max_new_tokens=24) for _ in range(2)] == [expected, expected]
    assert last(reuse).reused_tokens == 96
    batch = padded(PROMPT[0].tolist(), sequence(40, 33))
    wanted = model.generate(**batch, do_sample=False, max_new_tokens=24)
    assert torch.equal(reuse.generate(**batch, do_sample=False, max_new_tokens=24), wanted)


# ---- Sessions


def test_a_session_goes_on_without_computing_anything_again(model: Any, tmp_path: Path) -> None:
    with make(model, tmp_path) as reuse:
        first = reuse.generate(PROMPT[:, :21], do_sample=False, max_new_tokens=10, session="alice")
    prompt = torch.cat([first, PROMPT[:, 50:55]], dim=1)
    with make(model, tmp_path) as reuse:
        assert reusing(reuse, prompt, max_new_tokens=10, session="alice") == plain(model, prompt, max_new_tokens=10)
        assert (last(reuse).reused_tokens, last(reuse).tier) == (30, "disk")  # all but the last token, whose KV wasn't
        edited = prompt.clone()
        edited[0, 17] = 99
        assert reusing(reuse, edited, max_new_tokens=4, session="alice") == plain(model, edited, max_new_tokens=4)
        assert last(reuse).reused_tokens == 16


# ---- Streams and chats


def test_text_streams_while_it_is_generated(smollm: Any, cache: kvstrata.Cache) -> None:
    model, tokenizer, document = smollm
    reuse = PrefixReuse(model, cache, block_tokens=16, buffer="64MiB")
    prompt = document[:, :60]
    expected = plain(model, prompt, max_new_tokens=12)
    for _ in range(2):
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
        options = {"do_sample": False, "max_new_tokens": 12, "streamer": streamer}
        thread = threading.Thread(target=reuse.generate, args=(prompt,), kwargs=options)
        thread.start()
        parts = list(streamer)
        thread.join()
        assert "".join(parts) == tokenizer.decode(expected[60:])
        assert len(parts) > 2
    assert reuse.stats()["reused_tokens"] == 48


def test_a_chat_reuses_its_earlier_turns(smollm: Any, cache: kvstrata.Cache) -> None:
    model, tokenizer, _ = smollm
    reuse = PrefixReuse(model, cache, block_tokens=16, buffer="64MiB")
    messages = [{"role": "user", "content": "What is a lighthouse?"}]
    before = 0
    for _ in range(2):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        held = inputs["input_ids"].shape[1]
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=24)
        assert torch.equal(reuse.generate(**inputs, do_sample=False, max_new_tokens=24), expected)
        answer = tokenizer.decode(expected[0, held:], skip_special_tokens=True)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And why?"}]
        assert last(reuse).reused_tokens >= before // 16 * 16
        before = held
    assert last(reuse).reused_tokens > 0


def test_a_batch_of_a_real_models_chats_is_identical_greedy_and_by_beams(smollm: Any, cache: kvstrata.Cache) -> None:
    model, tokenizer, document = smollm
    reuse = PrefixReuse(model, cache, block_tokens=16, buffer="64MiB")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    texts = [tokenizer.decode(document[0, :90]), tokenizer.decode(document[0, 200:250])]
    chats = [[{"role": "user", "content": text}] for text in texts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    for options in ({}, {"num_beams": 2}):
        expected = model.generate(**batch, **options, do_sample=False, max_new_tokens=10)
        for _ in range(2):
            assert torch.equal(reuse.generate(**batch, **options, do_sample=False, max_new_tokens=10), expected)
        assert all(last(reuse).reused_by_prompt)
