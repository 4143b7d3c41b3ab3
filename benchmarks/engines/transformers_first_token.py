"""Time to the first token in transformers, for prefixes of several lengths."""

from __future__ import annotations

from benchmarks.engines.model import LENGTHS
from benchmarks.measure import Settings
from benchmarks.own import ttft
from benchmarks.table import Row

REMARKS = [ttft.REMARK]


def rows(settings: Settings) -> list[Row]:
    """Measure all of it."""
    return [row for length in LENGTHS for row in ttft.prefix_rows(settings, "bf16", length)]
