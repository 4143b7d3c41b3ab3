"""Codec 6: 8-bit floats, with a scale for each plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from kvstrata.codecs.quantized import QuantizedCodec

__all__ = ["Fp8E4m3"]


class Fp8E4m3(QuantizedCodec):
    """Sign, four bits of exponent, three of mantissa: the OCP's E4M3, without its NaN.

    Each plane (the tokens of one head in one layer) has as its scale the power of two that brings its largest element
    to between 224 and 448, so that nothing saturates. Values that span many powers of two keep more than in int8.
    """

    name: ClassVar[str] = "fp8-e4m3"
    id: ClassVar[int] = 6
    code: ClassVar[int] = 3
    settings: ClassVar[dict[str, Callable[[str], Any]]] = {"chunk": str, "threads": int}
