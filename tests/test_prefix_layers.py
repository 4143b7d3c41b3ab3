"""Loading a prefix layer by layer: what is given out is right, and what is lost meanwhile is told of."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix import BIG, BLOCK, LAYOUT, kv_of

import kvstrata
from kvstrata import KVLayout, Match, PrefixCache, _core
from kvstrata.errors import CacheClosed, InvalidValue, PrefixShortened, TierUnavailable
from kvstrata.keys import DEFAULT_BLOCK_TOKENS
from kvstrata.prefix_layer_work import LayerWork, layer_groups

N = 6  # blocks of a prompt
TOKENS = list(range(64 * N))
KV = kv_of(TOKENS, BIG)
Words = np.ndarray[Any, Any]


class Filled:
    """A cache with a prompt on disk and in memory; `reopen` after its files were changed."""

    def __init__(self, path: Path, memory: str = "32MiB") -> None:
        self.path = path
        self.memory = memory
        self.open()
        assert self.prefixes.store(TOKENS, KV) == N
        self.cache.flush()

    def open(self) -> None:
        self.cache = kvstrata.open(self.path, memory=self.memory, disk="64MiB")
        self.prefixes = PrefixCache.open(self.cache, BIG)

    def reopen(self, change: Callable[[], None]) -> None:
        self.cache.close()
        change()
        self.open()

    def change_bytes(self, of: bytes, at: int) -> None:
        """Flip a bit in the segments, `at` bytes behind where `of` begins."""
        found = 0
        for segment in self.path.rglob("seg-*.kvs"):
            data = bytearray(segment.read_bytes())
            if (start := data.find(of)) >= 0:
                data[start + at] ^= 4
                segment.write_bytes(data)
                found += 1
        assert found == 1

    def held(self) -> tuple[int, int]:
        memory = self.cache.stats()["memory"]
        return memory["pins"], memory["reservations"]


@pytest.fixture
def filled(shm: Path, tmp_path: Path) -> Iterator[Filled]:
    filled = Filled(tmp_path / "cache")
    yield filled
    filled.cache.flush()
    assert filled.held() == (0, 0)
    assert filled.cache.stats()["memory"]["allocator_faults"] == 0
    filled.cache.close()


class Gate:
    """Lets groups of reads from number `first` on wait until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int = 1) -> None:
        self.opened = threading.Event()
        read = LayerWork._read

        def gated(work: LayerWork, group: int, *rest: Any) -> None:
            if group >= first:
                assert self.opened.wait(60)
            read(work, group, *rest)

        monkeypatch.setattr(LayerWork, "_read", gated)


