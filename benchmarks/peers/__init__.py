"""Other caches, and what copying alone costs, behind one protocol. None of them is needed to use kvstrata."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["NAMES", "Peer", "Unavailable", "open_peers"]

NAMES = ("copied", "cachebox", "cachetools", "theine", "lmdb", "redis", "diskcache")


class Unavailable(Exception):
    """A peer can't run here; says why."""


class Peer(Protocol):
    """A cache of bytes under bytes. Where a peer has such a function, the verb is that function itself."""

    name: str

    def get(self, key: bytes) -> Any: ...
    def put(self, key: bytes, value: bytes) -> Any: ...
    def get_many(self, keys: Sequence[bytes]) -> Any: ...
    def put_many(self, items: Mapping[bytes, bytes]) -> Any: ...
    def get_into(self, key: bytes, out: memoryview) -> Any:
        """Copy the value to the beginning of `out`."""

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """Return how many keys from the first on are there."""

    def close(self) -> None: ...


def open_peers(directory: Path, entries: int, names: Sequence[str] = NAMES) -> tuple[list[Peer], list[str]]:
    """Open the peers that are installed, for so many entries; returns a remark for each that isn't."""
    peers: list[Peer] = []
    missing: list[str] = []
    for name in names:
        place = directory / name
        place.mkdir(parents=True, exist_ok=True)
        try:
            peers.append(importlib.import_module(f"benchmarks.peers.{name}").open_peer(place, entries))
        except ImportError as error:
            missing.append(f"{name} was not measured: {error}")
        except Unavailable as why:
            missing.append(f"{name} was not measured: {why}")
    return peers, missing


def leading(present: Sequence[Any]) -> int:
    """Return how many are true before the first that isn't."""
    return next((index for index, there in enumerate(present) if not there), len(present))
