"""Figures of all workers together, as Prometheus wants them.

Counters of the workers lie in files that they share (prometheus_client's multi-process mode), so that whichever worker
is asked answers for all, and what a killed one had counted stays. Figures of the cache are read when asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstrata.cache import Cache
from kvstrata.errors import MissingExtra
from kvstrata.serve.engine import Answer

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
    from prometheus_client.core import GaugeMetricFamily
except ImportError as error:
    raise MissingExtra("serve", "prometheus-client") from error

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LIVE_FILE = re.compile(r"gauge_live\w*_(\d+)\.db$")


class Metrics:
    """The metrics of this process; one object of it. $PROMETHEUS_MULTIPROC_DIR must be set before it is imported."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._files = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        own = CollectorRegistry()  # what it collects from are the files
        self.requests: Any = Counter(
            "kvstrata_serve_requests", "Requests by their end.", ["endpoint", "status"], registry=own
        )
        self.tokens: Any = Counter(
            "kvstrata_serve_tokens",
            "Tokens of prompts, of these from the cache, and generated.",
            ["kind"],
            registry=own,
        )
        self.loaded: Any = Counter(
            "kvstrata_serve_loaded_bytes", "Bytes of KV loaded, by tier.", ["tier"], registry=own
        )
        self.errors: Any = Counter(
            "kvstrata_serve_cache_errors", "Requests that were served although the cache failed them.", registry=own
        )
        self.ttft: Any = Histogram(
            "kvstrata_serve_ttft_seconds", "From the start of generation to the first token.", ["cached"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.pending: Any = Gauge(
            "kvstrata_serve_pending_requests", "Requests that wait or are generated.", registry=own,
            multiprocess_mode="livesum",
        )  # fmt: skip

    def answered(self, answer: Answer) -> None:
        """Count an answer that came to its end."""
        reuse = answer.reuse
        self.tokens.labels("prompt").inc(reuse.prompt_tokens)
        self.tokens.labels("cached").inc(reuse.reused_tokens)
        self.tokens.labels("generated").inc(answer.completion_tokens)
        self.loaded.labels(reuse.tier).inc(reuse.loaded_bytes)
        self.ttft.labels("yes" if reuse.reused_tokens else "no").observe(reuse.ttft_s)
        if reuse.error:
            self.errors.inc()

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        for file in self._files.glob("gauge_live*.db"):
            found = _LIVE_FILE.search(file.name)
            if found and not Path(f"/proc/{found[1]}").exists():
                multiprocess.mark_process_dead(int(found[1]))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(self._files))
        registry.register(_OfCache(self._cache))
        text: bytes = generate_latest(registry)
        return text


class _OfCache:
    """The figures that the cache has about its memory and disk, common to all processes."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Any]:
        """Give one gauge for each figure."""
        stats = self._cache.stats()
        for tier in ("memory", "disk"):
            for name, value in sorted((stats[tier] or {}).items()):
                if isinstance(value, int | float):
                    name = name.removeprefix(f"{tier}_")
                    yield GaugeMetricFamily(f"kvstrata_cache_{tier}_{name}", f"{name} of the {tier} tier.", value)
