"""LMDB on tmpfs: a memory-mapped B+ tree, shared by processes. Nothing to flush there, so without sync."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import lmdb

from benchmarks.peers import Unavailable, leading

SHM = Path("/dev/shm")


class LmdbPeer:
    name = f"LMDB (tmpfs) {'.'.join(map(str, lmdb.version()))}"

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._env = self._open()

    def _open(self) -> lmdb.Environment:
        return lmdb.open(self._directory, map_size=4 << 30, sync=False, metasync=False, writemap=True)

    def get(self, key: bytes) -> bytes | None:
        with self._env.begin() as txn:
            return txn.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        with self._env.begin(write=True) as txn:
            txn.put(key, value)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._env.begin() as txn:
            get = txn.get
            return [get(key) for key in keys]

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        with self._env.begin(write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti(items.items())

    def get_into(self, key: bytes, out: memoryview) -> None:
        with self._env.begin(buffers=True) as txn:
            value = txn.get(key)
            out[: len(value)] = value

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        with self._env.begin(buffers=True) as txn:
            get = txn.get
            return leading([get(key) is not None for key in keys])

    def close(self) -> None:
        self._env.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def open_peer(directory: Path, entries: int) -> LmdbPeer:
    if not SHM.is_dir():
        raise Unavailable("there is no /dev/shm")
    return LmdbPeer(tempfile.mkdtemp(prefix="kvstrata-bench-lmdb-", dir=SHM))
