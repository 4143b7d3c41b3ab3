"""The payload of every codec but raw: a header, a table, and chunks that are encoded each by itself.

docs/format.md has the bytes. Chunks make large values parallel, and keep the memory that coding needs beside value and
payload small: a chunk for each thread.
"""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from kvstrata import _core
from kvstrata.codecs.base import Codec, TensorInfo, bytes_of, check_out, corrupt
from kvstrata.config import parse_size
from kvstrata.errors import ConfigError
from kvstrata.threads import LazyPool, cores

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CHUNK", "ChunkedCodec", "Plan"]

CHUNK = 512 << 10
"""Bytes of a value in one chunk, unless the codec is told otherwise; fits into a core's own cache."""

_LIMIT = 1 << 31  # lengths of chunks have 31 bits
_RAW = 1 << 31  # in the table: the chunk is stored as it is
_VERSION = 1
_HEADER = struct.Struct("<BBHIQII")  # id, version, bytes of options, chunks, bytes of the value and of a chunk, CRC32C
_CRC_AT = _HEADER.size - 4

_Result = TypeVar("_Result")


class Plan(NamedTuple):
    """How a value is encoded: bytes to a chunk, the codec's own header, and what encodes a chunk.

    `encode(offset, chunk)` gets the chunk's place in the value, and returns None for one that stays as it is.
    """

    chunk: int
    options: bytes
    encode: Callable[[int, memoryview], Buffer | None]


class _Layout(NamedTuple):
    options: memoryview
    value_len: int
    chunk: int
    frames: list[tuple[int, int, bool]]  # start, end, stored raw


