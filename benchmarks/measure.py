"""Timing: interleaved, so that drift of a shared machine hits both sides alike; medians with their spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Sample", "Settings", "Work", "interleaved"]


@dataclass(frozen=True)
class Settings:
    """`directory` is on the file system to be measured, and goes later; `quick` trades certainty for time."""

    directory: Path
    quick: bool = False

    def repeats(self, wanted: int) -> int:
        """How many times to repeat what would be repeated `wanted` times at leisure."""
        return max(3, wanted // 4) if self.quick else wanted

    def size(self, wanted: int) -> int:
        """How much to work on."""
        return max(1, wanted // 4) if self.quick else wanted


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, *values: float) -> Sample:
        """Make one of figures that were measured elsewhere."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of the range that holds the middle half of the values, as a part of the median."""
        if len(self.values) < 4 or not self.median:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4)
        return (high - low) / 2 / self.median

    def map(self, convert: Callable[[float], float]) -> Sample:
        """Convert each value, to another unit for instance."""
        return Sample(tuple(convert(value) for value in self.values))


def _nothing() -> None:
    pass


class Work(NamedTuple):
    """`run` is timed and does `count` things of a kind; `prepare` and `tidy` are not timed."""

    run: Callable[[], object]
    count: int = 1
    prepare: Callable[[], object] = _nothing
    tidy: Callable[[], object] = _nothing


def interleaved(*works: Work, repeats: int, warmups: int = 2) -> list[Sample]:
    """Time all works in turn, A B, B A, A B, ...; returns for each the seconds that one thing took."""
    seconds: list[list[float]] = [[] for _ in works]
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for round_number in range(warmups + repeats):
            order = range(len(works)) if round_number % 2 == 0 else range(len(works) - 1, -1, -1)
            for index in order:
                work = works[index]
                work.prepare()
                start = time.perf_counter()
                work.run()
                took = time.perf_counter() - start
                work.tidy()
                if round_number >= warmups:
                    seconds[index].append(took / work.count)
    finally:
        if was_enabled:
            gc.enable()
    return [Sample(tuple(values)) for values in seconds]
