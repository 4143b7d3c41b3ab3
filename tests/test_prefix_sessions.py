"""Sessions: a conversation under a name, to the last token, in whichever process and after a restart."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import OpenCache

import kvstrata
from kvstrata import KVLayout, PrefixCache
from kvstrata.errors import InvalidValue

BLOCK = 4
LAYOUT = KVLayout(model="m", dtype="float32", layers=3, kv_heads=2, head_dim=8, block_tokens=BLOCK)
TOKENS = [7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def kv_of(tokens: list[int], layout: KVLayout = LAYOUT) -> np.ndarray[Any, Any]:
    """KV that, as a model's does, depends on all tokens up to its own."""
    shape = (layout.layers, 2, layout.kv_heads, 1, layout.head_dim)
    base = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    return base + np.cumsum(np.array(tokens, "f4") + 1).reshape(1, 1, 1, -1, 1) * np.float32(0.5)


@pytest.fixture
def prefixes(cache: kvstrata.Cache) -> PrefixCache:
    return PrefixCache.open(cache, LAYOUT)


@pytest.mark.parametrize("count", range(1, len(TOKENS) + 1))
def test_a_session_comes_back_with_every_token(prefixes: PrefixCache, count: int) -> None:
    tokens = TOKENS[:count]
    assert prefixes.save_session("s", tokens, kv_of(tokens)) == count // BLOCK
    session = prefixes.resume("s")
    assert session is not None
    loaded = session.load()

    assert session.tokens.tolist() == tokens
    assert (loaded.tokens, loaded.tier, loaded.nbytes) == (count, "memory", count * LAYOUT.token_bytes)
    assert np.array_equal(loaded.kv, kv_of(tokens))


def test_a_session_survives_a_restart(open_cache: OpenCache) -> None:
    cache = open_cache(disk="64MiB")
    PrefixCache.open(cache, LAYOUT).save_session("s", TOKENS, kv_of(TOKENS))
    cache.close()
    session = PrefixCache.open(open_cache(disk="64MiB"), LAYOUT).resume("s")
    assert session is not None
    out = np.zeros((3, 2, 2, 20, 8), "f4")
    loaded = session.load(out)

    assert (loaded.tokens, loaded.tier) == (len(TOKENS), "disk")
    assert np.array_equal(out[:, :, :, : len(TOKENS)], kv_of(TOKENS))


def test_saving_again_replaces_the_session_and_shares_its_blocks(prefixes: PrefixCache) -> None:
    prefixes.save_session("s", TOKENS[:6], kv_of(TOKENS[:6]))

    assert prefixes.save_session("s", TOKENS, kv_of(TOKENS)) == 1
    session = prefixes.resume("s")
    assert session is not None
    assert session.tokens.tolist() == TOKENS
    assert prefixes.save_session("other", TOKENS, kv_of(TOKENS)) == 0


def test_a_session_with_a_lost_block_ends_before_it(prefixes: PrefixCache) -> None:
    prefixes.save_session("s", TOKENS, kv_of(TOKENS))
    prefixes.ns.delete(prefixes.keys(TOKENS)[1])
    session = prefixes.resume("s")
    assert session is not None
    loaded = session.load()

    assert loaded.tokens == BLOCK
    assert np.array_equal(loaded.kv, kv_of(TOKENS[:BLOCK]))


def test_a_session_says_which_prompts_it_begins(prefixes: PrefixCache) -> None:
    prefixes.save_session("s", TOKENS, kv_of(TOKENS))
    session = prefixes.resume("s")
    assert session is not None

    assert session.begins(TOKENS)
    assert session.begins([*TOKENS, 5])
    assert not session.begins(TOKENS[:-1])
    assert not session.begins([*TOKENS[:-1], 99, 5])


def test_what_was_never_saved_or_is_forgotten_is_not_there(prefixes: PrefixCache) -> None:
    assert prefixes.resume("s") is None
    prefixes.save_session("s", TOKENS, kv_of(TOKENS))
    assert prefixes.forget_session("s")
    assert not prefixes.forget_session("s")
    assert prefixes.resume("s") is None
    assert prefixes.match(TOKENS).tokens == 2 * BLOCK


def test_sessions_of_other_tenants_and_layouts_are_others(cache: kvstrata.Cache, prefixes: PrefixCache) -> None:
    prefixes.save_session("s", TOKENS, kv_of(TOKENS))
    for change in ({"salt": b"two"}, {"adapter": "a"}):
        other = PrefixCache(prefixes.ns, msgspec.structs.replace(LAYOUT, **change))
        assert other.resume("s") is None


def test_a_session_record_that_is_not_one_is_a_miss(prefixes: PrefixCache) -> None:
    prefixes.save_session("s", TOKENS, kv_of(TOKENS))
    store = prefixes._sessions
    for value in (b"", b"\1\0\0\0", b"\2\0\0\0" + bytes(400), b"\1\0\0\0\xff\0\0\0" + bytes(400)):
        store._ns.put(store._key("s"), value)
        assert prefixes.resume("s") is None


def test_what_does_not_fit_the_layout_is_refused_and_saves_nothing(prefixes: PrefixCache) -> None:
    with pytest.raises(InvalidValue, match="11 tokens were given"):
        prefixes.save_session("s", TOKENS, kv_of(TOKENS[:5]))
    assert prefixes.resume("s") is None
    prefixes.save_session("s", TOKENS, kv_of(TOKENS))
    session = prefixes.resume("s")
    assert session is not None
    with pytest.raises(InvalidValue, match="longer in tokens"):
        session.load(np.zeros((3, 2, 2, 10, 8), "f4"))
