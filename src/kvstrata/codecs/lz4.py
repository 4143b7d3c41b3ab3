"""Codec 1: LZ4, for what has to be decoded as fast as it is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lz4.block

from kvstrata import _core
from kvstrata.codecs.base import TensorInfo, corrupt
from kvstrata.codecs.container import CHUNK, ChunkedCodec, Plan
from kvstrata.errors import ConfigError

__all__ = ["Lz4"]


class Lz4(ChunkedCodec):
    """LZ4 blocks. level: 0 is fast; 1 to 12 look longer for a smaller payload, and are decoded as fast."""

    name: ClassVar[str] = "lz4"
    id: ClassVar[int] = 1
    settings: ClassVar[dict[str, Callable[[str], Any]]] = {"level": int, "chunk": str, "threads": int}
    first_setting: ClassVar[str | None] = "level"

    def __init__(self, level: int = 0, *, chunk: int | str = CHUNK, threads: int | None = None) -> None:
        super().__init__(chunk=chunk, threads=threads)
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= 12:
            raise ConfigError(f"lz4 has levels from 0 to 12, not {level!r}")
        self._mode: dict[str, Any] = {"mode": "high_compression", "compression": level} if level else {"mode": "fast"}

    def _plan(self, _: TensorInfo | None, /) -> Plan:
        return Plan(self._chunk, b"", self._encode_chunk)

    def _encode_chunk(self, _: int, part: memoryview) -> bytes:
        frame: bytes = lz4.block.compress(part, store_size=False, **self._mode)
        return frame

    def _decoder(self, options: memoryview) -> Callable[[int, memoryview, memoryview], None]:
        if options.nbytes:
            raise corrupt(self.name, "it has options that this release doesn't know")
        return self._decode_chunk

    def _decode_chunk(self, _: int, frame: memoryview, out: memoryview) -> None:
        try:
            part = lz4.block.decompress(frame, uncompressed_size=out.nbytes)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise corrupt(self.name, str(error)) from None
        if len(part) != out.nbytes:
            raise corrupt(self.name, "a chunk has another length")
        _core.copy_into(part, out)
