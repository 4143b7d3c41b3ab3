"""KVStrataTier under vLLM's OffloadingConnector, which moves blocks between the engine and the CPU's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import Process, RemoteError

from engines.conftest import Start, need
from engines.vllm_control import BLOCK, Engine

need("vllm")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def engines(starting_vllm: Start) -> tuple[Engine, Engine]:
    """Two engines with a tier in the same directory, in processes whose own hashes of Python differ."""
    pair = tuple(starting_vllm("tiers", kind="tier", unlike=unlike) for unlike in (False, True))
    for engine in pair:
        engine.process.finish()
    return pair  # type: ignore[return-value]


def test_blocks_go_through_the_tier_from_one_engine_to_another_and_back_into_the_engine(
    engines: tuple[Engine, Engine],
) -> None:
    first, second = engines
    prompts = [first.prompt(0, 400), first.prompt(500, 300)]
    cold = first.tokens(*prompts)

    warm, counted = second.counted(*prompts)

    assert warm == cold
    assert counted["loaded_blocks"] == sum(len(prompt) // BLOCK for prompt in prompts)
    assert counted["errors"] == 0


def test_a_damaged_chunk_in_the_middle_of_a_prefix_is_computed_again(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    prompt = first.prompt(800, 400)
    cold = first.tokens(prompt)
    first.to_disk()
    first.damage(first.keys(prompt)[5])

    warm, counted = second.counted(prompt)

    assert warm == cold
    assert counted["missed_blocks"] >= 1
    assert counted["errors"] == 0


def test_a_salt_keeps_tenants_apart(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    prompt = first.prompt(1200, 200)
    expected = first.tokens(prompt, salt="a")

    other, of_another = second.counted(prompt, salt="b")

    assert other == expected
    assert of_another["loaded_blocks"] == 0


def test_counters_reach_prometheus(engines: tuple[Engine, Engine]) -> None:
    _, second = engines

    metrics = second.metrics()

    assert metrics["vllm:kvstrata_loaded_blocks"] > 0
    assert metrics["vllm:kvstrata_found_blocks"] > 0


def test_hashes_that_begin_with_a_random_number_switch_it_off_and_say_what_to_add(
    model: Path, tmp_path: Path, with_vllm: Process
) -> None:
    with with_vllm.fork(KVSTRATA_SHM_DIR=str(tmp_path)) as process:
        process.run("from engines import vllm_engine")
        tier = "vllm_engine.Tier(model, path, hash_name=name)"
        given = {"model": str(model), "path": str(tmp_path / "cache")}

        off = process.eval(f"{tier}.begin()", name="xxhash", **given)
        on = process.eval(f"{tier}.begin()", name="sha256", **given)

    assert "export PYTHONHASHSEED=0" in off
    assert on == ""


def test_an_older_vllm_is_refused_without_a_seed(model: Path, tmp_path: Path, with_vllm: Process) -> None:
    with with_vllm.fork(KVSTRATA_SHM_DIR=str(tmp_path)) as process:
        process.run("from engines import vllm_engine\nvllm_engine.forget_default_seed()")
        with pytest.raises(RemoteError, match="export PYTHONHASHSEED=0"):
            process.run("vllm_engine.Tier(model, path)", model=str(model), path=str(tmp_path / "cache"))
        process.run("os.environ['PYTHONHASHSEED'] = '0'\nvllm_engine.Tier(model, path).begin()",
                    model=str(model), path=str(tmp_path / "cache"))  # fmt: skip
