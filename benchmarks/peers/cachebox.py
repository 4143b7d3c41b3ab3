"""cachebox: an LRU cache in this process, written in Rust. A get returns a reference to what was put."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cachebox

from benchmarks.peers import leading


class CacheboxPeer:
    name = f"cachebox {cachebox.__version__}"

    def __init__(self, entries: int) -> None:
        self._cache: cachebox.LRUCache[bytes, bytes] = cachebox.LRUCache(entries)
        self.get = self._cache.get
        self.put = self._cache.insert
        self.put_many = self._cache.update

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        get = self._cache.get
        return [get(key) for key in keys]

    def get_into(self, key: bytes, out: memoryview) -> None:
        value = self._cache[key]
        out[: len(value)] = value

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        cache = self._cache
        return leading([key in cache for key in keys])

    def close(self) -> None:
        self._cache.clear()


def open_peer(directory: Path, entries: int) -> CacheboxPeer:
    return CacheboxPeer(entries)
