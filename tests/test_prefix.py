"""PrefixCache against a dict model, and what it does when blocks are missing, damaged or don't fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import kvstrata
from kvstrata import KVLayout, Namespace, PrefixCache
from kvstrata.errors import ConfigMismatch, InvalidValue

BLOCK = 4
LAYOUT = KVLayout(model="m", dtype="float32", layers=3, kv_heads=2, head_dim=8, block_tokens=BLOCK)
BIG = KVLayout(model="m", dtype="float32", layers=8, kv_heads=4, head_dim=64, block_tokens=64)  # 1 MiB blocks


def kv_of(tokens: Sequence[int], layout: KVLayout = LAYOUT) -> np.ndarray[Any, Any]:
    """KV that, as a model's does, depends on all tokens up to its own."""
    shape = (layout.layers, 2, layout.kv_heads, 1, layout.head_dim)
    base = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    history = np.cumsum(np.array(tokens, "f4") + 1).reshape(1, 1, 1, -1, 1) * np.float32(0.5)
    return base + history


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A namespace of a private cache; leaks of pins and reservations fail the test."""
    with kvstrata.open(memory="32MiB") as cache:
        yield cache.namespace("kv", immutable=True)
        memory = cache.stats()["memory"]
        assert (memory["pins"], memory["reservations"]) == (0, 0)


@pytest.fixture
def prefixes(ns: Namespace) -> PrefixCache:
    return PrefixCache(ns, LAYOUT)


class AgainstADict(RuleBasedStateMachine):
    """Store, lose and load prefixes; a dict from the tokens up to a block's end says what must be found."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = kvstrata.open(memory="8MiB")
        self.prefixes = PrefixCache(self.cache.namespace("kv", immutable=True), LAYOUT)
        self.stored: dict[tuple[int, ...], bytes] = {}

    def teardown(self) -> None:
        self.cache.close()

    tokens = st.lists(st.integers(0, 1), max_size=5 * BLOCK + 2)  # few tokens, so that prefixes are shared

    def run(self, tokens: list[int]) -> int:
        """How many blocks of `tokens` are there in a row, from the first on."""
        ends = range(BLOCK, len(tokens) + 1, BLOCK)
        return next((i for i, end in enumerate(ends) if tuple(tokens[:end]) not in self.stored), len(ends))

    @rule(tokens=tokens)
    def store(self, tokens: list[int]) -> None:
        ends = [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        new = [end for end in ends if end not in self.stored]
        kv = kv_of(tokens)

        assert self.prefixes.store(tokens, kv) == len(new)

        for end in new:
            self.stored[end] = kv[:, :, :, len(end) - BLOCK : len(end)].tobytes()

    @rule(tokens=tokens, index=st.integers(0, 4))
    def lose_a_block(self, tokens: list[int], index: int) -> None:
        keys = self.prefixes.keys(tokens)
        if index < len(keys):
            there = self.stored.pop(tuple(tokens[: (index + 1) * BLOCK]), None) is not None
            assert self.prefixes.ns.delete(keys[index]) == there

    @rule(tokens=tokens)
    def load(self, tokens: list[int]) -> None:
        match = self.prefixes.match(tokens)
        loaded = match.load()

        assert match.tokens == loaded.tokens == self.run(tokens) * BLOCK
        assert loaded.nbytes == loaded.kv.nbytes
        assert loaded.tier == ("memory" if loaded.tokens else "none")
        for end in range(BLOCK, loaded.tokens + 1, BLOCK):
            assert loaded.kv[:, :, :, end - BLOCK : end].tobytes() == self.stored[tuple(tokens[:end])]

    @invariant()
    def nothing_is_held(self) -> None:
        memory = self.cache.stats()["memory"]
        assert (memory["pins"], memory["reservations"]) == (0, 0)


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_block_lost_between_match_and_load_gives_a_shorter_prefix(prefixes: PrefixCache) -> None:
    tokens = list(range(20))
    prefixes.store(tokens, kv_of(tokens))
    match = prefixes.match(tokens)
    prefixes.ns.delete(match.keys[2])

    loaded = match.load()

    assert (match.tokens, loaded.tokens) == (20, 8)
    assert np.array_equal(loaded.kv, kv_of(tokens)[:, :, :, :8])
    assert prefixes.stats()["short_loads"] == 1


def test_a_value_of_another_size_under_a_blocks_key_ends_the_prefix(prefixes: PrefixCache) -> None:
    tokens = list(range(12))
    keys = prefixes.keys(tokens)
    prefixes.ns.put(keys[1], b"not a block")
    prefixes.store(tokens, kv_of(tokens))

    assert prefixes.match(tokens).load().tokens == 4


def test_a_load_fills_the_head_of_a_longer_out_and_touches_nothing_else(
    prefixes: PrefixCache,
) -> None:
    tokens = list(range(10))
    prefixes.store(tokens, kv_of(tokens))
    whole = np.full((3, 2, 2, 30, 8), -1, "f4")
    out = whole[:, :, :, 5:25]

    loaded = prefixes.match(tokens).load(out=out)

    assert np.shares_memory(loaded.kv, whole)
    assert np.array_equal(whole[:, :, :, 5:13], kv_of(tokens)[:, :, :, :8])
    assert (whole[:, :, :, :5] == -1).all()
    assert (whole[:, :, :, 13:] == -1).all()


def test_max_tokens_bounds_a_load_to_whole_blocks(prefixes: PrefixCache) -> None:
    tokens = list(range(20))
    prefixes.store(tokens, kv_of(tokens))

    assert [prefixes.match(tokens).load(max_tokens=limit).tokens for limit in (0, 3, 4, 11, 99)] == [
        0,
        0,
        4,
        8,
        20,
    ]


def test_a_match_loads_nothing(ns: Namespace, prefixes: PrefixCache) -> None:
    tokens = list(range(20))
    prefixes.store(tokens, kv_of(tokens))
    before = ns._cache.stats()["memory"]["hits"]

    assert prefixes.match(tokens).tokens == 20
    assert ns._cache.stats()["memory"]["hits"] == before


def test_large_loads_copied_by_several_threads_are_exact(ns: Namespace) -> None:
    tokens = list(range(700))
    kv = kv_of(tokens, BIG)
    prefixes = PrefixCache(ns, BIG, threads=3)

    assert prefixes.store(tokens, kv) == 10
    assert np.array_equal(prefixes.match(tokens).load().kv, kv[:, :, :, :640])


def test_threads_may_load_and_store_the_same_prefix_at_once(ns: Namespace) -> None:
    tokens = list(range(400))
    kv = kv_of(tokens, BIG)
    prefixes = PrefixCache(ns, BIG)

    def both(_: int) -> bool:
        prefixes.store(tokens, kv)
        loaded = prefixes.match(tokens).load()
        return loaded.tokens == 384 and np.array_equal(loaded.kv, kv[:, :, :, :384])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(8)))


