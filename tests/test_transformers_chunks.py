"""Chunks that are no prefix: what is exact, what is stored, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import transformers

import kvstrata
from kvstrata.errors import ConfigError, InvalidValue, UnsupportedModel
from kvstrata.integrations._transformers_cache import cache_of_output
from kvstrata.integrations.transformers import PrefixReuse
from kvstrata.integrations.transformers_chunks import ChunkReuse, ChunkStats

INTRO, ONE, TWO, QUESTION = (
    list(range(start, start + count)) for start, count in ((3, 32), (50, 48), (130, 64), (9, 7))
)
ANSWER = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def cache() -> Iterator[kvstrata.Cache]:
    with kvstrata.open(memory="16MiB") as cache:
        yield cache


def own(model: Any, *chunks: list[int]) -> list[int]:
    ids = torch.tensor([[token for chunk in chunks for token in chunk]])
    return list(model.generate(ids, **ANSWER)[0].tolist())


def test_with_everything_computed_again_the_answer_is_the_models_own(model: Any, cache: kvstrata.Cache) -> None:
    chunks = ChunkReuse(model, cache, recompute=1, block_tokens=16)
    given = [INTRO, ONE, TWO, QUESTION]

    for _ in range(2):
        assert chunks.generate(given, **ANSWER)[0].tolist() == own(model, *given)


def test_a_chunk_alone_before_the_question_is_a_prefix_and_exact(model: Any, cache: kvstrata.Cache) -> None:
    chunks = ChunkReuse(model, cache, recompute=0, block_tokens=16)

    for _ in range(2):
        assert chunks.generate([ONE, QUESTION], **ANSWER)[0].tolist() == own(model, ONE, QUESTION)

    assert chunks.last == ChunkStats(len(ONE) + len(QUESTION), len(QUESTION))


def test_chunks_seen_in_one_order_are_not_computed_in_another(model: Any, cache: kvstrata.Cache) -> None:
    chunks = ChunkReuse(model, cache, recompute=0.25, block_tokens=16)
    tokens = len(INTRO) + len(ONE) + len(TWO) + len(QUESTION)

    chunks.generate([INTRO, ONE, TWO, QUESTION], **ANSWER)
    chunks.generate([INTRO, TWO, ONE, QUESTION], **ANSWER)

    assert chunks.last == ChunkStats(tokens, (len(ONE) + len(TWO)) // 4 + len(QUESTION))


def test_keys_are_turned_to_where_the_chunk_stands(model: Any, cache: kvstrata.Cache) -> None:
    """Of the first layer all is exact, since it depends on nothing before."""
    chunks = ChunkReuse(model, cache, recompute=0, block_tokens=16)

    buffer, _, ids = chunks.prepare([INTRO, ONE, TWO, QUESTION])

    cold = model(ids[:, :-1], use_cache=True)
    (keys, values) = ((layer := cache_of_output(cold).layers[0]).keys, layer.values)
    held = ids.shape[1] - 1
    torch.testing.assert_close(buffer.tensor[0, 0, :, :, :held], keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffer.tensor[0, 1, :, :, :held], values, rtol=1e-4, atol=1e-5)


def test_what_is_stored_are_prefixes_that_anybody_may_use(model: Any, cache: kvstrata.Cache) -> None:
    ChunkReuse(model, cache, recompute=0, block_tokens=16).generate([INTRO, ONE, QUESTION], **ANSWER)
    prefixes = PrefixReuse(model, cache, block_tokens=16)

    output = prefixes.generate(torch.tensor([ONE + QUESTION]), **ANSWER)

    assert output[0].tolist() == own(model, ONE, QUESTION)
    assert prefixes.last is not None
    assert prefixes.last.reused_tokens == len(ONE)


def test_after_a_change_of_the_weights_nothing_of_before_is_used(model: Any, cache: kvstrata.Cache) -> None:
    model = copy.deepcopy(model)
    chunks = ChunkReuse(model, cache, recompute=0, block_tokens=16)
    chunks.generate([ONE, QUESTION], **ANSWER)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(-1.5)

    output = chunks.generate([ONE, QUESTION], **ANSWER)

    assert output[0].tolist() == own(model, ONE, QUESTION)
    assert chunks.last == ChunkStats(len(ONE) + len(QUESTION), len(ONE) + len(QUESTION))


def test_chunks_of_no_full_block_are_computed(model: Any, cache: kvstrata.Cache) -> None:
    chunks = ChunkReuse(model, cache, recompute=0, block_tokens=64)
    given = [INTRO, ONE, QUESTION]

    assert chunks.generate(given, **ANSWER)[0].tolist() == own(model, *given)


def test_what_cannot_be_is_refused(model: Any, cache: kvstrata.Cache) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        ChunkReuse(model, cache, recompute=1.5)
    with pytest.raises(InvalidValue, match="a token at least"):
        ChunkReuse(model, cache).generate([INTRO, [], QUESTION])
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    with pytest.raises(UnsupportedModel, match="rotary"):
        ChunkReuse(transformers.GPT2LMHeadModel(config).eval(), cache)
