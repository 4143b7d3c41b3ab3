"""LMDB on the measured file system: the memory-mapped B+ tree, without a sync at each commit."""

from __future__ import annotations

from pathlib import Path

import lmdb

from benchmarks.peers.lmdb import LmdbPeer


class LmdbOnDiskPeer(LmdbPeer):
    name = f"LMDB {'.'.join(map(str, lmdb.version()))}"

    def forget(self) -> None:
        """Open it anew: the kernel doesn't drop what a process has mapped."""
        self._env.close()
        self._env = self._open()


def open_peer(directory: Path, entries: int) -> LmdbOnDiskPeer:
    return LmdbOnDiskPeer(str(directory))
