"""theine: a W-TinyLFU cache in this process, Python over a core in Rust. A get returns a reference to what was put."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import theine

from benchmarks.peers import leading


class TheinePeer:
    name = f"theine {version('theine')}"

    def __init__(self, entries: int) -> None:
        self._cache: theine.Cache[bytes, bytes] = theine.Cache(entries)
        self.get = self._cache.get  # returns (value, whether it is there)
        self.put = self._cache.set

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        get = self._cache.get
        return [get(key)[0] for key in keys]

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        put = self._cache.set
        for key, value in items.items():
            put(key, value)

    def get_into(self, key: bytes, out: memoryview) -> None:
        value, _ = self._cache.get(key)
        assert value is not None
        out[: len(value)] = value

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        get = self._cache.get
        return leading([get(key)[1] for key in keys])

    def close(self) -> None:
        self._cache.close()


def open_peer(directory: Path, entries: int) -> TheinePeer:
    return TheinePeer(entries)
