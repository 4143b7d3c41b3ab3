"""The engines of the disk side by side, with many values of 256 B: python -m benchmarks.own.engines [--quick]."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kvstrata

VALUE_BYTES = 256
AT_ONCE = 1000
ENGINES = ("log", "lsm", "btree")


def _status(field: str) -> int:
    """Return a field of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _value(i: int) -> bytes:
    return i.to_bytes(8, "little") * (VALUE_BYTES // 8)


def measure(engine: str, records: int, directory: Path, memory: str = "256MiB") -> dict[str, Any]:
    """Put, get and miss that many records; times in us per record, sizes in bytes. In a process of its own."""
    chosen: Any = engine
    disk = max(64 << 20, records * VALUE_BYTES * 6)
    with kvstrata.open(directory, memory=memory, disk=disk, disk_engine=chosen) as cache:
        started = time.perf_counter()
        for start in range(0, records, AT_ONCE):
            cache.put_many({f"key{i}": _value(i) for i in range(start, start + AT_ONCE)})
        cache.flush(600.0)
        put_us = (time.perf_counter() - started) / records * 1e6
        step = max(1, records // 20_000)
        wanted = list(range(0, records, step))
        started = time.perf_counter()
        hits = 0
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            for i, found in zip(some, cache.get_many([f"key{i}" for i in some]), strict=True):
                if found is not None:
                    hits += 1
                    if found != _value(i):
                        raise AssertionError(f"key{i} has another value")
        get_us = (time.perf_counter() - started) / len(wanted) * 1e6
        started = time.perf_counter()
        for i in range(10_000):
            cache.get(f"absent{i}")
        miss_us = (time.perf_counter() - started) / 10_000 * 1e6
        used = sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())
        if engine == "btree":
            used = int((cache.stats()["disk"] or {})["used_bytes"])
        return {
            "engine": engine, "records": records, "put_us": round(put_us, 2), "get_us": round(get_us, 2),
            "hit_rate": round(hits / len(wanted), 4), "miss_us": round(miss_us, 2),
            "private_bytes": _status("RssAnon"), "shared_bytes": _status("RssShmem"),
            "disk_bytes_per_record": round(used / records, 1),
        }  # fmt: skip


def main() -> None:
    """Measure each engine in a process of its own, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 records")
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--directory", type=Path, help="where to put them; a temporary directory otherwise")
    given = parser.parse_args()
    records = 20_000 if given.quick else given.records // AT_ONCE * AT_ONCE
    if given.engine:
        with tempfile.TemporaryDirectory(dir=given.directory) as place:
            print(json.dumps(measure(given.engine, records, Path(place))), flush=True)
        return
    for engine in ENGINES:
        command = [sys.executable, "-m", "benchmarks.own.engines", "--engine", engine, "--records", str(records)]
        subprocess.run(command + (["--directory", str(given.directory)] if given.directory else []), check=True)


if __name__ == "__main__":
    main()
