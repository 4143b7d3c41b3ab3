"""What the plug-ins of all engines have in common: blocks by the engine's keys, trouble that never fails a request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OpenCache
from support.stores import MemoryStore

import kvstrata
from kvstrata.codecs import TensorInfo
from kvstrata.errors import TierUnavailable, UnknownOption
from kvstrata.integrations._blocks import PIECE, EngineBlocks, Withdrawn, fingerprint, open_for_engine
from kvstrata.remote_url import RemoteURL
from kvstrata.tiers.keyed import KeyedTier

SIZE = 64 << 10
KEYS = [b"block %d" % i for i in range(4)]


@pytest.fixture
def cache() -> Iterator[kvstrata.Cache]:
    with kvstrata.open(memory="8MiB") as cache:
        yield cache


@pytest.fixture
def blocks(cache: kvstrata.Cache) -> EngineBlocks:
    return EngineBlocks(cache, "test", {"model": "m"})


def filled(blocks: EngineBlocks, keys: list[bytes] = KEYS) -> int:
    def fill(position: int, memory: memoryview) -> None:
        memory[:] = bytes([position % 255 + 1]) * SIZE

    return blocks.store(keys, SIZE, fill, depth=1)


def test_what_was_stored_is_loaded_into_the_buffers_given(blocks: EngineBlocks) -> None:
    assert filled(blocks) == 4
    outs = [bytearray(SIZE) for _ in KEYS]

    assert blocks.match(KEYS) == 4
    assert blocks.load(KEYS, outs) == [True] * 4
    assert [out[:1] + out[-1:] for out in outs] == [bytes([i, i]) for i in (1, 2, 3, 4)]
    assert blocks.present([KEYS[0], b"another"]) == [True, False]


def test_a_tier_elsewhere_is_asked_once_for_all_that_is_not_here(
    open_cache: OpenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    monkeypatch.setattr(RemoteURL, "open", lambda url: KeyedTier(store, lookup_s=30.0))
    writer, reader = (open_cache(tmp_path / name, remote="redis://there") for name in "ab")
    filled(EngineBlocks(writer, "test", {"model": "m"}))
    writer.flush()
    blocks = EngineBlocks(reader, "test", {"model": "m"})
    assert blocks.load(KEYS[:1], [bytearray(SIZE)]) == [True]
    asked = store.calls.get("contains", 0)

    assert blocks.present([KEYS[0], b"another", *KEYS[1:]]) == [True, False, True, True, True]
    assert store.calls["contains"] == asked + 1


def test_a_block_of_another_length_than_its_buffer_is_a_miss(blocks: EngineBlocks) -> None:
    filled(blocks)
    out = bytearray(SIZE - 1)

    assert blocks.load(KEYS[:1], [out]) == [False]
    assert out == bytes(SIZE - 1)


def test_blocks_come_up_from_disk_into_the_buffers_given(tmp_path: Path, shm: Path) -> None:
    with kvstrata.open(tmp_path / "cache", memory="8MiB", disk="16MiB") as cache:
        blocks = EngineBlocks(cache, "test", {"model": "m"})
        filled(blocks)
        cache.flush()
        cache.demote()
        outs = [bytearray(SIZE) for _ in (*KEYS, "absent")]

        assert min(blocks.sizes_below(KEYS)) > SIZE
        assert blocks.load([*KEYS, b"absent"], outs) == [True] * 4 + [False]
        assert [out[:1] for out in outs] == [bytes([i]) for i in (1, 2, 3, 4, 0)]
        assert blocks.sizes_below(KEYS) == [0] * 4
        assert cache.stats()["memory"]["pins"] == 0


def test_each_block_is_given_once_and_may_be_refused(blocks: EngineBlocks) -> None:
    filled(blocks)
    given: list[int] = []

    def take(position: int, block: memoryview) -> bool:
        given.append(position)
        return block[0] != 2

    assert blocks.load_each(KEYS, take) == [True, False, True, True]
    assert sorted(given) == [0, 1, 2, 3]
    assert blocks.stats()["loaded_bytes"] == 3 * SIZE


def test_a_load_that_is_not_wanted_any_more_ends_with_its_piece(blocks: EngineBlocks) -> None:
    keys = [bytes([i]) for i in range(2 * PIECE + 1)]
    blocks.store(keys, 8, lambda i, memory: memory.__setitem__(slice(None), bytes(8)))
    given: list[int] = []

    def take(position: int, block: memoryview) -> bool:
        given.append(position)
        return True

    got = blocks.load_each(keys, take, wanted=lambda: not given)

    assert got == [position < PIECE for position in range(len(keys))]
    assert sorted(given) == list(range(PIECE))
    assert all(blocks.load_each(keys, take, wanted=lambda: True))


def test_a_store_ends_where_its_source_is_withdrawn(blocks: EngineBlocks) -> None:
    def fill(position: int, memory: memoryview) -> None:
        if position == 2:
            raise Withdrawn

    assert blocks.store(KEYS, SIZE, fill) == 2
    assert blocks.present(KEYS) == [True, True, False, False]
    assert (blocks.stats()["unstored_blocks"], blocks.stats()["errors"]) == (2, 0)


def test_a_store_that_may_have_holes_leaves_out_only_what_is_withdrawn(blocks: EngineBlocks) -> None:
    def fill(position: int, memory: memoryview) -> None:
        if position == 2:
            raise Withdrawn

    assert blocks.store(KEYS, SIZE, fill, holes=True) == 3
    assert blocks.present(KEYS) == [True, True, False, True]
    assert (blocks.stats()["unstored_blocks"], blocks.stats()["errors"]) == (1, 0)


def test_blocks_are_found_by_the_name_of_their_fingerprint(cache: kvstrata.Cache, blocks: EngineBlocks) -> None:
    filled(blocks)

    assert EngineBlocks.named(cache, blocks.name).match(KEYS) == 4


def test_blocks_that_are_there_are_not_filled_again(blocks: EngineBlocks) -> None:
    filled(blocks)

    def never(position: int, memory: memoryview) -> None:
        raise AssertionError

    assert blocks.store(KEYS, SIZE, never) == 4
    assert blocks.stats()["stored_blocks"] == 4


def test_a_long_prefix_ends_where_memory_does_and_keeps_its_head(blocks: EngineBlocks) -> None:
    keys = [b"%d" % i for i in range(200)]  # more than fit

    done = filled(blocks, keys)

    assert 50 < done < 200
    assert blocks.match(keys) == done
    assert blocks.stats()["unstored_blocks"] == 200 - done
    assert blocks.stats()["errors"] == 0


def test_a_failing_cache_is_a_miss_that_is_counted_and_soon_not_asked(
    blocks: EngineBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(blocks)
    asked = 0

    def fail(keys: object) -> None:
        nonlocal asked
        asked += 1
        raise TierUnavailable("gone")

    monkeypatch.setattr(blocks.ns, "contains_prefix", fail)
    for _ in range(10):
        assert blocks.match(KEYS) == 0

    assert asked == 3
    assert blocks.stats()["errors"] == 3
    assert blocks.stats()["breaker"] == "open"


def test_other_facts_mean_other_blocks(cache: kvstrata.Cache, blocks: EngineBlocks) -> None:
    filled(blocks)

    assert EngineBlocks(cache, "test", {"model": "another"}).match(KEYS) == 0
    assert EngineBlocks(cache, "test", {"model": "m"}).match(KEYS) == 4


def test_blocks_that_a_lossy_codec_has_changed_are_found_by_those_only_who_asked_for_it(cache: kvstrata.Cache) -> None:
    tensor = TensorInfo("float32", (2, SIZE // 8))
    plain, lossless, lossy, of_one_tier = (
        EngineBlocks(cache, "test", {}, codec=codec, tensor=tensor)
        for codec in (None, "planes", "int8", {"disk": "planes", "remote": "int8"})
    )
    filled(plain)

    assert lossless.match(KEYS) == 4
    assert lossy.match(KEYS) == of_one_tier.match(KEYS) == 0
    assert len({blocks.name for blocks in (plain, lossy, of_one_tier)}) == 3
    assert EngineBlocks(cache, "test", {}, codec="int8", tensor=tensor).name == lossy.name


def test_a_fingerprint_is_the_same_in_every_process_and_tells_facts_apart() -> None:
    assert fingerprint("vllm", {"a": 1, "b": "x"}) == fingerprint("vllm", {"b": "x", "a": "1"})
    assert fingerprint("vllm", {"a": "bc"}) != fingerprint("vllm", {"ab": "c"})
    assert fingerprint("vllm", {}) == "vllm-59b540cfc63098c6c7b2e37db11a0c60"


def test_the_options_of_an_engine_are_those_of_open_and_others_are_refused(tmp_path: Path, shm: Path) -> None:
    with open_for_engine({"path": str(tmp_path), "memory": "4MiB", "disk": 0, "own": 1}, known=["own"]) as cache:
        assert cache.options.memory == 4 << 20
    with pytest.raises(UnknownOption, match="memory"):
        open_for_engine({"path": str(tmp_path), "memmory": "4MiB"})


def test_blocks_that_the_caller_holds_are_not_looked_for_again(blocks: EngineBlocks) -> None:
    filled(blocks)
    pins, sizes = blocks.pin_here([KEYS[1], b"another"])
    assert (pins[1], sizes) == (None, [0, 0])
    assert pins[0] is not None
    blocks.delete(KEYS[1:2])
    taken: dict[int, int] = {}

    def take(position: int, block: memoryview) -> bool:
        taken[position] = block[0]
        return True

    with pins[0] as held:
        assert blocks.load_each(KEYS, take, [None, held, None, None]) == [True] * 4
    assert taken == {0: 1, 1: 2, 2: 3, 3: 4}
    counted = blocks.stats()
    assert (counted["loaded_blocks"], counted["loaded_bytes"], counted["missed_blocks"]) == (4, 4 * SIZE, 0)


def test_sizes_are_those_of_records_wherever_they_lie(tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, memory="8MiB", disk="16MiB") as cache:
        blocks = EngineBlocks(cache, "test", {"model": "m"})
        filled(blocks)
        sizes = blocks.record_sizes([*KEYS, b"another"])
        assert sizes[4] == 0
        assert all(SIZE < size < SIZE + 8192 for size in sizes[:4])
        cache.flush()
        cache.demote()

        assert blocks.record_sizes([*KEYS, b"another"]) == sizes
        assert blocks.pin_here(KEYS) == ([None] * 4, sizes[:4])  # nothing was loaded
        assert sorted(blocks.keys(b"block")) == KEYS
        assert blocks.absent([*KEYS, b"another"]) == [False] * 4 + [True]
        pins = blocks.pin(KEYS)
        assert [pin is not None and len(pin) for pin in pins] == [SIZE] * 4
        assert cache.stats()["memory"]["pins"] == 4
        for pin in pins:
            assert pin is not None
            pin.release()
