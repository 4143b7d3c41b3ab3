"""Codec 2: Zstandard, with a trained dictionary for small values where one is given."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import zstandard

from kvstrata import _core
from kvstrata.codecs.base import TensorInfo, bytes_of, corrupt
from kvstrata.codecs.container import CHUNK, ChunkedCodec, Plan
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Frames", "Zstd", "train_dictionary"]

_LEVELS = range(-22, 23)
_MOST_WINDOW = 1 << 27
_OPTIONS = struct.Struct("<I")  # the dictionary's id, 0 = none


def train_dictionary(samples: Sequence[bytes], size: int = 16 << 10) -> bytes:
    """Make a dictionary of at most `size` bytes for values like the samples.

    Keep it: what was encoded with it can't be decoded without. A hundred times its size in samples is a good measure.
    Raises ConfigError when there are too few to learn from.
    """
    try:
        return zstandard.train_dictionary(size, list(samples)).as_bytes()
    except zstandard.ZstdError as error:
        raise ConfigError(
            f"no dictionary of {size:,} bytes can be trained from {len(samples)} samples: {error}; "
            "give more samples or a smaller size"
        ) from None


class Frames:
    """Zstandard frames for one setting. Contexts are kept by thread, since one serves one thread at a time."""

    def __init__(self, codec: str, level: int, dictionary: zstandard.ZstdCompressionDict | None = None) -> None:
        if isinstance(level, bool) or not isinstance(level, int) or level not in _LEVELS:
            raise ConfigError(f"{codec} has levels from {_LEVELS[0]} to {_LEVELS[-1]}, not {level!r}")
        self._codec = codec
        self._level = level
        self._dictionary = dictionary
        self._local = threading.local()

    def compress(self, data: Buffer) -> bytes:
        """Return a frame that says how long its content is."""
        try:
            compressor = self._local.compressor
        except AttributeError:
            compressor = self._local.compressor = zstandard.ZstdCompressor(
                level=self._level, dict_data=self._dictionary, write_checksum=False, write_dict_id=False
            )
        frame: bytes = compressor.compress(data)
        return frame

    def decompress(self, frame: memoryview, size: int) -> bytes:
        """Return the content, which has to have `size` bytes; raises CorruptRecord."""
        try:
            decompressor = self._local.decompressor
        except AttributeError:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor(dict_data=self._dictionary)
        try:
            # Looked at first: memory is taken for what the frame says that it holds.
            says = zstandard.get_frame_parameters(frame)
            if says.content_size != size or says.window_size > max(size, _MOST_WINDOW):
                raise corrupt(self._codec, "a chunk has another length")
            content: bytes = decompressor.decompress(frame)
        except zstandard.ZstdError as error:
            raise corrupt(self._codec, str(error)) from None
        if len(content) != size:
            raise corrupt(self._codec, "a chunk has another length")
        return content


class Zstd(ChunkedCodec):
    """Zstandard frames.

    level: 1 to 22, or negative for faster than 1.
    dictionary: from `train_dictionary`, to encode with; `dictionaries` are further ones to decode with.
    """

    name: ClassVar[str] = "zstd"
    id: ClassVar[int] = 2
    settings: ClassVar[dict[str, Callable[[str], Any]]] = {"level": int, "chunk": str, "threads": int}
    first_setting: ClassVar[str | None] = "level"

    def __init__(
        self,
        level: int = 3,
        *,
        dictionary: Buffer | None = None,
        dictionaries: Iterable[Buffer] = (),
        chunk: int | str = CHUNK,
        threads: int | None = None,
    ) -> None:
        super().__init__(chunk=chunk, threads=threads)
        known = [_dictionary(data) for data in dictionaries]
        own = None if dictionary is None else _dictionary(dictionary)
        self._own = 0 if own is None else own.dict_id()
        self._frames = {item.dict_id(): Frames(self.name, level, item) for item in known}
        self._frames[0] = Frames(self.name, level)
        if own is not None:
            own.precompute_compress(level=level)
            self._frames[self._own] = Frames(self.name, level, own)

    def _plan(self, _: TensorInfo | None, /) -> Plan:
        frames = self._frames[self._own]
        return Plan(self._chunk, _OPTIONS.pack(self._own), lambda _, part: frames.compress(part))

    def _decoder(self, options: memoryview) -> Callable[[int, memoryview, memoryview], None]:
        if options.nbytes != _OPTIONS.size:
            raise corrupt(self.name, "its options make no sense")
        (number,) = _OPTIONS.unpack(options)
        frames = self._frames.get(number)
        if frames is None:
            raise ConfigError(
                f"this value was compressed with dictionary {number}, which isn't known here; "
                "give its bytes in dictionaries=[...]"
            )

        def decode(_: int, frame: memoryview, out: memoryview) -> None:
            _core.copy_into(frames.decompress(frame, out.nbytes), out)

        return decode


def _dictionary(data: Buffer) -> zstandard.ZstdCompressionDict:
    made = zstandard.ZstdCompressionDict(bytes(bytes_of(data, "a dictionary")))
    if made.dict_id() == 0:
        raise ConfigError("these bytes are no trained dictionary; train_dictionary makes one")
    return made
