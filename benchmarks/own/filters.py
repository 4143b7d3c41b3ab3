"""A miss through memory, the index of the disk and the filter before a tier elsewhere; what the server notices."""

from __future__ import annotations

import time

import numpy as np

import kvstrata
from benchmarks.measure import Sample, Settings, Work, interleaved
from benchmarks.table import Row

FP_RATE = 0.01
NAMES = 200_000
MISSES = 2000
REMARKS = [
    "Filters: another host has written 200,000 records to Valkey. Misses are of single keys through memory, the index "
    "of the disk and the filter, in a loop in Python. Commands are those that the server itself counts.",
]


def rows(settings: Settings, section: str, path: str) -> list[Row]:
    """Measure against the server whose Unix socket is at `path`."""
    import redis

    names = settings.size(NAMES)
    url = f"unix://{path}?lookup_timeout=10&generation_ttl=3600&prefix=filters"
    filtered = f"{url}&bloom=yes&bloom_refresh=3600&bloom_fp={FP_RATE}"
    with kvstrata.open(settings.directory / "writer", memory="64MiB", disk=0, remote=filtered) as writer:
        for start in range(0, names, 10_000):
            writer.put_many({f"key {i}": b"x" for i in range(start, min(start + 10_000, names))})
            writer.flush()
    client = redis.Redis(unix_socket_path=path)

    def commands() -> int:
        return int(client.info("stats")["total_commands_processed"])

    try:
        with (
            kvstrata.open(settings.directory / "with", memory="64MiB", disk="256MiB", remote=filtered) as cache,
            kvstrata.open(settings.directory / "without", memory="64MiB", disk="256MiB", remote=url) as plain,
        ):
            cache.put_many({f"here {i}": bytes(1000) for i in range(10_000)})
            cache.flush()
            cache.get("absent")
            until = time.monotonic() + 60
            while cache.stats()["remote"][0]["filter_off"]:
                if time.monotonic() > until:
                    raise AssertionError("the filter isn't read")
                time.sleep(0.01)
            asked = [f"nowhere {i}" for i in np.random.default_rng(0).permutation(settings.size(100_000))]

            def spared() -> int:
                return int(cache.stats()["remote"][0]["filtered_lookups"])

            before = spared()
            if any(value is not None for value in cache.get_many(asked)):
                raise AssertionError("a value that nobody put")
            rate = Sample.of(1 - (spared() - before) / len(asked))
            keys: list[str] = []  # of which the filter knows that they aren't there
            for key in asked:
                before = spared()
                cache.get(key)
                if spared() > before:
                    keys.append(key)
                if len(keys) == MISSES:
                    break

            def miss() -> None:
                for key in keys:
                    cache.get(key)

            def ask() -> None:
                for key in keys[:200]:
                    plain.get(key)

            started = commands()
            miss()
            noticed = commands() - started - 1  # the question itself
            one, other = interleaved(Work(miss, MISSES), Work(ask, 200), repeats=settings.repeats(20))
            (batch,) = interleaved(Work(lambda: cache.get_many(keys), MISSES), repeats=settings.repeats(20))
            nbytes = cache.stats()["remote"][0]["filter_bytes"]
    finally:
        client.close()
    return [
        Row(section, "get of what is nowhere, filter", one, "s", "without a filter", other, at_most=5e-6),
        Row(section, f"get_many of {MISSES:,} such, each", batch),
        Row(section, f"commands at the server for {MISSES:,} such", Sample.of(noticed), "", at_most=0),
        Row(
            section,
            "part of absent keys that is asked for",
            rate,
            "%",
            "configured",
            Sample.of(FP_RATE),
            at_most=FP_RATE,
        ),
        Row(section, f"filter, of {names:,} names, each", Sample.of(nbytes / names), "B"),
    ]