class ChunkedCodec(Codec, ABC):
    """What the codecs share whose payloads consist of chunks.

    chunk: bytes of the value in one of them, a number or e.g. "1MiB".
    threads: at most so many encode or decode chunks of one value at a time; None: as many as there are processors.
    """

    name: ClassVar[str]
    id: ClassVar[int]
    lossy: ClassVar[bool] = False
    settings: ClassVar[dict[str, Callable[[str], Any]]] = {}
    """Options by name that `codec()` takes in text, and what makes their values of it."""

    first_setting: ClassVar[str | None] = None
    """The option that needs no name there."""

    def __init__(self, *, chunk: int | str = CHUNK, threads: int | None = None) -> None:
        self._chunk = parse_size(chunk, option="chunk")
        if not 1024 <= self._chunk < _LIMIT:
            raise ConfigError(f"chunk={chunk!r} is not from 1 KiB to 2 GiB")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"threads must be an int from 1 on or None, not {threads!r}")
        self._threads = threads or len(cores())

    def __repr__(self) -> str:
        return f"<kvstrata codec {self.name}>"

    @abstractmethod
    def _plan(self, tensor: TensorInfo | None, /) -> Plan:
        """Say how to encode a value, which is that tensor. Raises InvalidValue when the codec can't."""

    @abstractmethod
    def _decoder(self, options: memoryview) -> Callable[[int, memoryview, memoryview], None]:
        """Return what decodes a chunk: f(offset in the value, frame, out). Raises CorruptRecord, as that does."""

    def encode(self, value: Buffer, tensor: TensorInfo | None = None) -> bytearray:
        """Return the payload. Raises InvalidValue for no contiguous buffer, or one that `tensor` doesn't describe."""
        view = bytes_of(value)
        if tensor is not None:
            tensor.check(view)
        plan = self._plan(tensor)
        starts = range(0, view.nbytes, plan.chunk)
        start_of_table = _HEADER.size + len(plan.options)
        payload = bytearray(start_of_table + 4 * len(starts))
        _HEADER.pack_into(payload, 0, self.id, _VERSION, len(plan.options), len(starts), view.nbytes, plan.chunk, 0)
        payload[_HEADER.size : start_of_table] = plan.options

        def encode(start: int) -> Buffer | None:
            return plan.encode(start, view[start : start + plan.chunk])

        for index, frame in enumerate(_in_order(encode, starts, self._threads)):
            part = view[starts[index] : starts[index] + plan.chunk]
            length = part.nbytes if frame is None else len(memoryview(frame))
            raw = frame is None or length >= part.nbytes
            payload += part if frame is None or raw else frame
            struct.pack_into("<I", payload, start_of_table + 4 * index, (part.nbytes | _RAW) if raw else length)
        end = start_of_table + 4 * len(starts)
        struct.pack_into("<I", payload, _CRC_AT, _checksum(memoryview(payload)[:end]))
        return payload

    def decode_into(self, payload: Buffer, out: Buffer) -> None:
        """Fill `out`, which has exactly the value's bytes. Raises CorruptRecord, InvalidValue for another size."""
        data = bytes_of(payload, "a payload")
        layout = self._read(data)
        target = check_out(out, layout.value_len)
        decode_chunk = self._decoder(layout.options)

        def decode(index: int) -> None:
            start = index * layout.chunk
            part = target[start : start + layout.chunk]
            begin, end, raw = layout.frames[index]
            frame = data[begin:end]
            if not raw:
                decode_chunk(start, frame, part)
            elif frame.nbytes == part.nbytes:
                _core.copy_into(frame, part)
            else:
                raise corrupt(self.name, "a chunk has another length")

        for _ in _in_order(decode, range(len(layout.frames)), self._threads):
            pass

    def decode(self, payload: Buffer) -> bytearray:
        """Return the value. Raises CorruptRecord."""
        out = bytearray(self.value_len(payload))
        self.decode_into(payload, out)
        return out

    def value_len(self, payload: Buffer) -> int:
        """Return how many bytes the value has; raises CorruptRecord."""
        return self._read(bytes_of(payload, "a payload")).value_len

    def _read(self, data: memoryview) -> _Layout:
        """Return what header and table say, checked against the length of the payload."""
        if data.nbytes < _HEADER.size:
            raise corrupt(self.name, "it is too short")
        found, version, options, count, value_len, chunk, crc = _HEADER.unpack_from(data)
        start_of_table = _HEADER.size + options
        end = start_of_table + 4 * count
        if data.nbytes < end or _checksum(data[:end]) != crc:
            raise corrupt(self.name, "its header is damaged")
        if found != self.id:
            raise corrupt(self.name, f"it is of the codec with number {found}")
        if version != _VERSION:
            raise corrupt(self.name, f"it has version {version}; this release reads {_VERSION}")
        if not 0 < chunk < _LIMIT or count != -(-value_len // chunk):
            raise corrupt(self.name, "its header makes no sense")
        frames = []
        for (entry,) in struct.iter_unpack("<I", data[start_of_table:end]):
            frames.append((end, end + (entry & ~_RAW), bool(entry & _RAW)))
            end += entry & ~_RAW
        if end != data.nbytes:
            raise corrupt(self.name, f"it has {data.nbytes:,} bytes, not {end:,}")
        return _Layout(data[_HEADER.size : start_of_table], value_len, chunk, frames)


def _checksum(head: memoryview) -> int:
    """CRC32C of header, options and table, without the checksum itself."""
    return _core.crc32c(head[_HEADER.size :], _core.crc32c(head[:_CRC_AT]))


# ---- Threads


_pool = LazyPool(lambda: max(2, os.cpu_count() or 2), "kvstrata-codec")


def _in_order(run: Callable[[int], _Result], of: range, threads: int) -> Iterator[_Result]:
    """Yield run(i) for each i in turn, with at most `threads` at work. An error waits for those that are under way."""
    if threads == 1 or len(of) < 2:
        yield from map(run, of)
        return
    executor = _pool.executor()
    pending: deque[Future[_Result]] = deque()
    try:
        for i in of:
            if len(pending) == threads:
                yield pending.popleft().result()
            pending.append(executor.submit(run, i))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
