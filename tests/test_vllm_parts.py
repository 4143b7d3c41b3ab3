"""The parts of the vLLM connector that need no vLLM: keys, copies, and how loads and stores end early."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch

import kvstrata
from kvstrata.errors import ConfigError, UnsupportedModel
from kvstrata.integrations._blocks import EngineBlocks, let_go, share_for_engine
from kvstrata.integrations._vllm.groups import Group, fails_in_blocks, longest
from kvstrata.integrations._vllm.keys import Adapters, RequestKeys, seed_of
from kvstrata.integrations._vllm.memory import BlockMemory
from kvstrata.integrations._vllm.model import weights_of
from kvstrata.integrations._vllm.transfers import Loading, Storing

SEED = seed_of(adapter="", salt="", generation="")
TOKENS = list(range(100, 164))
BLOCKS, LAYERS = 6, 3
PATIENCE_S = 30.0


def keys(seed: bytes = SEED, *features: Any) -> list[bytes]:
    return RequestKeys(seed, 16, features).upto(TOKENS, 4)


def image(offset: int, length: int, name: str) -> Any:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length), identifier=name)


def test_keys_are_the_same_however_they_are_asked_for() -> None:
    grown = RequestKeys(SEED, 16)

    assert grown.upto(TOKENS[:20], 1) == keys()[:1]
    assert grown.upto(TOKENS, 4) == keys()
    assert grown.upto(TOKENS, 2) == keys()[:2]


def test_an_adapter_a_salt_and_a_generation_each_make_other_keys() -> None:
    seeds = [
        SEED,
        seed_of(adapter="a", salt="", generation=""),
        seed_of(adapter="", salt="a", generation=""),
        seed_of(adapter="", salt="", generation="a"),
    ]

    assert len({key for seed in seeds for key in keys(seed)}) == 16


def test_an_image_changes_the_keys_of_its_blocks_and_of_all_behind() -> None:
    plain, cat, dog = keys(), keys(SEED, image(20, 20, "cat")), keys(SEED, image(20, 20, "dog"))

    assert plain[0] == cat[0] == dog[0]
    assert not {*plain[1:]} & {*cat[1:]}
    assert not {*cat[1:]} & {*dog[1:]}
    assert keys(SEED, image(21, 20, "cat"))[1] != cat[1]
    assert RequestKeys(SEED, 16, [image(20, 20, "cat")]).upto(TOKENS, 2) == cat[:2]


def test_an_adapter_is_known_by_its_files_and_is_uncertain_once_they_change(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(b"weights")
    adapters = Adapters()
    first, second = (SimpleNamespace(lora_int_id=1, lora_path=str(path)) for path in paths)

    assert adapters.identity(None) == ""
    assert adapters.identity(first) == adapters.identity(second) != Adapters("float16").identity(second)
    (paths[0] / "adapter_model.safetensors").write_bytes(b"other weights")
    assert adapters.identity(first) is None
    assert Adapters().identity(first) not in (None, adapters.identity(second))
    assert adapters.identity(SimpleNamespace(lora_int_id=3, lora_path=str(tmp_path / "gone"))) is None


def test_weights_are_known_by_the_content_of_their_files(tmp_path: Path) -> None:
    for name, data in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    (tmp_path / "none").mkdir()
    with kvstrata.open(memory="4MiB") as cache:
        found = [weights_of(cache, str(tmp_path / name)) for name in "abc"]

        assert found[0] == found[1] != found[2]
        with pytest.raises(ConfigError, match='"weights": "NAME"'):
            weights_of(cache, str(tmp_path / "none"))
        (tmp_path / "a" / "quantize_config.json").write_text('{"bits": 4}')
        assert weights_of(cache, str(tmp_path / "a")) != found[0]


# ---- Groups


class There:
    """A rank's part of a group, of which some blocks are there."""

    def __init__(self, *missing: int) -> None:
        self.missing = missing
        self.asked = 0

    def match(self, keys: Sequence[bytes]) -> int:
        return next((i for i, there in enumerate(self.present(keys)) if not there), len(keys))

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        self.asked += len(keys)
        return [int.from_bytes(key, "little") not in self.missing for key in keys]


def numbered(count: int) -> list[bytes]:
    return [number.to_bytes(2, "little") for number in range(count)]


def test_a_window_begins_where_vllm_frees_what_lies_before() -> None:
    for window, end, first in (
        (64, 2, 0),
        (64, 3, 1),
        (64, 10, 8),
        (65, 10, 8),
        (66, 10, 7),
        (1, 10, 10),
        (500, 10, 0),
    ):
        assert Group((), window).first_seen(end, 32) == first
    assert Group(()).first_seen(10, 32) == 0


