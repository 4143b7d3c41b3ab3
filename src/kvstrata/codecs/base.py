"""What a codec is, and what it is told about the tensor that it encodes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from kvstrata.errors import CorruptRecord, InvalidValue

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstrata.keys import KVLayout

__all__ = ["AXES", "Codec", "ErrorStats", "PartError", "TensorInfo", "bytes_of", "check_out", "floats_of"]

AXES = ("layers", "kv", "heads", "tokens", "channels")
"""Names of the axes of a block of KV, in the order that blocks have them."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@runtime_checkable
class Codec(Protocol):
    """Makes payloads of values and values of payloads. All methods may be called from several threads at once.

    A payload says all that decoding needs, but for a dictionary where one was used.
    """

    @property
    def name(self) -> str:
        """What `codec()` knows it by."""
        ...

    @property
    def id(self) -> int:
        """The number in the header of its records, fixed for ever; 0 is raw."""
        ...

    @property
    def lossy(self) -> bool:
        """Whether what is decoded differs from what was encoded."""
        ...

    def encode(self, value: Buffer, tensor: TensorInfo | None = None) -> Buffer:
        """Return the payload. Raises InvalidValue for no contiguous buffer, or one that `tensor` doesn't describe."""
        ...

    def decode_into(self, payload: Buffer, out: Buffer) -> None:
        """Fill `out`, which has exactly the value's bytes.

        Raises CorruptRecord for what is no payload of this codec, and InvalidValue for an `out` of another size; `out`
        has any content then.
        """
        ...

    def decode(self, payload: Buffer) -> Buffer:
        """Return the value; raises CorruptRecord."""
        ...

    def value_len(self, payload: Buffer) -> int:
        """Return how many bytes the value has; raises CorruptRecord."""
        ...


class TensorInfo(msgspec.Struct, frozen=True):
    """The type and the shape of a value that is a contiguous tensor, and what its axes are.

    dtype: "float32", "float16" or "bfloat16", little endian.
    axes: a name for each axis, of AXES or any other. The last two are "tokens" and "channels". The axis "kv" has two
    places, keys and then values; a tensor without one holds what `part` says. Without names the last two axes count as
    tokens and channels.
    """

    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()
    part: Literal["keys", "values"] = "values"

    def __post_init__(self) -> None:
        """Raise InvalidValue for what can't be."""
        if self.dtype not in _ITEM_BYTES:
            raise InvalidValue(f"dtype={self.dtype!r} is not one of {', '.join(_ITEM_BYTES)}")
        if any(isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 31 for size in self.shape):
            raise InvalidValue(f"a shape has sizes from 0 on, not {self.shape!r}")
        if self.part not in ("keys", "values"):
            raise InvalidValue(f"part={self.part!r} is neither 'keys' nor 'values'")
        if not self.axes:
            return
        if len(self.axes) != len(self.shape):
            raise InvalidValue(f"{len(self.axes)} names for the {len(self.shape)} axes of {self.shape}")
        if self.axes[-2:] != ("tokens", "channels"):
            raise InvalidValue(
                f"the last two axes have to be tokens and channels, not {self.axes[-2:]}: "
                "permute the tensor before it is stored, or use a lossless codec"
            )
        if self.axes.count("kv") > 1 or ("kv" in self.axes and self.shape[self.axes.index("kv")] != 2):
            raise InvalidValue(f"the axis kv has the places keys and values, but the shape is {self.shape}")

    @classmethod
    def of_block(cls, layout: KVLayout) -> TensorInfo:
        """Describe a block of that layout; raises InvalidValue for one of 8-bit elements."""
        return cls(layout.dtype, layout.block_shape, AXES)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def tokens(self) -> int:
        """The size of the last axis but one."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def channels(self) -> int:
        """The size of the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def has_kv(self) -> bool:
        """Whether keys and values are both in it."""
        return "kv" in self.axes

    @property
    def run(self) -> int:
        """How many planes of tokens x channels hold keys before as many hold values; at least 1."""
        if not self.has_kv:
            return 1
        return max(1, math.prod(self.shape[self.axes.index("kv") + 1 : -2]))

    def check(self, value: memoryview) -> None:
        """Raise InvalidValue unless `value` has the bytes of this tensor."""
        if value.nbytes != self.nbytes:
            raise InvalidValue(f"the value has {value.nbytes:,} bytes, but {self.dtype} {self.shape} {self.nbytes:,}")


class PartError(NamedTuple):
    """How far the elements are off: the most, and the root mean square over that of the elements themselves."""

    max_abs: float
    rms_relative: float

    @classmethod
    def between(cls, exact: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> PartError:
        """Compare, ignoring what isn't finite."""
        finite = np.isfinite(exact)
        exact = exact[finite].astype(np.float64)
        off = exact - found[finite]
        if not exact.size:
            return cls(0.0, 0.0)
        size = float(np.sqrt(np.mean(exact**2)))
        rms = float(np.sqrt(np.mean(off**2)))
        return cls(float(np.abs(off).max()), rms / size if size else 0.0)


class ErrorStats(NamedTuple):
    """What a lossy codec did to a tensor, in all and to each part; None for a part that isn't there."""

    max_abs: float
    rms_relative: float
    keys: PartError | None
    values: PartError | None

    @classmethod
    def between(cls, exact: Buffer, found: Buffer, tensor: TensorInfo) -> ErrorStats:
        """Compare two values, both of that tensor."""
        one, other = floats_of(exact, tensor), floats_of(found, tensor)
        whole = PartError.between(one.ravel(), other.ravel())
        if tensor.has_kv:
            axis = tensor.axes.index("kv")
            parts = [
                PartError.between(np.take(one, [i], axis=axis).ravel(), np.take(other, [i], axis=axis).ravel())
                for i in (0, 1)
            ]
            return cls(*whole, *parts)
        return cls(*whole, *((whole, None) if tensor.part == "keys" else (None, whole)))


def floats_of(value: Buffer, tensor: TensorInfo) -> npt.NDArray[np.float32]:
    """Return the elements as float32, in the tensor's shape."""
    data = bytes_of(value)
    tensor.check(data)
    if tensor.dtype == "bfloat16":
        words = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return words.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(data, "<f2" if tensor.dtype == "float16" else "<f4").astype(np.float32).reshape(tensor.shape)


def bytes_of(value: Buffer, what: str = "a value") -> memoryview:
    """Return the bytes of a contiguous buffer; raises InvalidValue."""
    try:
        view = memoryview(value)
    except TypeError:
        raise InvalidValue(f"{what} is a contiguous buffer, not {type(value).__name__}") from None
    if not view.c_contiguous:
        raise InvalidValue(f"{what} is a contiguous buffer; this one has gaps")
    if view.nbytes == 0:
        return memoryview(b"")
    if view.format == "B" and view.ndim == 1:
        return view
    try:
        return view.cast("B")
    except (TypeError, ValueError):
        return np.asarray(view).reshape(-1).view(np.uint8).data


def check_out(out: Buffer, value_len: int) -> memoryview:
    """Return the bytes to fill; raises InvalidValue unless there are exactly `value_len`, and writable."""
    view = bytes_of(out, "out")
    if view.nbytes != value_len:
        raise InvalidValue(f"out has {view.nbytes:,} bytes, the value {value_len:,}")
    if value_len and view.readonly:
        raise InvalidValue("out has to be writable")
    return view


def corrupt(codec: str, what: str) -> CorruptRecord:
    """Make the error for a payload that isn't one."""
    return CorruptRecord(f"a payload of codec {codec}: {what}")
