"""Values that are encoded below memory, each tier as its namespace wants it, and encrypted where there are keys."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import Process

import kvstrata
from kvstrata.codecs import encryption
from kvstrata.codecs.base import TensorInfo
from kvstrata.codecs.encryption import Keyring
from kvstrata.codecs.zstd import Zstd, train_dictionary
from kvstrata.errors import ConfigError, UnknownOption, WrongKey

OPTIONS: dict[str, Any] = {"memory": "16MiB", "disk": "64MiB"}
TEXT = b"the same words again and again, " * 400
BLOCK = TensorInfo("float32", (4, 2, 3, 32, 64), ("layers", "kv", "heads", "tokens", "channels"))


def bytes_on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("seg-*.kvs"))


def contents(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in directory.glob("seg-*.kvs"))


def leave_memory(cache: kvstrata.Cache) -> None:
    cache.flush()
    cache.demote()
    assert cache.stats()["memory"]["memory_record_bytes"] == 0


@pytest.mark.parametrize("codec", ["zstd", "lz4", "planes"])
def test_a_lossless_codec_on_disk_changes_nothing_but_the_bytes_there(shm: Path, tmp_path: Path, codec: str) -> None:
    values = {f"key {i}": TEXT + bytes([i]) for i in range(100)} | {"large": TEXT * 100, "small": b"x", "empty": b""}
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", codec=codec)
        ns.put_many(values)
        leave_memory(cache)
        assert ns.get_many(list(values)) == list(values.values())
        assert ns.get_many(list(values)) == list(values.values())  # from memory
        leave_memory(cache)
        with ns.pin("large") as view:
            assert bytes(view) == values["large"]
        assert TEXT not in contents(tmp_path)
    with kvstrata.open(tmp_path, **OPTIONS) as cache:  # without the codec: records say themselves what they are
        assert cache.namespace("n").get_many(list(values)) == list(values.values())
        assert cache.stats()["memory"]["corrupt"] == 0


def test_what_compresses_takes_less_of_the_disk(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.namespace("n", codec="zstd").put_many({f"key {i}": TEXT * 10 for i in range(50)})
    assert bytes_on_disk(tmp_path) < 0.1 * 50 * 10 * len(TEXT)


def test_memory_is_accounted_by_what_values_take_there(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.namespace("n", codec="zstd").put("key", bytes(1_000_000))
        before = cache.stats()["memory"]["memory_record_bytes"]
        leave_memory(cache)
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", codec="zstd")
        assert ns.get("key") == bytes(1_000_000)
        stats = cache.stats()["memory"]
        assert stats["memory_record_bytes"] == stats["memory_used_bytes"] == before
        ns.delete("key")
        assert cache.stats()["memory"]["memory_used_bytes"] == 0


def test_a_lossy_codec_on_disk_is_seen_only_by_what_comes_from_there(shm: Path, tmp_path: Path) -> None:
    exact = np.random.default_rng(0).normal(size=BLOCK.shape).astype("f4")
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", codec={"disk": "int8"}, tensor=BLOCK)
        ns.put("key", exact)
        ns.put("no tensor", TEXT)
        assert ns.get("key") == exact.tobytes()
        leave_memory(cache)
        found = np.frombuffer(ns.get("key") or b"", "f4").reshape(BLOCK.shape)
        assert not np.array_equal(found, exact)
        assert np.abs(found - exact).max() < 0.05
        assert ns.get("no tensor") == TEXT


def test_values_that_a_dictionary_compressed_come_back_with_it(shm: Path, tmp_path: Path) -> None:
    samples = [b"user %d likes item %d and item %d" % (i, i * 7, i * 11) for i in range(1000)]
    codec = Zstd(dictionary=train_dictionary(samples, 4096))
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", codec=codec)
        ns.put_many({f"key {i}": sample * 3 for i, sample in enumerate(samples)})
        leave_memory(cache)
        assert ns.get_many([f"key {i}" for i in range(1000)]) == [sample * 3 for sample in samples]


def test_damage_to_an_encoded_record_is_a_miss_that_is_counted(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", codec="zstd")
        ns.put("the key", TEXT)
        leave_memory(cache)
        (file,) = tmp_path.glob("seg-*.kvs")
        data = bytearray(file.read_bytes())
        data[data.rindex(b"the key") + 40] ^= 1
        file.write_bytes(data)
        assert ns.get("the key") is None
        assert cache.stats()["memory"]["corrupt"] == 1
        assert cache.stats()["memory"]["reservations"] == 0


def test_an_encoded_record_that_is_wanted_twice_is_read_once(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", codec="zstd")
        ns.put("key", TEXT)
        leave_memory(cache)
        assert ns.get_many(["key", "key"]) == [TEXT, TEXT]
        assert cache.stats()["disk"]["loaded_records"] == 1


def test_a_tagged_and_a_short_lived_value_keep_both_through_a_codec(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        ns = cache.namespace("n", codec="zstd")
        ns.put("tagged", TEXT, tags=["a"])
        ns.put("of an hour", TEXT, ttl=3600)
        leave_memory(cache)
        assert ns.get_many(["tagged", "of an hour"]) == [TEXT, TEXT]
        leave_memory(cache)
        ns.delete_tag("a")
        assert ns.get_many(["tagged", "of an hour"]) == [None, TEXT]


# ---- Encryption


def keys(*numbers: int) -> Keyring:
    return Keyring([bytes([number]) * 32 for number in numbers])


def test_nothing_of_a_value_is_on_disk_in_the_clear(shm: Path, tmp_path: Path) -> None:
    values = {f"key {i}": TEXT + bytes([i]) for i in range(10)} | {"large": secrets.token_bytes(300_000)}
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1)) as cache:
        compressed = cache.namespace("compressed", codec="zstd")
        for ns in (cache, compressed):
            ns.put_many(values)
        leave_memory(cache)
        for ns in (cache, compressed):
            assert ns.get_many(list(values)) == list(values.values())
        stored = contents(tmp_path)
        assert TEXT[:40] not in stored
        assert values["large"][1000:1040] not in stored


def test_a_new_key_encrypts_what_is_new_and_the_old_one_opens_what_is_old(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1)) as cache:
        cache.put("old", TEXT)
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1, 2)) as cache:
        cache.put("new", TEXT)
        leave_memory(cache)
        assert cache.get_many(["old", "new"]) == [TEXT, TEXT]
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(2)) as cache:
        assert cache.get("new") == TEXT
        assert cache.get("old") is None  # counted, and not forgotten
        assert cache.stats()["disk"]["sealed_records"] >= 1
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1, 2)) as cache:
        assert cache.get_many(["old", "new"]) == [TEXT, TEXT]


def test_where_a_key_implies_its_value_what_can_not_be_opened_any_more_is_stored_anew(
    shm: Path, tmp_path: Path
) -> None:
    for known in (keys(1), keys(1, 2)):
        with kvstrata.open(tmp_path, **OPTIONS, encryption=known) as cache:
            cache.namespace("blocks", immutable=True).put("key", TEXT)
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(2)) as cache:
        blocks = cache.namespace("blocks", immutable=True)
        assert "key" in blocks
        assert blocks.get("key") is None
        assert "key" not in blocks
        blocks.put("key", TEXT)
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(2)) as cache:
        assert cache.namespace("blocks", immutable=True).get("key") == TEXT
        assert cache.stats()["disk"]["sealed_records"] == 0


def test_opening_without_the_keys_or_with_others_says_so(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1)) as cache:
        cache.put("key", TEXT)
    with pytest.raises(WrongKey, match="open the cache with the keys"):
        kvstrata.open(tmp_path, **OPTIONS)
    with pytest.raises(WrongKey, match="none of them is given"):
        kvstrata.open(tmp_path, **OPTIONS, encryption=keys(2))
    with pytest.raises(ConfigError, match="can't be read"):
        kvstrata.open(tmp_path, **OPTIONS, encryption=tmp_path / "absent")
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1)) as cache:
        assert cache.get("key") == TEXT


def test_keys_come_from_a_file_that_the_environment_names(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(secrets.token_hex(32))
    monkeypatch.setenv("KVSTRATA_ENCRYPTION", str(file))
    with kvstrata.open(tmp_path / "cache", **OPTIONS) as cache:
        cache.put("key", TEXT)
        leave_memory(cache)
        assert cache.get("key") == TEXT
        assert TEXT[:40] not in contents(tmp_path / "cache")


def test_keys_come_from_a_function_that_is_asked_again_for_a_key_that_is_not_known(shm: Path, tmp_path: Path) -> None:
    keys = [secrets.token_bytes(32)]
    with kvstrata.open(tmp_path, **OPTIONS, encryption=lambda: keys) as cache:
        cache.put("old", TEXT)
        leave_memory(cache)
        keys.append(secrets.token_bytes(32))
        with Process() as process:
            process.run(
                "with kvstrata.open(root, **options, encryption=lambda: keys) as cache:\n    cache.put('new', text)",
                root=tmp_path, options=OPTIONS, keys=keys, text=TEXT,
            )  # fmt: skip
        leave_memory(cache)
        assert cache.get_many(["old", "new"]) == [TEXT, TEXT]


def test_values_under_a_new_key_are_misses_while_the_source_of_keys_fails(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_ASK_AGAIN_S", 3600.0)
    keys = [secrets.token_bytes(32)]
    calls = []

    def source() -> list[bytes]:
        calls.append(1)
        if len(calls) > 1:
            raise ConnectionError("nobody there")
        return keys

    with kvstrata.open(tmp_path, **OPTIONS, encryption=source) as cache:
        cache.put("old", TEXT)
        with Process() as process:
            process.run(
                "with kvstrata.open(root, **options, encryption=lambda: keys) as cache:\n    cache.put('new', text)",
                root=tmp_path, options=OPTIONS, keys=[*keys, secrets.token_bytes(32)], text=TEXT,
            )  # fmt: skip
        leave_memory(cache)
        assert cache.get("new") is None
        assert cache.stats()["disk"]["sealed_records"] > 0
        assert len(calls) == 2
        assert cache.get_many(["old", "new"]) == [TEXT, None]


def test_a_value_that_can_not_be_encrypted_stays_in_memory_and_the_others_reach_the_disk(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_MOST", 1 << 20)
    values = {"before": TEXT, "large": bytes(2 << 20), "after": TEXT}
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1)) as cache:
        cache.put_many(values)
        cache.flush()
        assert cache.get_many(list(values)) == list(values.values())
        assert cache.stats()["disk"]["error encoding"] == 1
    with kvstrata.open(tmp_path, **OPTIONS, encryption=keys(1)) as cache:
        assert cache.get_many(list(values)) == [TEXT, None, TEXT]


# ---- Wishes


def test_without_a_codec_or_keys_values_are_stored_as_they_are(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        cache.put("key", TEXT)
        cache.flush()
        assert TEXT in contents(tmp_path)


def test_wishes_that_can_not_be_met_are_told(shm: Path, tmp_path: Path) -> None:
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        with pytest.raises(UnknownOption, match="codec"):
            cache.namespace("n", codec="gzip")
        with pytest.raises(UnknownOption, match="disk"):
            cache.namespace("n", codec={"dsik": "zstd"})
        with pytest.raises(ConfigError, match="in memory are as they were put"):
            cache.namespace("n", codec={"memory": "zstd"})
        cache.namespace("n", codec={"memory": "raw", "disk": "zstd"})
        with pytest.raises(ConfigError, match="is lossy"):
            cache.namespace("n", codec="int8")


# ---- Blocks of prefixes


@pytest.mark.parametrize("codec", ["planes", "int8", "int4:hadamard=kv"])
def test_blocks_of_a_prefix_are_whole_after_any_codec(shm: Path, tmp_path: Path, codec: str) -> None:
    layout = kvstrata.KVLayout(model="m", dtype="float32", layers=4, kv_heads=2, head_dim=64, block_tokens=32)
    tokens = list(range(160))
    kv = np.random.default_rng(0).normal(size=(4, 2, 2, 160, 64)).astype("f4")
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        prefixes = kvstrata.PrefixCache.open(cache, layout, codec=codec)
        assert prefixes.store(tokens, kv) == 5
        assert np.array_equal(prefixes.match(tokens).load().kv, kv)
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        prefixes = kvstrata.PrefixCache.open(cache, layout)  # the records say what they are
        loaded = prefixes.match(tokens).load()
        assert loaded.tokens == 160
        assert np.sqrt(np.mean((loaded.kv - kv) ** 2)) < {"planes": 1e-9, "int8": 0.02}.get(codec, 0.2)
        layers = list(prefixes.match(tokens).load_layers())
        assert [number for number, _ in layers] == [0, 1, 2, 3]
        assert all(np.array_equal(words, loaded.kv[number]) for number, words in layers)
        leave_memory(cache)
        assert all(words.shape[2] == 160 for _, words in prefixes.match(tokens).load_layers())
        assert cache.stats()["memory"]["corrupt"] == 0


def test_the_prefixes_of_prompts_are_warmed(shm: Path, tmp_path: Path) -> None:
    layout = kvstrata.KVLayout(model="m", dtype="float32", layers=4, kv_heads=2, head_dim=64, block_tokens=32)
    with kvstrata.open(tmp_path, **OPTIONS) as cache:
        prefixes = kvstrata.PrefixCache.open(cache, layout)
        kv = np.zeros((4, 2, 2, 96, 64), "f4")
        prefixes.store(list(range(96)), kv)
        leave_memory(cache)
        done = prefixes.warm([range(96), [*range(64), *range(1000, 1032)], range(500, 600)])
        assert (done.wanted, done.loaded, done.complete) == (3, 3, True)
