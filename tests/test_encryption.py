"""Sealed payloads: they open with their key and for their record only, and nothing tells what the keys are."""

from __future__ import annotations

import builtins
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.codecs import codec, decoder, encryption
from kvstrata.codecs.encryption import KEY_BYTES, SEALED, Keyring, Sealer, key_id
from kvstrata.errors import ConfigError, CorruptRecord, InvalidValue, MissingExtra, WrongKey

OLD, NEW = bytes(range(32)), bytes(range(100, 132))
OVERHEAD = 24 + 16


def key_file(path: Path, *keys: bytes, mode: int = 0o600) -> Path:
    file = path / "keys"
    file.write_text("# keys of the cache\n\n" + "".join(f"{key.hex()}\n" for key in keys))
    file.chmod(mode)
    return file


@given(payload=st.binary(max_size=5000), identity=st.binary(max_size=100), number=st.integers(0, 127))
def test_what_was_sealed_opens_with_its_identity(payload: bytes, identity: bytes, number: int) -> None:
    sealer = Sealer(Keyring([OLD, NEW]))
    sealed = sealer.seal(number, payload, identity)
    assert sealer.open(sealed, identity) == (number, payload)
    assert len(sealed) == len(payload) + OVERHEAD
    assert len(payload) < 8 or payload not in sealed
    with pytest.raises(CorruptRecord, match="another record"):
        sealer.open(sealed, identity + b"x")


def test_a_compressed_value_comes_back_through_both() -> None:
    sealer = Sealer(Keyring([OLD]))
    made = codec("zstd")
    number, payload = sealer.open(sealer.seal(made.id, made.encode(bytes(1000)), b"identity"), b"identity")
    assert decoder(number).decode(payload) == bytes(1000)
    assert number != SEALED


def test_no_two_sealed_payloads_are_alike() -> None:
    sealer = Sealer(Keyring([OLD]))
    assert len({sealer.seal(0, b"the same", b"") for _ in range(1000)}) == 1000


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    sealer = Sealer(Keyring([OLD]))
    sealed = bytearray(sealer.seal(3, b"some payload", b"identity"))
    for at in range(len(sealed)):
        if at in (2, 3):
            continue  # written as zero, and authentic like the rest
        sealed[at] ^= 0x10
        with pytest.raises((CorruptRecord, WrongKey)):
            sealer.open(sealed, b"identity")
        sealed[at] ^= 0x10
    for at in (2, 3):
        sealed[at] ^= 0x10
        with pytest.raises(CorruptRecord):
            sealer.open(sealed, b"identity")
        sealed[at] ^= 0x10
    for end in range(len(sealed)):
        with pytest.raises(CorruptRecord):
            sealer.open(sealed[:end], b"identity")
    assert sealer.open(sealed, b"identity") == (3, b"some payload")


def test_a_key_that_is_not_known_is_named_by_its_id() -> None:
    sealed = Sealer(Keyring([OLD])).seal(0, b"payload", b"")
    with pytest.raises(WrongKey, match=key_id(OLD).hex()):
        Sealer(Keyring([NEW])).open(sealed, b"")


def test_the_newest_key_seals_and_older_ones_still_open() -> None:
    before = Sealer(Keyring([OLD])).seal(0, b"before", b"")
    after = Sealer(Keyring([OLD, NEW]))
    assert after.open(before, b"") == (0, b"before")
    sealed = after.seal(0, b"after", b"")
    assert Sealer(Keyring([NEW])).open(sealed, b"") == (0, b"after")
    with pytest.raises(WrongKey):
        Sealer(Keyring([OLD])).open(sealed, b"")


def test_a_key_that_is_added_to_the_file_is_found_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_ASK_AGAIN_S", 0.0)
    file = key_file(tmp_path, OLD)
    keys = Keyring.from_file(file)
    sealed = Sealer(Keyring([NEW])).seal(0, b"payload", b"")
    with pytest.raises(WrongKey):
        Sealer(keys).open(sealed, b"")
    key_file(tmp_path, OLD, NEW)
    assert Sealer(keys).open(sealed, b"") == (0, b"payload")
    assert keys.newest == (key_id(NEW), NEW)


