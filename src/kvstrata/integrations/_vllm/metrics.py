"""What the connector counts, for vLLM's log and for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["COUNTERS", "Deltas", "KVStrataPromMetrics", "KVStrataStats", "total"]

COUNTERS = {
    "lookups": "How often the cache was asked; a request that waits asks again.",
    "looked_up_blocks": "Blocks that it was asked for.",
    "found_blocks": "Blocks that were there.",
    "loaded_blocks": "Blocks that were loaded into the engine.",
    "loaded_bytes": "Bytes that were loaded into the engine.",
    "missed_blocks": "Blocks that were there when asked for and could not be loaded: computed instead.",
    "stored_blocks": "Blocks that were stored.",
    "stored_bytes": "Bytes that were stored.",
    "unstored_blocks": "Blocks that were not stored, for want of room or of time.",
    "errors": "Calls to the cache that failed; they count as misses.",
}


@dataclass
class KVStrataStats(KVConnectorStats):  # type: ignore[misc]
    """Counts of an interval, by the names of COUNTERS."""

    data: dict[str, int]

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVStrataStats:
        """Add what another one has counted."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what the log shows."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


def total(stats: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """Add up counters of several, by their names."""
    found: dict[str, int] = {}
    for counted in stats:
        for name, value in counted.items():
            if isinstance(value, int):
                found[name] = found.get(name, 0) + value
    return found


class Deltas:
    """What was added to counters since it was last asked."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def of(self, stats: Mapping[str, object]) -> KVStrataStats | None:
        """Return the difference, None where there is none."""
        now = {name: value for name in COUNTERS if isinstance(value := stats.get(name), int)}
        new = {name: value - self._last.get(name, 0) for name, value in now.items()}
        self._last = now
        counted = {name: value for name, value in new.items() if value}
        return KVStrataStats(data=counted) if counted else None


class KVStrataPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters "vllm:kvstrata_NAME" for each engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:kvstrata_{name}", documentation=text, labelnames=self._labelnames)
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in self.per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted in an interval."""
        for name, amount in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(amount)
