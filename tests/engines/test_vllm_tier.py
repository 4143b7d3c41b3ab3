"""KVStrataTier under vLLM's OffloadingConnector, which moves blocks between the engine and the CPU's memory."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
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


# ---- A tier under vLLM's manager, without an engine


@pytest.fixture
def with_tiers(with_vllm: Process, tmp_path: Path) -> Iterator[Process]:
    with with_vllm.fork(KVSTRATA_SHM_DIR=str(tmp_path)) as process:
        process.run("from engines import vllm_tiers\nfrom engines.vllm_tiers import Tier, settings")
        yield process


def test_hashes_that_begin_with_a_random_number_switch_it_off_and_say_what_to_add(
    model: Path, tmp_path: Path, with_tiers: Process
) -> None:
    tier = "Tier(model, path, hash_name=name, weights='name')"
    given = {"model": str(model), "path": str(tmp_path / "cache")}

    off = with_tiers.eval(f"{tier}.begin()", name="xxhash", **given)
    on = with_tiers.eval(f"{tier}.begin()", name="sha256", **given)

    assert "export PYTHONHASHSEED=0" in off
    assert on == ""


def test_an_older_vllm_is_refused_without_a_seed(model: Path, tmp_path: Path, with_tiers: Process) -> None:
    tier, given = "Tier(model, path, weights='name')", {"model": str(model), "path": str(tmp_path / "cache")}
    with_tiers.run("vllm_tiers.forget_default_seed()")
    with pytest.raises(RemoteError, match="export PYTHONHASHSEED=0"):
        with_tiers.run(tier, **given)
    with_tiers.run(f"os.environ['PYTHONHASHSEED'] = '0'\n{tier}.begin()", **given)


def test_what_can_not_be_read_is_a_miss_for_its_request_and_is_tried_for_the_next(
    model: Path, tmp_path: Path, with_tiers: Process
) -> None:
    with_tiers.run(
        "tier = Tier(model, path, weights='name')\ntier.store()\ntier.break_reads(True)",
        model=str(model), path=str(tmp_path / "cache"),
    )  # fmt: skip

    assert with_tiers.eval("tier.look_up('one'), tier.look_up('two')") == (["MISS"] * 4, ["MISS"] * 4)
    with_tiers.run("tier.break_reads(False)")
    assert with_tiers.eval("tier.look_up('three')") == ["HIT"] * 4
    with_tiers.run("tier.close()")


def test_what_was_encrypted_under_a_key_that_is_gone_is_a_miss(
    model: Path, tmp_path: Path, with_tiers: Process
) -> None:
    (keys := tmp_path / "keys").touch(0o600)
    old, new = "11" * 32, "22" * 32
    given = {"model": str(model), "path": str(tmp_path / "cache"), "keys": str(keys)}
    tier = "tier = Tier(model, path, weights='name', encryption=keys)"

    keys.write_text(old)
    with_tiers.run(f"{tier}\ntier.store()\ntier.close()", **given)
    keys.write_text(f"{old}\n{new}")
    with_tiers.run(f"{tier}\ntier.cache.put('key', b'sealed under the new one')\ntier.close()", **given)
    keys.write_text(new)

    with_tiers.run(tier, **given)
    assert with_tiers.eval("tier.look_up('one')") == ["MISS"] * 4
    with_tiers.run("tier.close()")


def test_a_remote_from_the_environment_is_asked_in_the_background(
    model: Path, tmp_path: Path, with_vllm: Process
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with with_vllm.fork(KVSTRATA_SHM_DIR=str(tmp_path), KVSTRATA_REMOTE=url) as process:
            process.run("from engines.vllm_tiers import Tier\ntier = Tier(model, path, weights='name')",
                        model=str(model), path=str(tmp_path / "cache"))  # fmt: skip

            assert process.eval("tier.answer_at_once()") == "RETRY"
            process.run("tier.close()")


YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}


def test_settings_that_change_kv_keep_it_apart(model: Path, tmp_path: Path, with_tiers: Process) -> None:
    given = {"model": str(model), "path": str(tmp_path / "cache")}

    def name(**options: object) -> str:
        tier = "Tier(model, path, config=settings(model, **options))"
        return str(with_tiers.eval(f"{tier}.name()", options=options, **given))

    plain = name()

    assert name() == plain
    assert len({plain, name(hf_overrides=YARN), name(max_model_len=1024), name(max_model_len=-1)}) == 4


def test_vllms_own_connector_needs_a_name_and_the_configuration_counts_beside_it(
    model: Path, tmp_path: Path, with_tiers: Process
) -> None:
    path = str(tmp_path / "cache")
    with pytest.raises(RemoteError, match="KVStrataOffloadingConnector"):
        with_tiers.run("Tier(model, path)", model=str(model), path=path)
    names = []
    for place in ("plain", "same", "yarn"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps(YARN if place == "yarn" else {}))
        tier = "Tier(model, path, weights='name')"
        names.append(with_tiers.eval(f"{tier}.name()", model=str(tmp_path / place), path=path))

    assert names[0] == names[1] != names[2]


def test_a_length_that_was_fitted_to_the_memory_is_not_taken_for_a_given_one(model: Path, with_tiers: Process) -> None:
    facts = "model_facts(settings(model, max_model_len=given), 'weights')"
    with_tiers.run(
        "from kvstrata.integrations._vllm.model import model_facts\nfitted = []\n"
        "for length in (1024, 2048):\n"
        "    config = settings(model, max_model_len=-1)\n"
        "    config.model_config.max_model_len = length  # as vLLM does once the model is made\n"
        "    fitted.append(model_facts(config, 'weights'))",
        model=str(model),
    )  # fmt: skip

    assert with_tiers.eval("fitted[0] == fitted[1]")
    assert with_tiers.eval(f"{facts} not in fitted", model=str(model), given=1024)
