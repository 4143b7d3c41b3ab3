"""What the lossy codecs share: planes of a tensor, quantized in groups by the core.

Groups of keys run along the tokens of one channel, since some channels of keys are much larger than others; groups of
values along the channels of one token: KIVI (Liu et al., 2024). A rotation by a Hadamard matrix spreads such
channels over all of a head: QuaRot (Ashkboos et al., 2024); rotated keys are better grouped by token.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata import _core
from kvstrata.codecs.base import ErrorStats, TensorInfo, corrupt
from kvstrata.codecs.container import CHUNK, ChunkedCodec, Plan
from kvstrata.errors import ConfigError, InvalidValue, UnknownOption

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["GroupedCodec", "QuantizedCodec"]

_DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}
_SCALES = {"f32": 1, "f16": 2, "bf16": 3, "f8": 4}
_KINDS = {"values": 0, "keys": 1}
_BOTH = 2
_BY_CHANNEL, _ROTATE_KEYS, _ROTATE_VALUES = 1, 2, 4

# Types of elements, codes and keys' scales; flags; elements of a group; tokens and channels; planes of a run; kind;
# type of values' scales.
_OPTIONS = struct.Struct("<BBBBIIIIBB2x")
_MOST_GROUP = 1 << 16


class QuantizedCodec(ChunkedCodec):
    """A lossy codec for tensors. A chunk with an element that isn't finite is stored as it is."""

    lossy: ClassVar[bool] = True
    code: ClassVar[int]
    """What an element becomes: 1 = 8 bits, 2 = 4 bits, 3 = e4m3."""

    _group = 1
    _scales = (1, 1)  # of keys and of values
    _flags = 0

    def error(self, original: Buffer, tensor: TensorInfo) -> ErrorStats:
        """Encode and decode it, and tell how far the result is off."""
        return ErrorStats.between(original, self.decode(self.encode(original, tensor)), tensor)

    def _plan(self, tensor: TensorInfo | None, /) -> Plan:
        if tensor is None:
            raise InvalidValue(
                f"{self.name} loses precision, so it has to know what it encodes: "
                "give tensor=TensorInfo(dtype, shape, axes), or use a lossless codec (raw, lz4, zstd, planes)"
            )
        options = _OPTIONS.pack(
            _DTYPES[tensor.dtype], self.code, self._scales[0], self._flags, self._group, tensor.tokens, tensor.channels,
            tensor.run, _BOTH if tensor.has_kv else _KINDS[tensor.part], self._scales[1],
        )  # fmt: skip
        quantizer = _quantizer(options)
        plane = quantizer.plane_bytes
        if plane >= 1 << 31:
            raise InvalidValue(f"a plane of {tensor.tokens} tokens x {tensor.channels} channels is over 2 GiB")
        chunk = max(1, self._chunk // max(1, plane)) * max(1, plane)

        def encode(offset: int, part: memoryview) -> bytearray | None:
            first = offset // plane
            frame = bytearray(quantizer.coded_bytes(first, part.nbytes // plane))
            return frame if quantizer.encode(part, frame, first) else None

        return Plan(chunk, options, encode)

    def _decoder(self, options: memoryview) -> Callable[[int, memoryview, memoryview], None]:
        if options.nbytes != _OPTIONS.size or options[1] != self.code:
            raise corrupt(self.name, "its options make no sense")
        try:
            quantizer = _quantizer(options)
        except InvalidValue as error:
            raise corrupt(self.name, str(error)) from None

        def decode(offset: int, frame: memoryview, out: memoryview) -> None:
            try:
                quantizer.decode(frame, out, offset // max(1, quantizer.plane_bytes))
            except InvalidValue as error:
                raise corrupt(self.name, str(error)) from None

        return decode


class GroupedCodec(QuantizedCodec):
    """Integers with a scale and a minimum for each group.

    group: elements of one, at most; at the end of an axis it may have fewer.
    scales: the type of scale and minimum, "f32", "f16", "bf16", or "f8": 8 bits for the scale, 16 for the minimum; two
        of them, as in "f16/f8", are those of keys and of values. None: "f16" for int8, "f16/f8" for int4.
    keys: whether groups of keys run along the tokens of a "channel", or the channels of a "token", as values' do.
    hadamard: what is rotated first: "" (nothing), "k", "v" or "kv". Needs a power of two of channels.
    """

    settings: ClassVar[dict[str, Callable[[str], Any]]] = {
        "group": int, "scales": str, "keys": str, "hadamard": str, "chunk": str, "threads": int,
    }  # fmt: skip
    first_setting: ClassVar[str | None] = "group"
    usual_scales: ClassVar[str]

    def __init__(
        self,
        group: int = 64,
        *,
        scales: str | None = None,
        keys: str = "channel",
        hadamard: str = "",
        chunk: int | str = CHUNK,
        threads: int | None = None,
    ) -> None:
        super().__init__(chunk=chunk, threads=threads)
        if isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= _MOST_GROUP:
            raise ConfigError(f"group must be an int from 1 to {_MOST_GROUP}, not {group!r}")
        scales = self.usual_scales if scales is None else scales
        of_keys, slash, of_values = scales.partition("/")
        of_values = of_values if slash else of_keys
        for kind, name, known in (
            ("type of scales", of_keys, tuple(_SCALES)),
            ("type of scales", of_values, tuple(_SCALES)),
            ("grouping of keys", keys, ("channel", "token")),
            ("part to rotate", hadamard, ("", "k", "v", "kv")),
        ):
            if name not in known:
                raise UnknownOption(kind, name, known)
        self._group = group
        self._scales = (_SCALES[of_keys], _SCALES[of_values])
        self._flags = (
            _BY_CHANNEL * (keys == "channel") | _ROTATE_KEYS * ("k" in hadamard) | _ROTATE_VALUES * ("v" in hadamard)
        )


def _quantizer(options: Buffer) -> _core.Quantizer:
    dtype, code, of_keys, flags, group, rows, cols, run, kind, of_values = _OPTIONS.unpack(options)
    return _core.Quantizer(
        dtype=dtype, code=code, scales_of_keys=of_keys, scales_of_values=of_values, kind=kind, inner=run, group=group,
        rows=rows, cols=cols, keys_by_channel=bool(flags & _BY_CHANNEL), rotate_keys=bool(flags & _ROTATE_KEYS),
        rotate_values=bool(flags & _ROTATE_VALUES),
    )  # fmt: skip
