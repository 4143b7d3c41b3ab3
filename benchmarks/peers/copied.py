"""What copying alone costs: a dict of buffers in this process, without any bound, policy, checksum or lock.

A cache between processes can't hand out references to the objects of one of them: this is the least that it can take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers import leading


class Copied:
    name = "a dict, copied"

    def __init__(self) -> None:
        self._values: dict[bytes, bytearray] = {}

    def get(self, key: bytes) -> bytes:
        return bytes(self._values[key])

    def put(self, key: bytes, value: bytes) -> None:
        known = self._values.get(key)
        if known is None:
            self._values[key] = bytearray(value)
        else:
            known[:] = value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        values = self._values
        return [bytes(values[key]) for key in keys]

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        for key, value in items.items():
            self.put(key, value)

    def get_into(self, key: bytes, out: memoryview) -> None:
        value = self._values[key]
        out[: len(value)] = value

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        return leading([key in self._values for key in keys])

    def close(self) -> None:
        self._values.clear()


def open_peer(directory: Path, entries: int) -> Copied:
    return Copied()
