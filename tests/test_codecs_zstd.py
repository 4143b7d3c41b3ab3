"""Zstandard's dictionaries, and the bytes of payloads that older releases wrote."""

from __future__ import annotations

import json
import random

import pytest

from kvstrata.codecs import codec, decoder, train_dictionary
from kvstrata.errors import ConfigError


def small_values(count: int, seed: int = 0) -> list[bytes]:
    source = random.Random(seed)
    cities = ["Ulm", "Graz", "Basel", "Como"]
    return [
        json.dumps({"user": source.randrange(10**9), "city": source.choice(cities), "score": source.random()}).encode()
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def dictionary() -> bytes:
    return train_dictionary(small_values(2000), 4096)


def test_a_dictionary_makes_small_values_smaller(dictionary: bytes) -> None:
    value = small_values(1, seed=9)[0]
    plain, trained = codec("zstd").encode(value), codec("zstd", dictionary=dictionary).encode(value)
    assert len(memoryview(trained)) < len(memoryview(plain)) - 20
    assert decoder(2, dictionaries=[dictionary]).decode(trained) == value
    assert codec("zstd", dictionary=dictionary).decode(trained) == value


def test_a_payload_whose_dictionary_is_missing_says_so(dictionary: bytes) -> None:
    other = train_dictionary(small_values(2000, seed=1), 4096)
    payload = codec("zstd", dictionary=dictionary).encode(b"value")
    for made in (codec("zstd"), codec("zstd", dictionary=other), decoder(2, dictionaries=[other])):
        with pytest.raises(ConfigError, match=r"dictionary \d+, which isn't known"):
            made.decode(payload)


def test_older_dictionaries_stay_readable_and_values_without_one_too(dictionary: bytes) -> None:
    newer = train_dictionary(small_values(2000, seed=1), 4096)
    made = codec("zstd", dictionary=newer, dictionaries=[dictionary])
    assert made.decode(codec("zstd", dictionary=dictionary).encode(b"old" * 50)) == b"old" * 50
    assert made.decode(codec("zstd").encode(b"none" * 50)) == b"none" * 50
    assert made.decode(made.encode(b"new" * 50)) == b"new" * 50


def test_what_is_no_dictionary_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trained dictionary"):
        codec("zstd", dictionary=b"some bytes")
    with pytest.raises(ConfigError, match="more samples"):
        train_dictionary([b"one", b"two"])
