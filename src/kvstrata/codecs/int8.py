"""Codec 4: 8 bits for an element."""

from __future__ import annotations

from typing import ClassVar

from kvstrata.codecs.quantized import GroupedCodec

__all__ = ["Int8"]


class Int8(GroupedCodec):
    """256 steps between the least and the greatest element of a group."""

    name: ClassVar[str] = "int8"
    id: ClassVar[int] = 4
    code: ClassVar[int] = 1
    usual_scales: ClassVar[str] = "f16"
