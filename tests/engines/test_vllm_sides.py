"""The two sides of KVStrataConnector, in vLLM's scheduler and in its worker, with vLLM's own requests but no engine."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvstrata
from engines.conftest import need
from kvstrata.integrations._blocks import EngineBlocks
from kvstrata.integrations._vllm.groups import Group

need("vllm")
with warnings.catch_warnings():  # vLLM's, at its import
    warnings.simplefilter("ignore")
    import torch
    from vllm import SamplingParams
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.sched.scheduler import Scheduler as Engine
    from vllm.v1.request import Request, StreamingUpdate

    from kvstrata.integrations._vllm.memory import BlockMemory
    from kvstrata.integrations._vllm.messages import Load, Rank, Shard, Work
    from kvstrata.integrations._vllm.scheduler import Scheduler
    from kvstrata.integrations._vllm.worker import Part, Worker

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK, BLOCK_BYTES = 16, 4096
NAMESPACE = "vllm-test"
PATIENCE_S = 30.0
CONFIG = SimpleNamespace(cache_config=SimpleNamespace(block_size=BLOCK), lora_config=None, kv_events_config=None)
GROUPS = [Group(("layer",))]


@pytest.fixture
def cache() -> Iterator[kvstrata.Cache]:
    with kvstrata.open(memory="8MiB") as cache:
        yield cache


# ---- In the scheduler


def scheduler_of(cache: kvstrata.Cache) -> Scheduler:
    made = Scheduler(
        cache, CONFIG, GROUPS, layerwise=False, with_step=True, reads=True, writes=True, prefill_tokens_per_s=None,
        namespace_options={},
    )  # fmt: skip
    made.meet([Rank([Shard(0, NAMESPACE, BLOCK_BYTES, None)])])
    return made


@pytest.fixture
def scheduler(cache: kvstrata.Cache) -> Scheduler:
    return scheduler_of(cache)


def request_of(scheduler: Scheduler, name: str, tokens: int) -> Request:
    """A request of which all whole blocks have been stored."""
    request = Request(name, list(range(tokens)), SamplingParams(max_tokens=1), None)
    keys = scheduler.arrived(request).keys.upto(request.all_token_ids, tokens // BLOCK)
    EngineBlocks.named(scheduler._cache, NAMESPACE).store(keys, BLOCK_BYTES, lambda _position, _memory: None)
    return request


def compute(scheduler: Scheduler, *requests: Request) -> Work:
    """A step that computes one token of each."""
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    return scheduler.work(
        SimpleNamespace(
            total_num_scheduled_tokens=len(requests), num_scheduled_tokens={each.request_id: 1 for each in requests},
            kv_connector_block_state=None, scheduled_new_reqs=[], scheduled_cached_reqs=cached,
        )
    )  # fmt: skip


def image(name: str, offset: int = 0) -> Any:
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=offset, length=BLOCK))


def go_on(request: Request, tokens: list[int], *images: Any) -> None:
    """Let more come to a session, as vLLM does; what it was given before has been computed."""
    request.num_computed_tokens = request.num_tokens
    engine = SimpleNamespace(hash_block_size=BLOCK, log_stats=False, num_waiting_for_streaming_input=0)
    update = StreamingUpdate(list(images), tokens, 1, 0.0, SamplingParams(max_tokens=1))
    Engine._update_request_as_session(engine, request, update)


def test_an_image_that_joins_a_session_later_is_in_the_keys_as_one_that_was_there_at_once(scheduler: Scheduler) -> None:
    tokens = list(range(4 * BLOCK))
    keys = {}
    for name in ("cat", "dog"):
        request = Request(name, tokens[: 2 * BLOCK], SamplingParams(max_tokens=1), None, resumable=True)
        scheduler.arrived(request)
        scheduler.match(request, 0)
        go_on(request, tokens[2 * BLOCK :], image(name))
        keys[name] = scheduler._of(request).keys.upto(request.all_token_ids, 4)
    whole = Request("whole", tokens, SamplingParams(max_tokens=1), None, mm_features=[image("cat", 2 * BLOCK)])

    assert keys["cat"][:2] == keys["dog"][:2]
    assert not {*keys["cat"][2:]} & {*keys["dog"][2:]}
    assert scheduler.arrived(whole).keys.upto(tokens, 4) == keys["cat"]


def test_what_is_in_memory_is_loaded_with_the_step_where_nobody_else_is_computed(scheduler: Scheduler) -> None:
    request, other = request_of(scheduler, "request", 2 * BLOCK + 1), request_of(scheduler, "other", 1)

    alone = scheduler.match(request, 0)
    compute(scheduler, other)
    beside = scheduler.match(request, 0)
    scheduler.ended(other)
    alone_again = scheduler.match(request, 0)

    assert (alone, beside, alone_again) == ((2 * BLOCK, False), (2 * BLOCK, True), (2 * BLOCK, False))


def test_a_load_goes_ahead_of_the_step_where_nothing_is_left_to_compute(scheduler: Scheduler) -> None:
    assert scheduler.match(request_of(scheduler, "request", 2 * BLOCK), 0) == (2 * BLOCK, True)


def test_a_step_brings_no_more_than_it_can_load_in_a_moment(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.integrations._vllm.scheduler._WITH_STEP_BYTES", 5 * BLOCK_BYTES)
    blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3],))
    first, second = (request_of(scheduler, name, 3 * BLOCK + 1) for name in ("first", "second"))

    found = [scheduler.match(first, 0)]
    scheduler.allocated(first, blocks, 3 * BLOCK)
    found.append(scheduler.match(second, 0))
    scheduler.allocated(second, blocks, 3 * BLOCK)

    assert found == [(3 * BLOCK, False), (3 * BLOCK, True)]
    assert [load.with_step for load in compute(scheduler).loads] == [True, False]


def test_what_has_to_be_read_from_disk_is_loaded_ahead_of_the_step(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, memory="8MiB", disk="64MiB") as cache:
        scheduler = scheduler_of(cache)
        request = request_of(scheduler, "request", 2 * BLOCK + 1)
        cache.flush()
        cache.demote()

        assert scheduler.match(request, 0) == (2 * BLOCK, True)


# ---- In the worker


@pytest.fixture
def worker(cache: kvstrata.Cache) -> Iterator[Worker]:
    made = Worker(cache, CONFIG, None, GROUPS, weights="w", timeout=PATIENCE_S, namespace_options={})
    memory = BlockMemory({"layer": torch.zeros(4, 2, BLOCK, 8)}, 4)
    made.parts[0] = Part(memory, EngineBlocks.named(cache, NAMESPACE))
    yield made
    made.close()


def test_the_load_of_a_request_that_is_done_is_given_up_and_its_blocks_are_free(worker: Worker) -> None:
    busy = threading.Event()
    for _ in range(2):  # the worker's threads that load
        worker._loader.submit(busy.wait, PATIENCE_S)
    worker.start_loads(Work([Load("aborted", 0, [b"a"], [1], False), Load("other", 0, [b"b"], [2], False)]))

    ended = worker.finished({"aborted"}, idle=False)
    busy.set()

    assert ended == ({"aborted"}, set())
    assert worker.take_failed() == {1}
    assert "other" in worker._loading


def test_a_load_that_comes_with_its_step_has_ended_before_that_computes(worker: Worker) -> None:
    memory, blocks = worker.parts[0]

    def ones(_position: int, view: memoryview) -> None:
        view[:] = b"\x01" * len(view)

    blocks.store([b"there"], memory.block_bytes, ones)

    worker.start_loads(Work([Load("request", 0, [b"there", b"absent"], [1, 2], True)]))

    there = bytearray(memory.block_bytes)
    memory.read(1, memoryview(there))
    assert there == b"\x01" * memory.block_bytes
    assert worker.finished(set(), idle=False) == (set(), set())
    assert worker.take_failed() == {2}