def test_behind_a_prefix_all_blocks_are_seen_or_those_of_the_window() -> None:
    full, window = Group(()), Group((), 64)

    def found(start: int, *parts: tuple[Group, There]) -> int:
        return longest(numbered(10), start, 32, [group for group, _ in parts], [[there] for _, there in parts])

    assert found(0, (full, There()), (window, There(0, 1, 2, 3, 4, 5, 6, 7))) == 10
    assert found(0, (full, There()), (window, There(8))) == 8
    assert found(0, (full, There()), (window, There(8, 6))) == 6
    assert found(0, (full, There(7)), (window, There(5))) == 5
    assert found(0, (full, There()), (window, There(9)), (window, There(8)), (window, There(7))) == 7
    assert found(9, (full, There(2)), (window, There(8))) == 10  # the engine has that one itself
    assert found(0, (full, There(0)), (window, There())) == 0
    assert found(10, (full, There()), (window, There())) == 10


def test_the_longest_prefix_is_found_whatever_is_missing() -> None:
    rng = random.Random(0)
    for _ in range(500):
        blocks, size = rng.randrange(1, 100), rng.choice((1, 16, 32))
        start = rng.randrange(blocks + 1)
        groups = [Group((), rng.choice((None, rng.randrange(1, 100 * size)))) for _ in range(rng.randrange(1, 4))]
        ranks = [
            [There(*rng.sample(range(blocks), rng.choice((0, 1, min(3, blocks))))) for _ in range(rng.randrange(1, 3))]
            for _ in groups
        ]

        def usable(end: int) -> bool:
            return not any(
                max(start, group.first_seen(end, size)) <= block < end  # noqa: B023
                for group, parts in zip(groups, ranks, strict=True)  # noqa: B023
                for part in parts
                for block in part.missing
            )

        expected = max(end for end in range(start, blocks + 1) if usable(end))
        assert longest(numbered(blocks), start, size, groups, ranks) == expected


def test_of_a_long_window_group_only_the_end_is_looked_up() -> None:
    window = There(998)

    assert longest(numbered(1000), 0, 32, [Group((), 64)], [[window]]) == 998
    assert window.asked <= 100


def test_only_where_all_layers_see_everything_blocks_fail_one_by_one() -> None:
    full, window = Group(()), Group((), 64)

    assert fails_in_blocks([full])
    assert not any(fails_in_blocks(groups) for groups in ([window], [full, window], [full, full]))


# ---- Copies


def tensors(*, joined: bool, blocks: int = BLOCKS) -> dict[str, Any]:
    """Layers of [blocks, 2, 4, 8] in one allocation, or each in its own."""
    shape = (blocks, 2, 4, 8)
    if joined:
        everything = torch.zeros((LAYERS, *shape), dtype=torch.bfloat16)
        return {f"layer {i}": everything[i] for i in range(LAYERS)}
    return {f"layer {i}": torch.zeros(shape, dtype=torch.bfloat16) for i in range(LAYERS)}


@pytest.mark.parametrize("joined", [True, False])
def test_a_block_is_copied_out_of_all_layers_and_into_another_block(joined: bool) -> None:
    given = tensors(joined=joined)
    for number, tensor in enumerate(given.values()):
        tensor[2] = number + 1
    memory = BlockMemory(given, BLOCKS)
    data = bytearray(memory.block_bytes)

    memory.read(2, memoryview(data))
    memory.write([(4, memoryview(data))])

    assert memory.block_bytes == LAYERS * 2 * 4 * 8 * 2
    for number, tensor in enumerate(given.values()):
        assert bool((tensor[4] == number + 1).all())
        assert not bool(tensor[[0, 1, 3, 5]].any())


