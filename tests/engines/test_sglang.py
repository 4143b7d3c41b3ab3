"""kvstrata under SGLang's own storage code: its factory, host pools and controller, as they run without a GPU."""

from __future__ import annotations

import dataclasses
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import Process

import kvstrata
from engines.conftest import need
from kvstrata.errors import CacheClosed, ConfigError, TierUnavailable, UnknownOption

need("sglang")
with warnings.catch_warnings():  # SGLang's, at its import
    warnings.simplefilter("ignore")
    import torch
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, PoolHitPolicy, PoolName, PoolTransfer

    from engines import sglang_pools
    from engines.sglang_pools import (
        PAGE,
        Controller,
        config,
        indices_of,
        mha_pool,
        mla_pool,
        page_of,
        randomize,
        server,
    )

pytestmark = pytest.mark.filterwarnings("ignore")

LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
HASHES = [f"{i:064x}" for i in range(12)]
Make = Callable[..., Any]


@pytest.fixture
def make(shm: Path, tmp_path: Path) -> Iterator[Make]:
    """Makes backends as SGLang does, at one path, and closes them; no pin may be left."""
    made: list[Any] = []

    def make(pool: Any, given: Any = None, **changes: Any) -> Any:
        options = {"path": str(tmp_path / "cache"), "disk": "64MiB", **changes.pop("options", {})}
        made.append(sglang_pools.backend(pool, given or config(options=options, **changes)))
        return made[-1]

    yield make
    for backend in made:
        try:
            backend._cache.flush()
        except CacheClosed:
            continue
        stats = backend._cache.stats()["memory"]
        backend.close()
        assert (stats["pins"], stats["reservations"], stats["allocator_faults"]) == (0, 0, 0)


def on_disk_only(backend: Any) -> None:
    backend._cache.flush()
    backend._cache.demote()


