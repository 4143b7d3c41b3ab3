"""Processes are killed at random moments while others go on reading and writing, and checking what they see."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import SOAK, Process

CONFIGURATIONS = {
    "memory": {"memory": "2MiB", "disk": 0},
    "memory and disk": {"memory": "2MiB", "disk": "16MiB"},
}

CHURN = """
from support.churn import Boss
with Boss(directory, options, writers=4, readers=1, seed=seed) as boss:
    boss.kill_some(kills)
    if end == "killed":
        boss.kill_all()
    else:
        boss.dismiss_all()
"""

# Everything that dead processes had pinned, reserved or half removed must be usable again.
RECLAIM = """
cache = kvstrata.open(directory / "cache", **options)
cache.flush()  # what the dead had yet to write is written by us
stats = cache.stats()["memory"]
assert (stats["clients"], stats["pins"], stats["reservations"], stats["allocator_faults"]) == (1, 0, 0, 0), stats
for writer in range(4):
    cache.namespace(f"of writer {writer}").clear()
for size in (1000, 3000, 30_000, 150_000):
    cache.clear()
    cache.put_many({f"{size} {i}": bytes(size) for i in range(2 * cache.options.memory // size)})
    cache.flush()
    stats = cache.stats()["memory"]
    # Of the largest only 13 fit; how many do depends on where the first ones found room.
    assert stats["memory_used_bytes"] > (0.8 if size < 100_000 else 0.6) * stats["memory_bytes"], stats
everything = bytes(cache.options.memory - 8192)
cache.put("everything", everything)
assert cache.get("everything") == everything
assert cache.stats()["memory"]["allocator_faults"] == 0
cache.close()
"""


@pytest.mark.parametrize("end", ["killed", "dismissed"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_kills_at_random_moments_harm_nobody_else(shm: Path, tmp_path: Path, configuration: str, end: str) -> None:
    case = 2 * list(CONFIGURATIONS).index(configuration) + (end == "killed")
    for round_number in range(SOAK):
        with Process() as process:
            process.run(
                CHURN,
                directory=tmp_path,
                options=CONFIGURATIONS[configuration],
                seed=4 * round_number + case,  # the policies, too
                kills=40,
                end=end,
            )
            assert end == "killed" or list(shm.iterdir()) == []
            process.run(RECLAIM)
        assert list(shm.iterdir()) == []
