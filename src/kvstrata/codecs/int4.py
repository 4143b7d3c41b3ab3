"""Codec 5: 4 bits for an element."""

from __future__ import annotations

from typing import ClassVar

from kvstrata.codecs.quantized import GroupedCodec

__all__ = ["Int4"]


class Int4(GroupedCodec):
    """16 steps between the least and the greatest element of a group."""

    name: ClassVar[str] = "int4"
    id: ClassVar[int] = 5
    code: ClassVar[int] = 2
    usual_scales: ClassVar[str] = "f16/f8"
