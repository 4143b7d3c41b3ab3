"""Warm-up: what is wanted comes into memory before it is asked for, also in a process that was just started."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.processes import Process
from typer.testing import CliRunner

import kvstrata
from kvstrata import KVLayout
from kvstrata.cli import app
from kvstrata.errors import ConfigError, InvalidValue
from kvstrata.movement.warm import Warmed

OPTIONS = {"memory": "8MiB", "disk": "64MiB"}


def fill(cache: kvstrata.Namespace, count: int, size: int = 1000) -> list[str]:
    keys = [f"key {i}" for i in range(count)]
    cache.put_many({key: key.encode().ljust(size, b".") for key in keys})
    return keys


def in_memory(cache: kvstrata.Namespace, keys: list[str]) -> list[bool]:
    return [pin is not None for pin in cache._space.pin_many(keys, uses=False)[0]]


def test_keys_come_from_the_disk_into_memory(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        keys = fill(cache, 300)
        cache.flush()
        cache.demote()
        cache.get(keys[0])
        told: list[Warmed] = []

        done = cache.warm([*keys, "absent"], progress=told.append)

        assert (done.wanted, done.present, done.loaded, done.absent, done.complete) == (301, 1, 299, 1, True)
        assert done.nbytes == 299 * 1000
        assert told[-1] == done
        assert [batch.loaded for batch in told] == sorted(batch.loaded for batch in told)
        assert all(in_memory(cache, keys))
        assert cache.stats()["memory"]["pins"] == 0


def test_a_time_limit_ends_it_after_the_batch_that_is_under_way(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        keys = fill(cache, 1000)
        cache.flush()
        cache.demote()

        done = cache.warm(keys, time_limit=1e-9)

        assert not done.complete
        assert 0 < done.loaded < 1000
        assert in_memory(cache, keys[: done.loaded]) == [True] * done.loaded


def test_it_does_not_push_out_what_it_has_just_brought(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, memory="1MiB", disk="64MiB") as cache:
        keys = fill(cache, 40, 100_000)
        cache.flush()
        cache.demote()

        done = cache.warm(keys)

        assert not done.complete
        assert all(in_memory(cache, keys[:8]))


def test_the_hottest_of_the_last_run_come_back_in_a_new_process(shm: Path, tmp_path: Path) -> None:
    with Process() as other:
        other.run("cache = kvstrata.open(path, **options)", path=tmp_path, options=OPTIONS)
        other.run("ns = cache.namespace('of mine', version=3)")
        other.run("ns.put_many({f'key {i}': bytes(1000) for i in range(500)}); cache.put('one', b'1'); cache.flush()")
        other.run("[ns.get(f'key {i}') for i in range(100)]; cache.close()")
        assert other.exit() == 0

    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("of mine", version=3)
        assert not any(in_memory(ns, [f"key {i}" for i in range(500)]))

        done = cache.warm(hottest=100)

        assert (done.wanted, done.loaded, done.absent) == (100, 100, 0)
        assert all(in_memory(ns, [f"key {i}" for i in range(100)]))
        assert not any(in_memory(ns, [f"key {i}" for i in range(100, 500)]))


def test_the_hottest_are_saved_while_records_come_without_end_and_outlive_a_kill(shm: Path, tmp_path: Path) -> None:
    with Process() as child:
        child.run(
            "import kvstrata, threading; from kvstrata.movement import write_behind\n"
            "write_behind._HOUSEKEEPING_S = 0.0; write_behind._IDLE_S = 3600.0  # so it is never idle\n"
            "cache = kvstrata.open(path, memory='8MiB', disk='64MiB')\n"
            "def put():\n    for i in range(10**9): cache.put(f'{i % 1000}', b'x' * 1000)\n"
            "threading.Thread(target=put, daemon=True).start()",
            path=str(tmp_path),
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not (tmp_path / "hottest").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.demote()
        assert cache.warm(hottest=10).wanted == 10


def test_what_was_hot_in_an_older_version_is_not_warmed(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        fill(cache.namespace("n", version=1), 10)
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.namespace("n", version=2)
        assert cache.warm(hottest=10).wanted == 0


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x92\x01\x90" * 100])
def test_a_damaged_list_of_the_hottest_is_none(shm: Path, tmp_path: Path, damage: bytes) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        fill(cache, 10)
    (tmp_path / "hottest").write_bytes(damage)
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        assert cache.warm(hottest=10) == Warmed(0, 0, 0, 0, 0, 0.0, True)


def test_a_cache_without_a_disk_has_nothing_to_warm_from(shm: Path) -> None:
    with kvstrata.open(memory="2MiB") as cache:
        fill(cache, 10)
        assert cache.warm(["key 1", "absent"])[:4] == (2, 1, 0, 1)
        assert cache.warm(hottest=10).wanted == 0


def test_what_it_can_not_do_is_told(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        with pytest.raises(ConfigError, match="keys, or hottest=N"):
            cache.warm()
        with pytest.raises(ConfigError, match="hottest must be an int"):
            cache.warm(hottest=0)
        with pytest.raises(InvalidValue, match="time_limit"):
            cache.warm(["a"], time_limit=0)
        with pytest.raises(ConfigError, match="no namespace 'unheard of'"):
            cache.warm_namespaces({"unheard of": ["a"]})


def test_the_command_warms_what_another_process_has_open(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path / "cache", **OPTIONS) as cache:
        keys = fill(cache.namespace("n"), 20)
        cache.flush()
        cache.demote()
        (tmp_path / "keys").write_text("\n".join([*keys[:15], "absent"]))
        command = ["warm", str(tmp_path / "cache"), "--memory", "8MiB", "--disk", "64MiB"]

        result = CliRunner().invoke(app, [*command, "--keys", str(tmp_path / "keys"), "--namespace", "n"])

        assert result.exit_code == 0, result.output
        assert "15 of 16 records loaded (15,000 bytes" in result.stdout
        assert in_memory(cache.namespace("n"), keys) == [True] * 15 + [False] * 5
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "give one of --hottest, --keys and --prompts" in result.stderr


def test_the_command_warms_the_prefixes_of_prompts(shm: Path, tmp_path: Path) -> None:
    layout = KVLayout(model="m", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=4)
    (tmp_path / "layout.json").write_bytes(msgspec.json.encode(layout))
    (tmp_path / "prompts").write_text(f"{list(range(18))}\n\n[90, 91, 92, 93]\n")
    (tmp_path / "kvstrata.toml").write_text('memory = "8MiB"\ndisk = "64MiB"\n')
    command = ["warm", str(tmp_path / "cache"), "--config", str(tmp_path / "kvstrata.toml")]
    prompts = ["--prompts", str(tmp_path / "prompts"), "--layout", str(tmp_path / "layout.json")]
    with kvstrata.open(tmp_path / "cache", **OPTIONS) as cache:
        prefixes = kvstrata.PrefixCache.open(cache, layout)
        prefixes.store(list(range(20)), np.zeros((1, 2, 1, 20, 4), np.float32))
        cache.flush()
        cache.demote()

        result = CliRunner().invoke(app, [*command, *prompts])

        assert result.exit_code == 0, result.output
        assert "4 of 4 records loaded" in result.stdout
        pins = prefixes.ns._space.pin_many(prefixes.keys(range(20)), uses=False)[0]
        assert [pin is not None for pin in pins] == [True] * 4 + [False]
        del pins
        (tmp_path / "prompts").write_text('["words"]')
        for wrong, says in ((prompts, "prompts: "), (prompts[:2], "belong together")):
            result = CliRunner().invoke(app, [*command, *wrong])
            assert result.exit_code == 2
            assert says in result.stderr.replace("\n", "")
