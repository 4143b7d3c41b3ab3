"""The two sides of KVStrataConnector, in vLLM's scheduler and in its worker, with vLLM's own requests but no engine."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
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

BLOCK = 16
NAMESPACE = "vllm-test"
PATIENCE_S = 30.0
CONFIG = SimpleNamespace(cache_config=SimpleNamespace(block_size=BLOCK), lora_config=None, kv_events_config=None)
GROUPS = [Group(("layer",))]


@pytest.fixture
def cache() -> Iterator[kvstrata.Cache]:
    with kvstrata.open(memory="8MiB") as cache:
        yield cache


# ---- In the scheduler


@pytest.fixture
def scheduler(cache: kvstrata.Cache) -> Scheduler:
    made = Scheduler(
        cache, CONFIG, GROUPS, layerwise=False, reads=True, writes=True, prefill_tokens_per_s=None, namespace_options={}
    )
    made.meet([Rank([Shard(0, NAMESPACE, 4096, None)])])
    return made


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
    worker.start_loads(Work([Load("aborted", 0, [b"a"], [1]), Load("other", 0, [b"b"], [2])]))

    ended = worker.finished({"aborted"}, idle=False)
    busy.set()

    assert ended == ({"aborted"}, set())
    assert worker.take_failed() == {1}
    assert "other" in worker._loading
