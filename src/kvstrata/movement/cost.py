"""What it costs to load from a tier, learned from the loads, and how much of a prefix is worth loading.

A load of n bytes is taken to cost latency + n / bandwidth. Both are learned in logarithms, by normalised least mean
squares (Widrow and Hoff 1960; Nagumo and Noda 1967): of the error of each estimate a part is made good, by latency and
bandwidth in proportion to what they had in it. So they stay positive, small loads teach the latency, large ones the
bandwidth, and loads that are in between both. An error counts up to a limit, so that one outlier moves little; the
limit grows while errors beyond it go on in the same direction, since then it's the tier that has changed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstrata.errors import ConfigError

__all__ = ["CostModel", "Prefill", "TierCost", "worth_loading"]

_STEP = 0.1
"""The part of an error that is made good, once enough was observed; at first more."""
_SETTLED = 5
"""Observations before which an error counts in full: an estimate made before any is only a guess."""
_LIMIT = math.log(3)
"""Errors by more than this factor count as outliers,"""
_PATIENCE = 2
"""unless there were more than so many of them in a row; then the limit is doubled each time."""
_LATENCY_S = (1e-7, 100.0)
_BYTE_S = (1e-13, 1e-2)

_PRIORS = {"disk": (300e-6, 1e9)}
"""Latency in s and bandwidth in bytes/s before anything was observed; of an NVMe device."""
_OTHER_PRIOR = (2e-3, 100e6)
"""The same of a tier that nothing is known of, such as one behind a network."""


@dataclass(frozen=True)
class TierCost:
    """What is known of a tier: seconds of a load, and bytes per second beyond these."""

    latency_s: float
    bytes_per_s: float
    observations: int = 0
    _streak: int = 0  # outliers in a row, above the estimate or, negative, below

    def seconds(self, nbytes: float) -> float:
        """Return what a load of that many bytes is estimated to take."""
        return self.latency_s + nbytes / self.bytes_per_s

    def after(self, nbytes: int, seconds: float) -> TierCost:
        """Return what is known after a load; one that can't have been is left out."""
        if not (nbytes > 0 and seconds > 0 and math.isfinite(seconds)):
            return self
        expected = self.seconds(nbytes)
        by_latency = self.latency_s / expected
        by_bytes = 1 - by_latency
        error, streak = math.log(seconds) - math.log(expected), 0  # their ratio may be less than there are numbers for
        if self.observations >= _SETTLED:
            error, streak = _bounded(error, self._streak)
        step = max(_STEP, 1 / (self.observations + 2)) * error / (by_latency**2 + by_bytes**2)
        return TierCost(
            _within(self.latency_s * math.exp(step * by_latency), _LATENCY_S),
            1 / _within(math.exp(step * by_bytes) / self.bytes_per_s, _BYTE_S),
            self.observations + 1,
            streak,
        )


class CostModel:
    """What loads cost, for each tier by name. Thread-safe. `clock` tells seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._tiers: dict[str, TierCost] = {}

    def observe(self, tier: str, nbytes: int, seconds: float) -> None:
        """Learn from a load."""
        with self._lock:
            self._tiers[tier] = self._of(tier).after(nbytes, seconds)

    def seconds(self, tier: str, nbytes: int) -> float:
        """Return what a load is estimated to take."""
        with self._lock:
            return self._of(tier).seconds(nbytes)

    def stats(self) -> dict[str, dict[str, float]]:
        """Return what was learned of each tier: "latency_s", "bytes_per_s", "observations"."""
        with self._lock:
            return {
                name: {
                    "latency_s": cost.latency_s,
                    "bytes_per_s": cost.bytes_per_s,
                    "observations": cost.observations,
                }
                for name, cost in self._tiers.items()
            }

    def _of(self, tier: str) -> TierCost:
        return self._tiers.get(tier) or TierCost(*_PRIORS.get(tier, _OTHER_PRIOR))


class Prefill:
    """How fast the caller's model computes KV, in tokens per second; unknown until it is told or observed."""

    def __init__(self, tokens_per_s: float | None) -> None:
        if tokens_per_s is not None and not _usable(tokens_per_s):
            raise ConfigError(f"prefill_tokens_per_s must be a positive number or None, not {tokens_per_s!r}")
        self._lock = threading.Lock()
        self._token_s = None if tokens_per_s is None else 1 / tokens_per_s
        self._observations = 0
        self._streak = 0

    @property
    def token_s(self) -> float | None:
        """Seconds for a token, or None."""
        return self._token_s

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a prefill; one that can't have been is left out."""
        if not (tokens > 0 and _usable(seconds)):
            return
        with self._lock:
            took = seconds / tokens
            if self._token_s is None:
                self._token_s = took
            error, self._streak = _bounded(math.log(took / self._token_s), self._streak)
            self._observations += 1
            self._token_s *= math.exp(max(_STEP, 1 / (self._observations + 1)) * error)


def worth_loading(places: Sequence[tuple[str, int] | None], load_s: Callable[[str, int], float], block_s: float) -> int:
    """Return how many blocks of a prefix, from the first on, are to be loaded, so that it takes the least time in all.

    `places` are of each block that has to come up the tier and the bytes, None of one that is in memory;
    `load_s(tier, bytes)` is what a load takes, one tier after the other, and `block_s` what it takes to compute a
    block. Of equal choices it is the longest.
    """
    best, best_s = 0, len(places) * block_s
    nbytes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for count, place in enumerate(places, start=1):
        if place is not None:
            tier, size = place
            nbytes[tier] = nbytes.get(tier, 0) + size
            seconds[tier] = load_s(tier, nbytes[tier])
        total = sum(seconds.values()) + (len(places) - count) * block_s
        if total <= best_s:
            best, best_s = count, total
    return best


def _bounded(error: float, streak: int) -> tuple[float, int]:
    """Return an error within the limit, and how many outliers in its direction there have been in a row."""
    if abs(error) <= _LIMIT:
        return error, 0
    direction = 1 if error > 0 else -1
    streak = streak + direction if streak * direction > 0 else direction
    limit = _LIMIT * 2.0 ** min(max(0, abs(streak) - _PATIENCE), 10)
    return max(-limit, min(error, limit)), streak


def _within(value: float, bounds: tuple[float, float]) -> float:
    return max(bounds[0], min(value, bounds[1]))


def _usable(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
