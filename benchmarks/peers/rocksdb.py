"""RocksDB by rocksdict: a log-structured merge tree of one process, as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rocksdict import Options, Rdict, WriteBatch

from benchmarks.peers import leading


class RocksdbPeer:
    name = f"RocksDB (rocksdict {version('rocksdict')})"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open()

    def _open(self) -> None:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        self._db = Rdict(str(self._directory), options)
        self.get = self._db.get
        self.put = self._db.put

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._db.get(list(keys))

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        batch = WriteBatch(raw_mode=True)
        for key, value in items.items():
            batch.put(key, value)
        self._db.write(batch)

    def get_into(self, key: bytes, out: memoryview) -> None:
        value = self._db.get(key)
        out[: len(value)] = value

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        return leading([value is not None for value in self.get_many(keys)])

    def settle(self) -> None:
        """Have everything in files."""
        self._db.flush()

    def forget(self) -> None:
        """Open it anew, without what its own caches hold."""
        self._db.close()
        self._open()

    def close(self) -> None:
        self._db.close()


def open_peer(directory: Path, entries: int) -> RocksdbPeer:
    return RocksdbPeer(directory)