def in_child(check: Callable[[], None]) -> bool:
    """Whether a check holds in a forked child."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def block(index: int) -> bytes:
    return KV[:, :, :, 64 * index : 64 * (index + 1)].tobytes()


def test_layers_come_in_order_and_as_they_were_stored_from_memory_and_from_disk(filled: Filled) -> None:
    for tier in ("memory", "disk"):
        if tier == "disk":
            filled.cache.demote()
        layers = filled.prefixes.match(TOKENS).load_layers()
        for number, (layer, words) in enumerate(layers):
            assert layer == number
            assert words.shape == (2, BIG.kv_heads, len(TOKENS), BIG.head_dim)
            assert np.array_equal(words, KV[layer])
        assert layers.tokens == len(TOKENS)
        assert layers.loaded.tier == tier
        assert np.array_equal(layers.loaded.kv, KV)
        assert filled.held() == (0, 0)


def test_blocks_loaded_by_layers_are_in_memory_afterwards(filled: Filled) -> None:
    filled.cache.demote()
    list(filled.prefixes.match(TOKENS).load_layers())

    assert filled.prefixes.match(TOKENS).load().tier == "memory"
    assert filled.cache.stats()["disk"]["loaded_records"] == N
    assert filled.prefixes.stats()["loads"] == 2


@settings(max_examples=40)
@given(
    in_memory=st.sets(st.integers(0, N - 1)), lost=st.sets(st.integers(0, N - 1), max_size=1), limit=st.integers(0, 400)
)
def test_any_mix_of_blocks_in_memory_on_disk_and_lost_gives_the_run_that_is_there(
    tmp_path_factory: pytest.TempPathFactory, in_memory: set[int], lost: set[int], limit: int
) -> None:
    filled = mixed(tmp_path_factory)
    assert filled.prefixes.store(TOKENS, KV) <= 1
    filled.cache.flush()
    filled.cache.demote()
    match = filled.prefixes.match(TOKENS)
    for index in in_memory:
        filled.prefixes.ns.pin(match.keys[index]).release()
    for index in lost:
        filled.prefixes.ns.delete(match.keys[index])
    blocks = min(*lost, limit // 64, N) if lost else min(limit // 64, N)

    layers = match.load_layers(max_tokens=limit)
    got = list(layers)

    assert layers.tokens == blocks * 64
    assert len(got) == (BIG.layers if blocks else 0)
    for layer, words in got:
        assert np.array_equal(words, KV[layer, :, :, : blocks * 64])
    assert layers.loaded.disk_blocks == len(set(range(blocks)) - in_memory)
    assert filled.held() == (0, 0)


_mixed: list[Filled] = []


def mixed(factory: pytest.TempPathFactory) -> Filled:
    if not _mixed:
        _mixed.append(Filled(factory.mktemp("mixed") / "cache"))
    return _mixed[0]


@pytest.fixture(scope="module", autouse=True)
def close_mixed() -> Iterator[None]:
    yield
    while _mixed:
        _mixed.pop().cache.close()


Loading = Callable[[Match, Any], None]


def by_layers(match: Match, out: Any) -> None:
    for layer, words in match.load_layers(out):
        assert np.shares_memory(words, out)
        assert np.array_equal(words, KV[layer])


def whole(match: Match, out: Any) -> None:
    assert match.load(out).tokens == len(TOKENS)


@pytest.mark.parametrize("load", [by_layers, whole])
def test_a_strided_out_is_filled_and_nothing_beside_it(filled: Filled, load: Loading) -> None:
    filled.cache.demote()
    longer = np.full((8, 2, 4, 500, 64), -1, "f4")

    load(filled.prefixes.match(TOKENS), longer[:, :, :, 50:490])

    assert np.array_equal(longer[:, :, :, 50 : 50 + len(TOKENS)], KV)
    assert (longer[:, :, :, :50] == -1).all()
    assert (longer[:, :, :, 50 + len(TOKENS) :] == -1).all()


@pytest.mark.parametrize("load", [by_layers, whole])
@pytest.mark.parametrize("axes", [(0, 1, 2, 4, 3), (3, 1, 2, 0, 4), (4, 3, 2, 1, 0)])
def test_an_out_of_another_order_in_memory_is_filled_too(filled: Filled, axes: tuple[int, ...], load: Loading) -> None:
    filled.cache.demote()
    shape = (8, 2, 4, len(TOKENS), 64)
    made = np.zeros([shape[axis] for axis in axes], "f4")
    out = made.transpose(np.argsort(axes))

    load(filled.prefixes.match(TOKENS), out)

    assert np.array_equal(out, KV)


def test_an_out_that_does_not_fit_is_refused_and_nothing_is_held(filled: Filled) -> None:
    with pytest.raises(InvalidValue, match="out"):
        filled.prefixes.match(TOKENS).load_layers(np.empty((8, 2, 4, 10, 64), "f4"))


@pytest.mark.parametrize("layout", [LAYOUT, msgspec.structs.replace(LAYOUT, layers=7, head_dim=100, block_tokens=37)])
def test_blocks_that_share_pages_with_others_or_whose_layers_do_come_as_they_were_stored(
    shm: Path, tmp_path: Path, layout: KVLayout
) -> None:
    tokens = list(range(layout.block_tokens * 5))
    kv = kv_of(tokens, layout)
    with kvstrata.open(tmp_path, memory="16MiB", disk="64MiB") as cache:
        prefixes = PrefixCache.open(cache, layout)
        prefixes.store(tokens, kv)
        cache.flush()
        cache.demote()
        layers = prefixes.match(tokens).load_layers()
        for layer, words in layers:
            assert np.array_equal(words, kv[layer])
        assert (layers.tokens, layers.loaded.tier) == (len(tokens), "disk")


def test_without_a_match_there_are_no_layers(filled: Filled) -> None:
    layers = filled.prefixes.match([7] * 128).load_layers()

    assert list(layers) == []
    assert layers.tokens == 0


# ---- Losses


@pytest.mark.parametrize("layer", [0, 3, 7])
@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_layer_damaged_on_disk_is_never_given_out(filled: Filled, layer: int, index: int) -> None:
    filled.reopen(lambda: filled.change_bytes(block(index), layer * BIG.layer_bytes + 1000))
    layers = filled.prefixes.match(TOKENS).load_layers()
    told = []
    shortened = []
    for _ in range(3):  # it goes on after the error
        try:
            for number, words in layers:
                told.append(number)
                assert np.array_equal(words, KV[number, :, :, : words.shape[2]])
        except PrefixShortened as error:
            shortened.append((error.tokens, error.layer, len(told)))

    assert all(tokens == index * 64 and layer == before for tokens, layer, before in shortened)
    assert len(shortened) <= 1
    assert layers.tokens == index * 64
    assert told == list(range(len(told)))
    assert len(told) == BIG.layers or index == 0
    assert np.array_equal(layers.loaded.kv, KV[:, :, :, : index * 64])
    assert filled.cache.stats()["disk"]["corrupt_records"] == 1
    assert filled.prefixes.match(TOKENS).tokens == index * 64
    assert filled.prefixes.stats()["short_loads"] == 1


def test_a_loss_after_a_layer_was_given_out_raises_once_and_the_rest_comes_shorter(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.reopen(lambda: filled.change_bytes(block(4), 5 * BIG.layer_bytes))
    gate = Gate(monkeypatch)
    layers = filled.prefixes.match(TOKENS).load_layers()

    assert next(layers)[1].shape[2] == layers.tokens == 64 * N
    gate.opened.set()
    layers._work._thread.join()
    with pytest.raises(PrefixShortened) as caught:
        next(layers)
    assert (caught.value.tokens, caught.value.layer) == (64 * 4, 1)

    rest = list(layers)
    assert [layer for layer, _ in rest] == list(range(1, 8))
    for layer, words in rest:
        assert np.array_equal(words, KV[layer, :, :, : 64 * 4])
    assert np.array_equal(layers.loaded.kv, KV[:, :, :, : 64 * 4])


def test_a_prefix_of_which_nothing_is_left_raises_and_then_ends(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.reopen(lambda: filled.change_bytes(block(0), 7 * BIG.layer_bytes))
    gate = Gate(monkeypatch)
    layers = filled.prefixes.match(TOKENS).load_layers()
    next(layers)
    gate.opened.set()
    layers._work._thread.join()

    with pytest.raises(PrefixShortened, match="0 tokens"):
        next(layers)
    assert list(layers) == []
    assert layers.tokens == 0


@pytest.mark.parametrize(("what", "at"), [("checksums", 10), ("header", -4096 + 24), ("key", -4096 + 70)])
def test_a_damaged_trailer_or_header_ends_the_prefix_before_its_block(filled: Filled, what: str, at: int) -> None:
    of = block(2)
    filled.reopen(lambda: filled.change_bytes(of, len(of) + at if what == "checksums" else at))

    layers = filled.prefixes.match(TOKENS).load_layers()
    sizes = {words.shape[2] for _, words in layers}

    assert layers.tokens == 64 * 2
    assert sizes == {64 * 2}


def test_a_segment_that_is_gone_or_cut_costs_the_blocks_in_it(filled: Filled) -> None:
    filled.cache.demote()
    match = filled.prefixes.match(TOKENS)
    for segment in filled.path.rglob("seg-*.kvs"):
        os.truncate(segment, 1 << 20)

    layers = match.load_layers()

    assert list(layers) == []
    assert layers.tokens == 0
    assert filled.cache.stats()["disk"]["vanished_records"] >= 1
    assert filled.prefixes.match(TOKENS).tokens == 0


def test_the_checksums_of_another_block_are_not_taken_for_its_own(filled: Filled) -> None:
    def swap() -> None:
        first, second = block(1), block(2)
        for segment in filled.path.rglob("seg-*.kvs"):
            data = segment.read_bytes()
            if first in data:
                length = BIG.value_bytes
                a, b = data.find(first), data.find(second)
                changed = bytearray(data)
                changed[a : a + length] = data[b : b + length]
                segment.write_bytes(changed)

    filled.reopen(swap)
    layers = filled.prefixes.match(TOKENS).load_layers()
    list(layers)

    assert layers.tokens == 64


def test_a_read_error_is_counted_and_ends_the_prefix(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.cache.demote()
    monkeypatch.setattr(_core, "read_pieces", lambda fd, pieces: [5] * len(list(pieces)))

    layers = filled.prefixes.match(TOKENS).load_layers()

    assert list(layers) == []
    assert filled.cache.stats()["disk"]["error EIO"] >= 1
    assert filled.prefixes.match(TOKENS).tokens == 64 * N


def test_where_direct_reads_are_refused_the_page_cache_is_used(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    read = _core.read_pieces

    def refusing(fd: int, pieces: Any) -> list[int]:
        direct = os.O_DIRECT & int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
        return [22] * len(pieces) if direct else read(fd, pieces)

    filled.cache.demote()
    monkeypatch.setattr(_core, "read_pieces", refusing)

    assert all(np.array_equal(words, KV[layer]) for layer, words in filled.prefixes.match(TOKENS).load_layers())


# ---- Ends


def test_an_early_close_lets_go_of_everything(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.cache.demote()
    filled.prefixes.ns.pin(filled.prefixes.keys(TOKENS)[0]).release()
    gate = Gate(monkeypatch)
    with filled.prefixes.match(TOKENS).load_layers() as layers:
        next(layers)
        assert filled.held() == (1, N - 1)
        layers._work.cancel()
        gate.opened.set()

    assert filled.held() == (0, 0)
    assert list(layers) == []
    assert layers.tokens == 0
    assert filled.prefixes.match(TOKENS).load().tokens == 64 * N


def test_a_load_that_nobody_holds_any_more_ends_by_itself(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.cache.demote()
    gate = Gate(monkeypatch)
    layers = filled.prefixes.match(TOKENS).load_layers()
    next(layers)
    work = layers._work
    del layers
    gc.collect()
    gate.opened.set()
    work.join()

    assert work.closed
    assert filled.held() == (0, 0)


def test_closing_the_cache_ends_a_load_under_way(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.cache.demote()
    gate = Gate(monkeypatch)
    layers = filled.prefixes.match(TOKENS).load_layers()
    next(layers)
    closing = threading.Thread(target=filled.cache.close)
    closing.start()
    with pytest.raises(CacheClosed):  # comes when closing has begun
        next(layers)
    gate.opened.set()
    closing.join()

    with pytest.raises(CacheClosed):
        filled.prefixes.match(TOKENS)
    filled.open()


def test_a_forked_child_is_told_that_the_load_is_not_its_own(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.cache.demote()
    gate = Gate(monkeypatch)
    layers = filled.prefixes.match(TOKENS).load_layers()
    next(layers)

    def child() -> None:
        with pytest.raises(TierUnavailable, match="forked"):
            next(layers)
        layers.close()

    assert in_child(child)
    gate.opened.set()
    assert len(list(layers)) == BIG.layers - 1


def test_an_unexpected_error_in_the_background_gets_to_the_caller(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.cache.demote()

    def defect(fd: int, pieces: object) -> list[int]:
        raise RuntimeError("a defect")

    monkeypatch.setattr(_core, "read_pieces", defect)
    layers = filled.prefixes.match(TOKENS).load_layers()

    with pytest.raises(RuntimeError, match="a defect"):
        next(layers)
    layers.close()


# ---- Several at once


def test_several_loads_of_the_same_blocks_read_them_once(filled: Filled) -> None:
    filled.cache.demote()

    def load(number: int) -> bool:
        match = filled.prefixes.match(TOKENS)
        if number % 2:
            return np.array_equal(match.load().kv, KV)
        layers = match.load_layers()
        return all(np.array_equal(words, KV[layer]) for layer, words in layers) and layers.tokens == 64 * N

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(load, range(4)))
    assert filled.cache.stats()["disk"]["loaded_records"] == N


def test_threads_may_share_a_load(filled: Filled) -> None:
    filled.cache.demote()
    layers = filled.prefixes.match(TOKENS).load_layers()

    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda _: list(layers), range(3)))

    assert sorted(layer for part in parts for layer, _ in part) == list(range(BIG.layers))
    assert all(np.array_equal(words, KV[layer]) for part in parts for layer, words in part)


def test_a_prefix_longer_than_memory_comes_layer_by_layer_all_the_same(shm: Path, tmp_path: Path) -> None:
    tokens = list(range(64 * 12))
    kv = kv_of(tokens, BIG)
    with kvstrata.open(tmp_path, memory="8MiB", disk="64MiB") as cache:
        prefixes = PrefixCache.open(cache, BIG)
        stored = prefixes.store(tokens, kv)
        cache.flush()
        layers = prefixes.match(tokens).load_layers()
        assert all(np.array_equal(words, kv[layer, :, :, : stored * 64]) for layer, words in layers)
        assert layers.tokens == stored * 64 > 7 * 64
        memory = cache.stats()["memory"]
        assert (memory["pins"], memory["reservations"]) == (0, 0)


@given(st.integers(1, 130), st.integers(1, 1 << 22))
def test_groups_cover_all_layers_in_order_and_none_is_much_of_the_whole(layers: int, layer_bytes: int) -> None:
    ends = layer_groups(layers, layer_bytes)
    sizes = np.diff([0, *ends])

    assert ends[-1] == layers
    assert (sizes >= 1).all()
    assert sizes[0] <= -(-layers // 10)
    assert sizes.max() <= -(-layers // 8)


def test_the_default_block_is_read_in_pieces_that_are_worth_it() -> None:
    layout = KVLayout(model="m", dtype="bfloat16", layers=30, kv_heads=3, head_dim=64)

    assert layout.block_tokens == DEFAULT_BLOCK_TOKENS
    assert layer_groups(layout.layers, layout.layer_bytes) == [2, 4, 8, 12, 16, 20, 24, 28, 29, 30]
    assert LAYOUT.block_tokens == BLOCK