@pytest.mark.parametrize("v1", [True, False], ids=["zero copy", "generic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_byte_for_byte_through_sglangs_controller(make: Make, layout: str, v1: bool) -> None:
    pool, other = mha_pool(layout), mha_pool(layout)
    randomize(pool)
    pages = [5, 0, 9, 3, 7, 1, 2, 11, 4, 6, 8, 10]
    first = make(pool, v1=v1)

    assert Controller(pool, first, v1=v1).back_up(HASHES, indices_of(*pages)) == 12
    assert first.batch_exists(HASHES) == 12
    first.close()

    second = make(other, v1=v1)  # after a restart
    places = list(range(20, 32))
    assert second.batch_exists([*HASHES, "unknown"]) == 12
    assert Controller(other, second, v1=v1).prefetch(HASHES, indices_of(*places)) == 12
    assert [page_of(other, page) for page in places] == [page_of(pool, page) for page in pages]
    counted = second.stats()["kv"]
    assert (counted["loaded_blocks"], counted["missed_blocks"], counted["errors"]) == (12, 0, 0)


def test_a_prefix_ends_at_the_first_page_that_is_not_there(make: Make) -> None:
    pool = mha_pool()
    backend = make(pool)
    backend.batch_set_v1(HASHES[:3] + HASHES[4:6], indices_of(0, 1, 2, 4, 5))

    assert backend.batch_exists(HASHES) == 3
    assert backend.batch_get_v1(HASHES[:6], indices_of(*range(6))) == [True, True, True, False, True, True]
    assert Controller(pool, backend).prefetch(HASHES[:6], indices_of(*range(6))) == 3
    assert [backend.exists(key) for key in HASHES[2:5]] == [True, False, True]


CHANGES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "model": ({"model_name": "another"}, mha_pool),
    "tensor-parallel rank": ({"tp_rank": 1, "tp_size": 2}, mha_pool),
    "tensor-parallel size": ({"tp_size": 2}, mha_pool),
    "pipeline rank": ({"pp_rank": 1, "pp_size": 2}, mha_pool),
    "context-parallel rank": ({"attn_cp_rank": 1, "attn_cp_size": 2}, mha_pool),
    "dtype": ({}, lambda: mha_pool(dtype=torch.float16)),
    "layout": ({}, lambda: mha_pool("page_first_direct")),
    "interface": ({"v1": False}, mha_pool),
    "salt": ({"options": {"salt": "of another tenant"}}, mha_pool),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_bytes_of_a_page_keeps_it_apart(make: Make, change: str) -> None:
    pool = mha_pool()
    assert all(make(pool).batch_set_v1(HASHES, indices_of(*range(12))))
    assert make(mha_pool()).batch_exists(HASHES) == 12

    changes, make_pool = CHANGES[change]
    assert make(make_pool(), **changes).batch_exists(HASHES) == 0


STARTED = {"model_path": "a/model", "kv_cache_dtype": "fp8_e4m3"}
OTHERWISE: dict[str, dict[str, Any]] = {
    "type of KV": {"kv_cache_dtype": "fp8_e5m2"},
    "weights": {"model_path": "a/fine-tune"},
    "revision": {"revision": "of yesterday"},
    "weights that are drawn": {"load_format": "dummy"},
    "configuration": {"json_model_override_args": '{"rope_theta": 5000}'},
    "dtype": {"dtype": "float16"},
    "quantization": {"quantization": "fp8"},
    "scales": {"quantization_param_path": "scales.json"},
    "model that drafts": {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": "a/draft"},
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_servers_of_one_name_share_pages_only_if_they_were_started_alike(make: Make, change: str) -> None:
    pools = {"fp8_e4m3": mha_pool(dtype=torch.float8_e4m3fn), "fp8_e5m2": mha_pool(dtype=torch.float8_e5m2)}
    assert {pool.dtype for pool in pools.values()} == {torch.uint8}  # as which SGLang keeps both
    with server(**STARTED):
        assert all(make(pools["fp8_e4m3"]).batch_set_v1(HASHES, indices_of(*range(12))))
        assert make(pools["fp8_e4m3"]).batch_exists(HASHES) == 12

    other = STARTED | OTHERWISE[change]
    with server(**other):
        assert make(pools[other["kv_cache_dtype"]]).batch_exists(HASHES) == 0


def test_models_at_one_relative_path_are_told_apart_by_where_they_are(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for place in ("one", "other", "one"):
        (tmp_path / place / "model").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        with server(model_path="model"):
            backend = make(mha_pool())
            found.append(backend.batch_exists(HASHES))
            backend.batch_set_v1(HASHES, indices_of(*range(12)))

    assert found == [0, 0, 12]


def test_without_a_server_kv_of_8_bits_has_to_be_named(make: Make) -> None:
    backend = make(mha_pool())
    eight_bits = mha_pool(dtype=torch.float8_e4m3fn)

    with pytest.raises(ConfigError, match='"salt": "NAME"'):
        backend.register_mem_pool_host(eight_bits)
    with pytest.raises(ConfigError, match='"salt": "NAME"'):
        backend.register_mem_host_pool_v2(eight_bits, PoolName.DRAFT)
    assert all(make(eight_bits, options={"salt": "e4m3"}).batch_set_v1(HASHES, indices_of(*range(12))))


def test_all_ranks_share_one_copy_of_latents_but_not_of_a_state_that_is_split(make: Make) -> None:
    pool, other = mla_pool(), mla_pool()
    randomize(pool)
    first, second = (make(p, is_mla_model=True, tp_rank=rank, tp_size=4) for rank, p in enumerate((pool, other)))
    for backend in (first, second):
        backend.register_mem_host_pool_v2(mha_pool(), PoolName.MAMBA)

    assert all(first.batch_set_v1(HASHES, indices_of(*range(12))))
    state = PoolTransfer(name=PoolName.MAMBA, keys=HASHES, host_indices=indices_of(*range(12)))
    assert all(first.batch_set_v2([state])[PoolName.MAMBA])

    assert all(second.batch_get_v1(HASHES, indices_of(*range(12))))
    assert page_of(other, 7) == page_of(pool, 7)
    assert not any(second.batch_get_v2([state])[PoolName.MAMBA])


def test_a_corrupted_page_in_the_middle_ends_the_prefix_and_heals(make: Make, tmp_path: Path) -> None:
    pool, other = mha_pool(), mha_pool()
    randomize(pool)
    first = make(pool)
    assert all(first.batch_set_v1(HASHES, indices_of(*range(12))))
    first.close()
    needle = page_of(pool, 5)[:64]
    damaged = 0
    for file in (tmp_path / "cache").rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        if (at := data.find(needle)) >= 0:
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            damaged += 1
    assert damaged == 1

    backend = make(other)
    got = backend.batch_get_v1(HASHES, indices_of(*range(12)))

    assert got == [i != 5 for i in range(12)]
    assert all(page_of(other, i) == page_of(pool, i) for i in range(12) if i != 5)
    assert backend.batch_exists(HASHES) == 5
    assert all(make(pool).batch_set_v1(HASHES, indices_of(*range(12))))
    assert all(backend.batch_get_v1(HASHES, indices_of(*range(12))))
    assert page_of(other, 5) == page_of(pool, 5)


def test_a_full_cache_keeps_the_head_and_says_what_it_did_not_store(make: Make) -> None:
    pool = mha_pool(tokens=1024 * PAGE)
    randomize(pool)
    backend = make(pool, options={"memory": "2MiB", "disk": 0, "path": None})
    hashes = [f"{i:064x}" for i in range(1024)]

    done = backend.batch_set_v1(hashes, indices_of(*range(1024)))

    stored = done.index(False)
    assert stored > 50
    assert done == [True] * stored + [False] * (1024 - stored)
    assert backend.batch_exists(hashes) == stored
    assert all(backend.batch_get_v1(hashes[:stored], indices_of(*range(stored))))
    assert backend.stats()["kv"]["errors"] == 0


def test_a_full_cache_keeps_the_head_also_page_by_page(make: Make) -> None:
    backend = make(mha_pool(), v1=False, options={"memory": "2MiB", "disk": 0, "path": None})
    hashes = [f"{i:064x}" for i in range(1024)]

    assert backend.batch_set(hashes, [torch.full((4096,), i % 100, dtype=torch.bfloat16) for i in range(1024)]) is False

    stored = backend.batch_exists(hashes)
    assert 50 < stored < 1024
    pages = backend.batch_get(hashes[:stored], [torch.empty(4096, dtype=torch.bfloat16) for _ in range(stored)])
    assert all(bool((page == i % 100).all()) for i, page in enumerate(pages))


def test_a_pool_without_memory_of_its_own_says_which_pages_are_there(make: Make) -> None:
    class Anchor:
        """Some hybrid models have their KV in other pools only, and this one hands out their numbers."""

        page_size = PAGE
        layout = "page_first"

        def get_page_buffer_meta(self, indices: Any) -> None:
            return None

    backend = make(Anchor())
    assert backend.batch_set_v1(HASHES[:5], indices_of(*range(5))) == [True] * 5
    assert backend.batch_exists(HASHES) == 5
    assert backend.batch_get_v1(HASHES[:6], indices_of(*range(6))) == [True] * 5 + [False]


WRITE = """
import itertools
from engines.sglang_pools import backend, config, indices_of, mha_pool, randomize
pool = mha_pool()
randomize(pool)
storage = backend(pool, config(options=options))
for i in itertools.count():
    storage.batch_set_v1([f"{i} {page}" for page in range(16)], indices_of(*range(16)))
"""


def test_a_server_killed_while_storing_leaves_only_whole_pages(make: Make, shm: Path, tmp_path: Path) -> None:
    options = {"path": str(tmp_path / "cache"), "disk": "64MiB"}
    with Process(OMP_NUM_THREADS="1") as writer:
        writer.start(WRITE, options=options)
        pool, other = mha_pool(), mha_pool()
        randomize(pool)
        backend = make(other)
        while not backend.exists("20 0"):
            time.sleep(0.01)
        writer.kill()

    whole = 0
    for i in range(200):
        keys = [f"{i} {page}" for page in range(16)]
        for page, there in enumerate(backend.batch_get_v1(keys, indices_of(*range(16)))):
            assert not there or page_of(other, page) == page_of(pool, page)
            whole += there
    assert whole > 0
    assert all(backend.batch_set_v1(HASHES, indices_of(*range(12))))


def test_trouble_below_is_a_miss_that_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = mha_pool()
    backend = make(pool)
    backend.batch_set_v1(HASHES, indices_of(*range(12)))

    def fail(*_: object) -> None:
        raise TierUnavailable("gone")

    monkeypatch.setattr(backend._kv.blocks.ns, "contains_prefix", fail)
    assert [backend.batch_exists(HASHES) for _ in range(10)] == [0] * 10
    counted = backend.stats()["kv"]
    assert (counted["breaker"], counted["breaker_refused"] > 0) == ("open", True)
    assert not any(backend.batch_get_v1(HASHES, indices_of(*range(12))))  # not asked either


def test_indices_of_another_number_than_the_keys_move_nothing(make: Make) -> None:
    pool = mha_pool()
    backend = make(pool)

    assert backend.batch_set_v1(HASHES, indices_of(0)) == [False] * 12
    assert backend.batch_get_v1(HASHES, indices_of(0)) == [False] * 12


@pytest.mark.parametrize("policy", [PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES])
def test_hybrid_models_get_the_same_answers_as_from_sglangs_file_backend(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: PoolHitPolicy
) -> None:
    """Any pages may be missing of KV and of another pool; what can be restored is what SGLang's own storage says."""
    names = [PoolName.KV, PoolName.SWA]
    pool = mha_pool()
    for seed in range(12):
        chance = random.Random(seed)
        directory = tmp_path / f"files {seed}"
        given = config(options={"path": None})
        files = HiCacheFile(dataclasses.replace(given, extra_config=None), str(directory))
        ours = make(pool, given)
        for backend in (files, ours):
            backend.register_mem_pool_host(pool)
            for name in names:
                backend.register_mem_host_pool_v2(pool, name)
        there = {name: [i for i in range(12) if chance.random() < 0.85] for name in names}
        for name, pages in there.items():
            some = PoolTransfer(name=name, keys=[HASHES[i] for i in pages], host_indices=indices_of(*pages))
            for backend in (files, ours):
                assert all(backend.batch_set_v2([some])[name])
        asked = [PoolTransfer(name=PoolName.SWA, keys=HASHES[: chance.randint(1, 3)], hit_policy=policy)]

        assert ours.batch_exists_v2(HASHES, asked) == files.batch_exists_v2(HASHES, asked), there
        assert ours.batch_exists_v2(HASHES, []) == files.batch_exists_v2(HASHES, [])


def test_pages_of_other_pools_come_back_also_from_pools_that_list_no_buffers(make: Make) -> None:
    class Reticent:
        """A pool whose pages can only be had one by one, as of some hybrid models in some layouts."""

        def __init__(self) -> None:
            self._pool = mha_pool("layer_first")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._pool, name)

        def get_page_buffer_meta(self, indices: Any) -> Any:
            raise NotImplementedError

    backend = make(mha_pool())
    for made in (Reticent, mla_pool):
        pool = made()
        randomize(pool)
        backend.register_mem_host_pool_v2(pool, PoolName.INDEXER)
        before = [page_of(pool, page) for page in range(12)]
        there = PoolTransfer(name=PoolName.INDEXER, keys=HASHES, host_indices=indices_of(*range(12)))
        back = PoolTransfer(name=PoolName.INDEXER, keys=HASHES, host_indices=indices_of(*range(12, 24)))

        assert backend.batch_set_v2([there]) == {PoolName.INDEXER: [True] * 12}
        assert backend.batch_get_v2([back]) == {PoolName.INDEXER: [True] * 12}
        assert [page_of(pool, page) for page in range(12, 24)] == before
    unknown = PoolTransfer(name=PoolName.DRAFT, keys=HASHES, host_indices=indices_of(*range(12)))
    assert backend.batch_get_v2([unknown]) == {PoolName.DRAFT: [False] * 12}


def test_sglangs_own_storage_tests_pass(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its wheel for Mooncake, with kvstrata in its place."""
    of_sglang = sglang_pools.test_mooncake_store
    v1 = False

    def store(given: Any) -> Any:
        options = config(v1=v1, options={"path": None}).extra_config
        return make(mha_pool(), dataclasses.replace(given, model_name="m", extra_config=options))

    monkeypatch.setattr(of_sglang, "MooncakeStore", store)
    of_sglang.test_single_operation()
    v1 = True
    for mla, rank, size in [(False, 0, 1), (True, 0, 1), (False, 1, 4), (True, 3, 8)]:
        of_sglang.test_batch_operation(
            of_sglang.make_hicache_storage_config(is_mla_model=mla, tp_rank=rank, tp_size=size)
        )


def test_metrics_are_what_sglang_expects_and_count_what_moved(make: Make) -> None:
    pool = mha_pool()
    backend = make(pool, enable_storage_metrics=True)
    backend.batch_set_v1(HASHES, indices_of(*range(12)))
    backend.batch_get_v1(HASHES[:5], indices_of(*range(5)))

    metrics = backend.get_stats()
    assert isinstance(metrics, sglang_pools.StorageMetrics)
    assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([12], [5])
    assert len(metrics.backup_bandwidth) == len(metrics.prefetch_bandwidth) == 1
    assert backend.get_stats().backup_pgs == []
    assert make(pool).get_stats() is None


def test_clear_removes_this_models_pages_for_everybody_and_after_a_restart(make: Make) -> None:
    pool = mha_pool()
    first, other = make(pool), make(pool, model_name="another")
    for backend in (first, other):
        assert all(backend.batch_set_v1(HASHES, indices_of(*range(12))))

    assert make(pool).clear() is True

    assert (first.batch_exists(HASHES), other.batch_exists(HASHES)) == (0, 12)
    assert make(pool).batch_exists(HASHES) == 0


def test_options_that_cannot_be_used_are_said_at_the_start(make: Make) -> None:
    with pytest.raises(UnknownOption, match="memory"):
        make(mha_pool(), options={"memroy": "1GiB"})
    with pytest.raises(ConfigError, match="model"):
        make(mha_pool(), model_name=None)


def test_without_a_pool_it_says_that_one_comes_first(shm: Path) -> None:
    from kvstrata.integrations.sglang import KVStrataHiCache

    backend = KVStrataHiCache(config(), {})
    with pytest.raises(ConfigError, match="register_mem_pool_host"):
        backend.exists("key")
    backend.close()


def test_pages_below_memory_are_found_without_loading_them(make: Make) -> None:
    pool = mha_pool()
    backend = make(pool)
    backend.batch_set_v1(HASHES, indices_of(*range(12)))
    on_disk_only(backend)

    assert backend.batch_exists(HASHES) == 12
    assert backend._cache.stats()["memory"]["memory_record_bytes"] == 0


def test_the_cache_that_a_user_opens_sees_the_namespaces(make: Make, tmp_path: Path) -> None:
    backend = make(mha_pool())
    backend.batch_set_v1(HASHES, indices_of(*range(12)))

    with kvstrata.open(tmp_path / "cache", memory="8MiB", disk="64MiB") as cache:
        ns = cache.namespace(backend._kv.blocks.name, policy="auto", immutable=True)
        assert len(list(ns.keys())) == 12
