"""Keys of prefix blocks: deterministic everywhere, chained, and separate for whatever changes the KV."""

from __future__ import annotations

import os
import subprocess
import sys

import blake3
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ConfigError, InvalidValue
from kvstrata.keys import KVLayout, prefix_keys

LAYOUT = KVLayout(
    model="LlamaForCausalLM:0f1e", dtype="bfloat16", layers=30, kv_heads=3, head_dim=64,
    block_tokens=16, attention="sdpa", rope='{"rope_theta": 100000.0}', salt=b"tenant",
)  # fmt: skip
OTHERS = {
    "model": "LlamaForCausalLM:0f1f", "dtype": "float16", "layers": 31, "kv_heads": 4, "head_dim": 128,
    "block_tokens": 32, "attention": "eager", "rope": "", "adapter": "lora", "tp_size": 2, "salt": b"tenanu",
}  # fmt: skip
GOLDEN_SEED = "5b0b3f0ce21fe4aa3d89c6876b166c22bdf00d8dc98307a7dd1e3d0bdc4fa10f"
GOLDEN_KEYS = [
    "cef038ca6d5567e8bd7e5449f17fa358315487328d10b4f890eee93249e16069",
    "3334991470fd1df53f48d04dca884eab69e497c805aaa6a32050a62d1a645ba0",
]

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=100)


def test_the_seed_and_keys_of_a_layout_never_change() -> None:
    keys = prefix_keys(range(1000, 1040), LAYOUT.seed(), 16)

    assert LAYOUT.seed().hex() == GOLDEN_SEED
    assert [key.hex() for key in keys] == GOLDEN_KEYS


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_keys_are_the_same_in_a_process_with_another_hash_seed(hash_seed: str) -> None:
    code = (
        "from kvstrata.keys import *; "
        "layout = KVLayout(model='m', dtype='float32', layers=2, kv_heads=1, head_dim=8, salt=b's'); "
        "print(b''.join(prefix_keys(range(100), layout.seed(), 32)).hex())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    layout = KVLayout(model="m", dtype="float32", layers=2, kv_heads=1, head_dim=8, salt=b"s")

    assert there.stdout.strip() == b"".join(prefix_keys(range(100), layout.seed(), 32)).hex()


@given(tokens_lists, st.integers(1, 20))
def test_keys_follow_the_documented_chain(tokens: list[int], block: int) -> None:
    seed = LAYOUT.seed()
    digest, expected = bytes(32), []
    for start in range(0, len(tokens) - len(tokens) % block, block):
        data = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + block])
        digest = blake3.blake3(digest + data, key=seed).digest()
        expected.append(digest)

    assert prefix_keys(tokens, seed, block) == expected


@given(tokens_lists, tokens_lists)
def test_two_prompts_share_exactly_the_keys_of_their_common_blocks(first: list[int], second: list[int]) -> None:
    common = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
                  min(len(first), len(second)))  # fmt: skip
    ours, theirs = (prefix_keys(tokens, LAYOUT.seed(), 4) for tokens in (first, second))

    assert [a == b for a, b in zip(ours, theirs, strict=False)] == [
        index < common // 4 for index in range(min(len(ours), len(theirs)))
    ]


@pytest.mark.parametrize("field", OTHERS)
def test_layouts_that_differ_in_one_field_share_no_key(field: str) -> None:
    other = msgspec.structs.replace(LAYOUT, **{field: OTHERS[field]})

    assert not set(prefix_keys(range(64), LAYOUT.seed(), 16)) & set(prefix_keys(range(64), other.seed(), 16))


def test_layouts_that_differ_in_tensor_parallel_rank_share_no_key() -> None:
    ranks = [msgspec.structs.replace(LAYOUT, tp_size=2, tp_rank=rank) for rank in (0, 1)]

    assert ranks[0].seed() != ranks[1].seed()


def test_fields_can_not_run_into_one_another() -> None:
    one = msgspec.structs.replace(LAYOUT, attention="sdpa", adapter="x")
    other = msgspec.structs.replace(LAYOUT, attention="sdpax", adapter="")

    assert one.seed() != other.seed()


def test_the_namespace_name_is_of_the_layout_but_tells_nothing_of_the_salt() -> None:
    salted = msgspec.structs.replace(LAYOUT, salt=b"another")

    assert salted.name() == LAYOUT.name()
    assert salted.name() != msgspec.structs.replace(LAYOUT, layers=31).name()


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda t: np.array(t, np.uint16), range])
def test_tokens_may_come_in_any_integer_sequence(kind: object) -> None:
    tokens = range(40) if kind is range else kind(list(range(40)))  # type: ignore[operator]

    assert prefix_keys(tokens, LAYOUT.seed(), 16) == prefix_keys(list(range(40)), LAYOUT.seed(), 16)


@pytest.mark.parametrize(
    "tokens",
    [[1, -1], [2**32], [2**70], [1.0], ["a"], [[1, 2], [3, 4]], [[1], [2, 3]], [True, False], [None], b"ab",
     "ab", 7, np.zeros((2, 2), int), np.array([-1]), np.array([1.5])],
    ids=repr,
)  # fmt: skip
def test_what_are_no_tokens_is_refused(tokens: object) -> None:
    with pytest.raises(InvalidValue, match="tokens"):
        prefix_keys(tokens, LAYOUT.seed(), 16)  # type: ignore[arg-type]


def test_no_tokens_and_a_rest_shorter_than_a_block_have_no_key() -> None:
    assert prefix_keys([], LAYOUT.seed(), 16) == []
    assert prefix_keys(range(15), LAYOUT.seed(), 16) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", ""), ("dtype", "int3"), ("layers", 0), ("kv_heads", -1), ("head_dim", 1.5),
     ("block_tokens", True), ("block_tokens", 5000), ("tp_rank", 1), ("salt", "text"), ("rope", None)],
)  # fmt: skip
def test_a_layout_that_can_not_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        msgspec.structs.replace(LAYOUT, **{field: value})


def test_a_seed_of_the_wrong_length_and_an_empty_block_are_refused() -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        prefix_keys([1], b"short", 16)
    with pytest.raises(ConfigError, match="at least 1"):
        prefix_keys([1], bytes(32), 0)


def test_sizes_follow_from_the_layout() -> None:
    assert LAYOUT.token_bytes == 23_040
    assert LAYOUT.block_bytes == 16 * 23_040
    assert LAYOUT.layer_bytes == 16 * 23_040 // 30
    assert LAYOUT.value_bytes == 16 * 23_040 + 4 * 31
    assert LAYOUT.block_shape == (30, 2, 3, 16, 64)
