"""Measure, print the table, write it down.

python -m benchmarks [NAMES...] [--quick] [--markdown FILE] [--directory DIR]
"""

from __future__ import annotations

from benchmarks.running import command

# In the order of the table. Imported when asked for: codecs and ttft need torch and transformers.
PARTS = {
    "memory": "benchmarks.own.memory",
    "policies": "benchmarks.own.policies",
    "objects": "benchmarks.own.objects",
    "codecs": "benchmarks.own.codecs",
    "scaling": "benchmarks.own.scaling",
    "peers": "benchmarks.own.peers",
    "disk": "benchmarks.own.disk",
    "tiered": "benchmarks.own.tiered",
    "disk-peers": "benchmarks.own.disk_peers",
    "remote": "benchmarks.own.remote",
    "pipeline": "benchmarks.own.pipeline",
    "ttft": "benchmarks.own.ttft",
}

if __name__ == "__main__":
    command(
        PARTS, "Measure kvstrata beside raw memory, the raw device and its peers.", title="Benchmarks", target="bench"
    )