def test_a_prompt_larger_than_memory_keeps_its_head_and_no_block_behind_a_hole() -> None:
    with kvstrata.open(memory="8MiB") as cache:
        prefixes = PrefixCache(cache.namespace("kv", immutable=True), BIG)
        tokens = list(range(64 * 20))
        stored = prefixes.store(tokens, kv_of(tokens, BIG))

        assert 4 <= stored < 8
        assert prefixes.match(tokens).tokens == stored * 64
        assert sum(key in prefixes.ns for key in prefixes.keys(tokens)) == stored
        assert prefixes.stats()["stores_cut_short"] == 1
        assert cache.stats()["memory"]["pins"] == 0


@pytest.mark.parametrize("policy", ["lru", "auto"])
@pytest.mark.parametrize("loads", [False, True])
def test_a_prefix_is_evicted_from_its_tail(policy: str, loads: bool) -> None:
    with kvstrata.open(memory="8MiB") as cache:
        prefixes = PrefixCache(cache.namespace("kv", policy=policy, immutable=True), BIG)
        old, new = list(range(64 * 5)), list(range(7, 7 + 64 * 4))
        prefixes.store(old, kv_of(old, BIG))
        if loads:
            assert prefixes.match(old).load().tokens == 64 * 5
        prefixes.store(new, kv_of(new, BIG))

        there = [key in prefixes.ns for key in prefixes.keys(old)]

        assert prefixes.match(new).tokens == 64 * 4
        assert 0 < sum(there) < 5
        assert there == sorted(there, reverse=True)


def test_prefixes_opened_for_a_layout_are_immutable_and_under_auto() -> None:
    with kvstrata.open(memory="8MiB") as cache:
        prefixes = PrefixCache.open(cache, LAYOUT)
        assert prefixes.ns.name == LAYOUT.name()
        with pytest.raises(ConfigMismatch, match="policy"):
            cache.namespace(LAYOUT.name(), immutable=True)
        with pytest.raises(ConfigMismatch, match="immutable"):
            cache.namespace(LAYOUT.name(), policy="auto")
        assert PrefixCache.open(cache, LAYOUT, name="another").ns.name == "another"


