"""Codec 3: tensors of 16- and 32-bit floats, bit for bit, by planes of their bytes.

An element is rotated left by one bit, which brings the eight bits of a bfloat16's or float32's exponent into one byte,
and the sign to the mantissa's end; then the bytes of equal place are put together, as Blosc's shuffle does. Exponents
of neighbours are alike and compress; mantissas hardly do, and a plane that doesn't is stored as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata import _core
from kvstrata.codecs.base import TensorInfo, corrupt
from kvstrata.codecs.container import CHUNK, ChunkedCodec, Plan
from kvstrata.codecs.zstd import Frames
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Planes"]

_OPTIONS = struct.Struct("<B3x")  # bytes of an element
_RAW = 1 << 31  # of a plane's length: it is stored as it is
_WIDTHS = (2, 4)


class Planes(ChunkedCodec):
    """Zstandard over byte planes.

    level: of Zstandard.
    width: bytes of an element, 2 or 4, where no tensor says so.
    """

    name: ClassVar[str] = "planes"
    id: ClassVar[int] = 3
    settings: ClassVar[dict[str, Callable[[str], Any]]] = {"level": int, "width": int, "chunk": str, "threads": int}
    first_setting: ClassVar[str | None] = "level"

    def __init__(self, level: int = 1, *, width: int = 2, chunk: int | str = CHUNK, threads: int | None = None) -> None:
        super().__init__(chunk=chunk, threads=threads)
        if width not in _WIDTHS:
            raise ConfigError(f"planes are of elements with 2 or 4 bytes, not {width!r}")
        self._width = width
        self._chunk -= self._chunk % 4
        self._frames = Frames(self.name, level)

    def _plan(self, tensor: TensorInfo | None, /) -> Plan:
        width = self._width if tensor is None else tensor.item_bytes
        return Plan(self._chunk, _OPTIONS.pack(width), lambda _, part: self._encode_chunk(part, width))

    def _encode_chunk(self, part: memoryview, width: int) -> bytes:
        count = part.nbytes // width
        shuffled = memoryview(bytearray(count * width))
        _core.split_planes(part[: count * width], shuffled, width)
        lengths, planes = [], []
        for i in range(width):
            plane: Buffer = shuffled[i * count : (i + 1) * count]
            packed = self._frames.compress(plane)
            worth_it = len(packed) < count - count // 32
            planes.append(packed if worth_it else plane)
            lengths.append(len(packed) if worth_it else count | _RAW)
        return b"".join((struct.pack(f"<{width}I", *lengths), *planes, part[count * width :]))

    def _decoder(self, options: memoryview) -> Callable[[int, memoryview, memoryview], None]:
        if options.nbytes != _OPTIONS.size or options[0] not in _WIDTHS:
            raise corrupt(self.name, "its options make no sense")
        width = options[0]
        return lambda _, frame, out: self._decode_chunk(frame, out, width)

    def _decode_chunk(self, frame: memoryview, out: memoryview, width: int) -> None:
        count, rest = divmod(out.nbytes, width)
        at = 4 * width
        if frame.nbytes < at:
            raise corrupt(self.name, "a chunk is too short")
        planes: list[Buffer] = []
        for length in struct.unpack_from(f"<{width}I", frame):
            stored = frame[at : at + (length & ~_RAW)]
            at += length & ~_RAW
            if at > frame.nbytes:
                raise corrupt(self.name, "a chunk is too short")
            planes.append(stored if length & _RAW else self._frames.decompress(stored, count))
        if at + rest != frame.nbytes or any(len(memoryview(plane)) != count for plane in planes):
            raise corrupt(self.name, "a plane has another length")
        _core.join_planes(planes, out[: count * width], width)
        out[count * width :] = frame[at:]