def test_keys_that_can_not_be_read_again_leave_a_key_unknown(tmp_path: Path) -> None:
    file = key_file(tmp_path, OLD)
    keys = Keyring.from_file(file)
    sealed = [Sealer(Keyring([key])).seal(0, b"payload", b"") for key in (OLD, NEW)]
    file.unlink()
    with pytest.raises(WrongKey, match=r"can't be read again \(ConfigError\)") as raised:
        Sealer(keys).open(sealed[1], b"")
    assert isinstance(raised.value.__cause__, ConfigError)
    assert Sealer(keys).open(sealed[0], b"") == (0, b"payload")


def test_a_source_is_asked_once_for_a_key_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "_ASK_AGAIN_S", 3600.0)
    calls = []

    def source() -> list[bytes]:
        calls.append(1)
        if len(calls) > 1:
            raise ConnectionError("the address and its secrets")
        return [OLD]

    keys = Keyring(source)
    for _ in range(20):
        with pytest.raises(WrongKey, match=r"can't be read again \(ConnectionError\)") as raised:
            keys.find(key_id(NEW))
        assert "secrets" not in str(raised.value)
    assert len(calls) == 2
    with pytest.raises(WrongKey):
        keys.find(key_id(bytes(32)))  # another one may be there
    assert len(calls) == 3


def test_keys_can_come_from_a_function() -> None:
    given_keys = [OLD]
    keys = Keyring(lambda: given_keys)
    assert keys.newest[1] == OLD
    given_keys.append(NEW)
    assert keys.newest[1] == OLD
    keys.refresh()
    assert keys.newest[1] == NEW


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds none"), ("# nothing\n", "holds none"), ("abc\n", "line 1"), (OLD.hex() + "\n" + "zz" * 32, "line 2"),
     (OLD.hex() + "00\n", "line 1"), ("ä", "can't be read")],
)  # fmt: skip
def test_a_file_without_proper_keys_is_refused_without_telling_them(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content, "utf-8")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=message) as caught:
        Keyring.from_file(file)
    assert OLD.hex() not in str(caught.value)


def test_a_file_that_others_may_read_or_that_is_absent_is_refused(tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o620):
        with pytest.raises(ConfigError, match="chmod 600"):
            Keyring.from_file(key_file(tmp_path, OLD, mode=mode))
    with pytest.raises(ConfigError, match="can't be read"):
        Keyring.from_file(tmp_path / "absent")


@pytest.mark.parametrize("keys", [[], [b"short"], [bytes(33)], ["x" * KEY_BYTES], [OLD, bytearray(32)]])
def test_what_is_no_key_is_refused_without_telling_it(keys: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Keyring(keys)
    assert "short" not in str(caught.value)


def test_secrets_are_in_no_text_and_not_pickled() -> None:
    keys = Keyring([OLD, NEW])
    for text in (repr(keys), str(keys), repr(Sealer(keys)), f"{Sealer(keys)}"):
        assert key_id(NEW).hex() in text
        for secret in (OLD, NEW):
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text
    for thing in (keys, Sealer(keys)):
        with pytest.raises(TypeError):
            pickle.dumps(thing)


def test_the_id_of_a_key_is_eight_bytes_that_do_not_change() -> None:
    assert key_id(OLD).hex() == "b5af3c9d44b68217"


def test_threads_share_a_sealer() -> None:
    sealer = Sealer(Keyring([OLD]))

    def work(number: int) -> bool:
        payload = bytes([number]) * 100_000
        return all(sealer.open(sealer.seal(0, payload, b"i"), b"i")[1] == payload for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_more_than_can_be_encrypted_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.codecs.encryption._MOST", 10)
    with pytest.raises(InvalidValue, match="smaller values"):
        Sealer(Keyring([OLD])).seal(0, bytes(11), b"")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r"kvstrata\[encryption\]"):
        Sealer(Keyring([OLD]))
