"""Codec 0: the payload is the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata import _core
from kvstrata.codecs.base import Codec, TensorInfo, bytes_of, check_out

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Raw"]


class Raw(Codec):
    """No encoding, no header, and no copy where there need be none."""

    name: ClassVar[str] = "raw"
    id: ClassVar[int] = 0
    lossy: ClassVar[bool] = False
    settings: ClassVar[dict[str, Callable[[str], Any]]] = {}
    first_setting: ClassVar[str | None] = None

    def __repr__(self) -> str:
        return "<kvstrata codec raw>"

    def encode(self, value: Buffer, tensor: TensorInfo | None = None) -> memoryview:
        """Return the bytes of the value themselves. Raises InvalidValue as other codecs do."""
        view = bytes_of(value)
        if tensor is not None:
            tensor.check(view)
        return view

    def decode_into(self, payload: Buffer, out: Buffer) -> None:
        """Copy; raises InvalidValue for an `out` of another size."""
        data = bytes_of(payload, "a payload")
        _core.copy_into(data, check_out(out, data.nbytes))

    def decode(self, payload: Buffer) -> memoryview:
        """Return the bytes of the payload themselves."""
        return bytes_of(payload, "a payload")

    def value_len(self, payload: Buffer) -> int:
        """Return how many bytes the value has."""
        return bytes_of(payload, "a payload").nbytes
