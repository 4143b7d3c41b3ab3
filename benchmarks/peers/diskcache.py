"""diskcache: SQLite and files, shared by processes, as it comes. It lies in the measured directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import diskcache

from benchmarks.peers import leading


class DiskcachePeer:
    name = f"diskcache {diskcache.__version__}"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open()

    def _open(self) -> None:
        self._cache = diskcache.Cache(self._directory, size_limit=8 << 30)
        self.get = self._cache.get
        self.put = self._cache.set

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._cache.transact():
            return [self._cache.get(key) for key in keys]

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        with self._cache.transact():
            for key, value in items.items():
                self._cache.set(key, value)

    def get_into(self, key: bytes, out: memoryview) -> None:
        value = self._cache.get(key)
        out[: len(value)] = value

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        with self._cache.transact():
            return leading([key in self._cache for key in keys])

    def forget(self) -> None:
        """Open it anew: SQLite maps its file, and the kernel doesn't drop what a process has mapped."""
        self._cache.close()
        self._open()

    def close(self) -> None:
        self._cache.close()


def open_peer(directory: Path, entries: int) -> DiskcachePeer:
    return DiskcachePeer(directory)
