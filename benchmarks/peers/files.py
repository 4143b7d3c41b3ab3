"""One file for each value, as many engines keep KV: written under another name and renamed, so none is half there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers import leading


class FilesPeer:
    name = "one file per value"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, key: bytes) -> Path:
        return self._directory / key.hex()

    def get(self, key: bytes) -> bytes | None:
        try:
            with self._path(key).open("rb", buffering=0) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def put(self, key: bytes, value: bytes) -> None:
        path = self._path(key)
        draft = path.with_suffix(".new")
        with draft.open("wb", buffering=0) as file:
            file.write(value)
        draft.rename(path)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        for key, value in items.items():
            self.put(key, value)

    def get_into(self, key: bytes, out: memoryview) -> None:
        with self._path(key).open("rb", buffering=0) as file:
            file.readinto(out)

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        return leading([self._path(key).exists() for key in keys])

    def close(self) -> None:
        pass


def open_peer(directory: Path, entries: int) -> FilesPeer:
    return FilesPeer(directory)