def prefix_blocks(cache: kvstrata.Cache) -> tuple[PrefixCache, list[list[int]]]:
    """Prefixes under auto, and tokens of many that share nothing, of four blocks each."""
    return PrefixCache.open(cache, BIG), [list(range(1000 * i, 1000 * i + 64 * 4)) for i in range(40)]


def test_of_prefixes_that_were_stored_under_auto_none_ever_has_a_hole(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, memory="16MiB", disk=0) as cache:
        prefixes, prompts = prefix_blocks(cache)
        for number, tokens in enumerate(prompts):
            prefixes.store(tokens, kv_of(tokens, BIG))
            prefixes.match(prompts[number // 2]).load()
            for earlier in prompts[: number + 1]:
                there = [key in prefixes.ns for key in prefixes.keys(earlier)]
                assert there == sorted(there, reverse=True)


def test_blocks_that_come_up_from_disk_one_by_one_keep_their_places_under_auto(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, memory="16MiB", disk="256MiB") as cache:
        prefixes, prompts = prefix_blocks(cache)
        old = prompts[:3]
        for tokens in old:
            prefixes.store(tokens, kv_of(tokens, BIG))
        cache.flush()
        cache.demote()
        for tokens in old:
            for key in prefixes.keys(tokens):  # nothing but their places says that they belong together
                prefixes.ns.pin(key).release()
        cut = 0
        for tokens in prompts[3:]:
            prefixes.store(tokens, kv_of(tokens, BIG))
            cache.flush()
            for earlier in old:
                below = prefixes.ns._space.pin_many(prefixes.keys(earlier), uses=False)[1]
                assert below == list(range(4 - len(below), 4))
                cut += 0 < len(below) < 4
        assert cut > 0


def test_one_array_and_pairs_of_each_layer_are_stored_alike(ns: Namespace) -> None:
    tokens = list(range(8))
    kv = kv_of(tokens)
    for number, given in enumerate((kv, [(layer[0], layer[1]) for layer in kv], np.asfortranarray(kv))):
        prefixes = PrefixCache(ns, msgspec.structs.replace(LAYOUT, salt=bytes([number])))
        assert prefixes.store(tokens, given) == 2
        assert np.array_equal(prefixes.match(tokens).load().kv, kv)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_torch_tensors_of_every_dtype_come_back_bit_for_bit(ns: Namespace, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tokens = list(range(8))
    layout = msgspec.structs.replace(LAYOUT, dtype=dtype)
    kv = torch.from_numpy(kv_of(tokens)).to(getattr(torch, dtype))
    prefixes = PrefixCache(ns, layout)

    assert prefixes.store(tokens, [(layer[0], layer[1]) for layer in kv]) == 2

    bits = kv.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[kv.element_size()]).numpy()
    assert np.array_equal(prefixes.match(tokens).load().kv.view(bits.dtype), bits)


@pytest.mark.parametrize("other", [{"salt": b"another tenant"}, {"dtype": "float16"}, {"model": "another"}])
def test_another_layout_finds_nothing(ns: Namespace, prefixes: PrefixCache, other: dict[str, Any]) -> None:
    tokens = list(range(20))
    prefixes.store(tokens, kv_of(tokens))

    assert PrefixCache(ns, msgspec.structs.replace(LAYOUT, **other)).match(tokens).tokens == 0


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (kv_of(range(9)), "9 tokens"),
        (kv_of(range(8)).astype("f8"), "float64"),
        (kv_of(range(8))[:2], "shape"),
        (kv_of(range(8))[:, :, :1], "keys of layer 0"),
        (kv_of(range(8))[..., :4], "keys of layer 0"),
        (kv_of(range(8))[0, 0], "shape"),
        ([(layer[0], layer[1]) for layer in kv_of(range(8))][:2], "2 layers"),
        ([(layer[0], layer[1][:, :7]) for layer in kv_of(range(8))], "values of layer 0"),
        ([("a", "b")] * 3, "str"),
    ],
)
def test_kv_that_does_not_fit_the_layout_is_refused(prefixes: PrefixCache, kv: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        prefixes.store(list(range(8)), kv)
    assert prefixes.match(list(range(8))).tokens == 0


@pytest.mark.parametrize(
    "out",
    [np.empty((3, 2, 2, 7, 8), "f4"), np.empty((3, 2, 2, 8, 8), "f8"), np.empty((3, 2, 1, 8, 8), "f4"),
     np.empty(768, "f4"), bytearray(10_000), np.broadcast_to(np.float32(0), (3, 2, 2, 8, 8))],
    ids=["short", "dtype", "heads", "flat", "bytes", "read-only"],
)  # fmt: skip
def test_an_out_that_does_not_fit_is_refused(prefixes: PrefixCache, out: Any) -> None:
    prefixes.store(list(range(8)), kv_of(range(8)))

    with pytest.raises(InvalidValue, match="out"):
        prefixes.match(list(range(8))).load(out=out)


def test_prefixes_outlive_the_process_and_are_loaded_from_disk(tmp_path: Path) -> None:
    tokens = list(range(64 * 6))
    kv = kv_of(tokens, BIG)
    with kvstrata.open(tmp_path, memory="16MiB", disk="64MiB") as cache:
        PrefixCache(cache.namespace("kv", immutable=True), BIG).store(tokens, kv)

    with kvstrata.open(tmp_path, memory="16MiB", disk="64MiB") as cache:
        prefixes = PrefixCache(cache.namespace("kv", immutable=True), BIG)
        first, second = (prefixes.match(tokens).load() for _ in range(2))

    assert (first.tier, first.disk_blocks) == ("disk", 6)
    assert (second.tier, second.disk_blocks) == ("memory", 0)
    assert np.array_equal(first.kv, kv)
    assert np.array_equal(second.kv, kv)


def test_a_block_damaged_on_disk_gives_a_shorter_prefix_and_is_stored_again(tmp_path: Path) -> None:
    tokens = list(range(64 * 6))
    kv = kv_of(tokens, BIG)
    with kvstrata.open(tmp_path, memory="16MiB", disk="64MiB") as cache:
        PrefixCache(cache.namespace("kv", immutable=True), BIG).store(tokens, kv)
    damaged = kv[:, :, :, 64 * 3 : 64 * 4].tobytes()
    for segment in tmp_path.rglob("seg-*.kvs"):
        data = segment.read_bytes()
        if (at := data.find(damaged)) >= 0:
            segment.write_bytes(data[: at + 1000] + bytes([data[at + 1000] ^ 1]) + data[at + 1001 :])

    with kvstrata.open(tmp_path, memory="16MiB", disk="64MiB") as cache:
        prefixes = PrefixCache(cache.namespace("kv", immutable=True), BIG)
        match = prefixes.match(tokens)
        loaded = match.load()

        assert (match.tokens, loaded.tokens) == (64 * 6, 64 * 3)
        assert np.array_equal(loaded.kv, kv[:, :, :, : 64 * 3])
        assert prefixes.store(tokens, kv) == 1
        assert np.array_equal(prefixes.match(tokens).load().kv, kv)


@pytest.mark.parametrize("disk", [None, "64MiB"], ids=["memory alone", "disk"])
def test_a_prefix_of_more_blocks_than_a_process_may_pin_is_stored_and_loaded(
    shm: Path, tmp_path: Path, disk: str | None
) -> None:
    layout = KVLayout(model="m", dtype="bfloat16", layers=1, kv_heads=1, head_dim=8, block_tokens=16)
    tokens = np.arange(9000 * layout.block_tokens)
    kv = np.arange(2 * len(tokens) * 8).astype(np.uint16).reshape(1, 2, 1, len(tokens), 8)
    with kvstrata.open(tmp_path if disk else None, memory="48MiB", disk=disk) as cache:
        prefixes = PrefixCache.open(cache, layout)
        assert prefixes.store(tokens, kv) == 9000
        loaded = prefixes.match(tokens).load()
        assert loaded.tokens == len(tokens)
        assert np.array_equal(loaded.kv, kv)


def test_a_prefix_longer_than_memory_is_still_loaded_from_disk(tmp_path: Path) -> None:
    tokens = list(range(64 * 12))
    kv = kv_of(tokens, BIG)
    with kvstrata.open(tmp_path, memory="8MiB", disk="64MiB") as cache:
        prefixes = PrefixCache(cache.namespace("kv", immutable=True), BIG)
        stored = prefixes.store(tokens, kv)
        loaded = prefixes.match(tokens).load()

    assert loaded.tokens == stored * 64
    assert stored > 7
    assert np.array_equal(loaded.kv, kv[:, :, :, : loaded.tokens])
