"""LMDB on the measured file system: the memory-mapped B+ tree, without a sync at each commit."""

from __future__ import annotations

from pathlib import Path

import lmdb

from benchmarks.peers.lmdb import LmdbPeer


class LmdbOnDiskPeer(LmdbPeer):
    name = f"LMDB {'.'.join(map(str, lmdb.version()))}"


def open_peer(directory: Path, entries: int) -> LmdbOnDiskPeer:
    return LmdbOnDiskPeer(str(directory))