@pytest.mark.parametrize("joined", [True, False])
def test_some_layers_of_a_block_are_written_alone(joined: bool) -> None:
    given = tensors(joined=joined)
    memory = BlockMemory(given, BLOCKS)
    ones = torch.ones(memory.block_bytes // 2, dtype=torch.bfloat16).view(torch.uint8).numpy()

    memory.write([(1, memoryview(ones))], range(1, 2))

    assert [bool(tensor[1].all()) for tensor in given.values()] == [False, True, False]


def test_blocks_of_several_parts_and_permuted_ones_are_copied_as_their_bytes() -> None:
    split = torch.arange(12 * 64, dtype=torch.float32).reshape(12, 4, 16)  # two parts a block
    permuted = torch.arange(6 * 64, dtype=torch.float32).reshape(6, 16, 4).permute(0, 2, 1)
    for tensor in (split, permuted):
        expected = tensor[-1].clone()
        memory = BlockMemory({"layer": tensor}, 6)
        data = bytearray(memory.block_bytes)

        memory.read(5, memoryview(data))
        memory.write([(0, memoryview(data))])

        assert bool((tensor[tensor.shape[0] // 6 - 1] == expected).all())


def test_layers_that_share_their_kv_are_one() -> None:
    given = tensors(joined=True)
    memory = BlockMemory({**given, "another": given["layer 1"]}, BLOCKS)

    assert memory.layers == LAYERS
    assert memory.layer_of["another"] == memory.layer_of["layer 1"]


def test_a_block_is_a_tensor_to_codecs_where_layers_hold_keys_and_then_values_of_each_head() -> None:
    heads, tokens, channels = 3, 16, 8
    plain = {f"layer {i}": torch.zeros(BLOCKS, heads, tokens, 2 * channels, dtype=torch.bfloat16) for i in range(2)}
    uneven = {**plain, "last": torch.zeros(BLOCKS, heads, tokens, 4 * channels, dtype=torch.bfloat16)}
    split = {"layer": torch.zeros(2 * BLOCKS, heads, tokens, 2 * channels)}

    described = BlockMemory(plain, BLOCKS)

    assert described.tensor is not None
    assert described.tensor.nbytes == described.block_bytes
    assert described.tensor.shape == (2, 1, heads, 2, tokens, channels)
    assert described.tensor.axes[3:] == ("kv", "tokens", "channels")
    halves = BlockMemory(split, BLOCKS)
    assert halves.tensor is not None
    assert halves.tensor.shape == (1, 2, heads, 2, tokens, channels)
    assert BlockMemory(uneven, BLOCKS).tensor is None
    assert BlockMemory(tensors(joined=True), BLOCKS).tensor is not None  # whatever the axes are called
    assert BlockMemory({"layer": torch.zeros(BLOCKS, 4, 16, dtype=torch.uint8)}, BLOCKS).tensor is None


def test_kv_that_is_not_dense_or_not_in_this_memory_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="aren't dense"):
        BlockMemory({"layer": torch.zeros(6, 4, 16)[:, :, :8]}, 6)
    with pytest.raises(UnsupportedModel, match="vllm_tier"):
        BlockMemory({"layer": torch.zeros(6, 4, 16, device="meta")}, 6)


def test_a_layout_is_of_the_blocks_and_not_of_where_or_how_many_they_are() -> None:
    layout = BlockMemory(tensors(joined=True), BLOCKS).layout

    assert layout == BlockMemory(tensors(joined=False), BLOCKS).layout
    assert layout == BlockMemory(tensors(joined=True, blocks=12), 12).layout
    assert layout != BlockMemory({name: t.half() for name, t in tensors(joined=True).items()}, BLOCKS).layout


# ---- Under way


@pytest.fixture
def blocks() -> Iterator[EngineBlocks]:
    with kvstrata.open(memory="8MiB") as cache:
        yield EngineBlocks(cache, "vllm", {"model": "m"})
        memory = cache.stats()["memory"]
        assert (memory["pins"], memory["reservations"]) == (0, 0)


@pytest.fixture
def memory() -> BlockMemory:
    return BlockMemory(tensors(joined=True), BLOCKS)


def fill(blocks: EngineBlocks, memory: BlockMemory, *positions: int) -> None:
    names = [keys()[position] for position in positions]
    ones = b"\x01" * memory.block_bytes
    blocks.store(names, memory.block_bytes, lambda _, target: target.__setitem__(slice(None), ones))


@contextmanager
def two_on_disk(path: Path, memory: BlockMemory) -> Iterator[tuple[kvstrata.Cache, EngineBlocks]]:
    """A cache with the first two blocks on disk only."""
    with kvstrata.open(path, memory="8MiB", disk="64MiB") as cache:
        blocks = EngineBlocks(cache, "vllm", {"model": "m"})
        fill(blocks, memory, 0, 1)
        cache.flush()
        cache.demote()
        yield cache, blocks


def load(*where: int) -> Any:
    return SimpleNamespace(request="one", keys=keys()[: len(where)], blocks=list(where))


def read(memory: BlockMemory, block: int) -> bytes:
    data = bytearray(memory.block_bytes)
    memory.read(block, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_load_says_which_blocks_are_missing(blocks: EngineBlocks, memory: BlockMemory, layerwise: bool) -> None:
    fill(blocks, memory, 0, 2)
    loading = Loading(load(3, 4, 5), blocks, memory, time.monotonic() + PATIENCE_S)

    (loading.run_layerwise if layerwise else loading.run)()

    assert loading.ended.is_set()
    assert loading.failed == {4}
    assert read(memory, 3) == read(memory, 5) == b"\x01" * memory.block_bytes


@pytest.mark.parametrize("layerwise", [False, True])
def test_nothing_is_read_for_a_load_that_was_given_up(
    tmp_path: Path, shm: Path, memory: BlockMemory, layerwise: bool
) -> None:
    with two_on_disk(tmp_path, memory) as (cache, blocks):
        loading = Loading(load(3, 4), blocks, memory, 0.0)

        assert loading.abandon(0.0)
        (loading.run_layerwise if layerwise else loading.run)()

        assert cache.stats()["disk"]["loaded_records"] == 0
        assert loading.failed == {3, 4}


def test_a_load_at_once_takes_what_is_in_memory_and_reads_nothing(
    tmp_path: Path, shm: Path, memory: BlockMemory
) -> None:
    with two_on_disk(tmp_path, memory) as (cache, blocks):
        assert blocks.load_each(keys()[:1], lambda _position, _data: True) == [True]  # it is in memory again
        loading = Loading(load(3, 4, 5), blocks, memory, time.monotonic() + PATIENCE_S)

        loading.run_at_once()

        assert loading.ended.is_set()
        assert loading.failed == {4, 5}
        assert read(memory, 3) == b"\x01" * memory.block_bytes
        assert cache.stats()["disk"]["loaded_records"] == 1


@pytest.mark.parametrize("way", ["run_at_once", "run_layerwise"])
def test_a_load_that_breaks_off_while_it_copies_has_brought_nothing(
    blocks: EngineBlocks, memory: BlockMemory, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(blocks, memory, 0)
    loading = Loading(load(3, 4), blocks, memory, time.monotonic() + PATIENCE_S)

    def broken(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(memory, "write", broken)
    with pytest.raises(MemoryError):
        getattr(loading, way)()

    assert loading.failed == {3, 4}


def test_layers_are_waited_for_one_by_one(blocks: EngineBlocks, memory: BlockMemory) -> None:
    fill(blocks, memory, 0)
    loading = Loading(load(3), blocks, memory, time.monotonic() + PATIENCE_S)
    thread = threading.Thread(target=loading.run_layerwise)
    thread.start()

    for layer in range(LAYERS):
        loading.wait_for(layer)
    thread.join(PATIENCE_S)

    assert not loading.failed
    assert read(memory, 3) == b"\x01" * memory.block_bytes


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_load_whose_time_is_over_has_failed_and_writes_nothing_more(
    blocks: EngineBlocks, memory: BlockMemory, layerwise: bool
) -> None:
    fill(blocks, memory, 0)
    loading = Loading(load(3), blocks, memory, 0.0)

    loading.wait_for(0)
    (loading.run_layerwise if layerwise else loading.run)()

    assert loading.failed == {3}
    assert read(memory, 3) == bytes(memory.block_bytes)


def test_a_load_under_way_is_not_abandoned_before_its_time(blocks: EngineBlocks, memory: BlockMemory) -> None:
    loading = Loading(load(3), blocks, memory, 100.0)

    assert not loading.abandon(99.0)
    assert loading.abandon(100.0)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_load_has_failed_only_once_nothing_is_written_any_more(
    blocks: EngineBlocks, memory: BlockMemory, layerwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(blocks, memory, 0)
    loading = Loading(load(3), blocks, memory, 0.0)
    begun, go_on, write = threading.Event(), threading.Event(), memory.write

    def slow(*given: Any) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        write(*given)

    monkeypatch.setattr(memory, "write", slow)
    writer = threading.Thread(target=loading.run_layerwise if layerwise else loading.run)
    writer.start()
    assert begun.wait(PATIENCE_S)
    other = threading.Thread(target=loading.abandon, args=(float("inf"),))
    other.start()
    other.join(0.2)  # which would end at once
    assert other.is_alive()
    assert not loading.ended.is_set()

    go_on.set()
    other.join(PATIENCE_S)
    writer.join(PATIENCE_S)
    assert loading.failed == {3}
    assert loading.ended.is_set()


def test_what_is_overwritten_while_it_is_copied_is_not_stored(blocks: EngineBlocks, memory: BlockMemory) -> None:
    names = keys()
    storing = Storing(SimpleNamespace(keys=names, blocks=[0, 1, 2, 3], request="one", first=0, number=1))  # type: ignore

    def copied(block: int, target: memoryview) -> None:
        memory.read(block, target)
        if block == 2:
            storing.withdraw({2, 5})  # the engine is about to write to it

    stored = blocks.store(names, memory.block_bytes, storing.filled_by(copied), depth=1)

    assert stored == 2
    assert blocks.present(names) == [True, True, False, False]
    assert blocks.stats()["unstored_blocks"] == 2
    assert blocks.stats()["errors"] == 0


def test_the_parts_of_an_engine_share_a_cache_until_the_last_has_let_go(tmp_path: Path, shm: Path) -> None:
    options = {"path": str(tmp_path), "memory": "4MiB", "disk": 0}
    first, second = share_for_engine(options), share_for_engine(dict(reversed(options.items())))

    assert first is second
    let_go(first)
    second.put("key", b"value")
    let_go(second)
    with pytest.raises(kvstrata.errors.CacheClosed):
        second.put("key", b"value")
