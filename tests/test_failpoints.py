"""A process dies at each place in the core where a death leaves something half done; the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.failpoints import NAMES, build
from support.processes import SOAK, Process
from test_kill import RECLAIM

OPTIONS = {"memory": "2MiB", "disk": "16MiB"}
COUNTDOWNS = [0, 25]

# Workers come by everywhere but at these places, which take a history of their own.
ONLY_WHEN_MANY_KEYS_ARE_PUT = {"allocator.chunk", "index.split", "store.forgotten"}
ONLY_WHEN_A_NAMESPACE_IS_MADE = {"store.defined"}
ONLY_WHEN_A_VERSION_IS_OPENED = {"store.epoch"}
ONLY_WHEN_THE_INDEX_IS_RESTORED = {"store.row"}
ONLY_WHEN_A_POLICY_GETS_SCRATCH_MEMORY = {"scratch.left", "scratch.placed"}
ONLY_WHEN_A_SEGMENT_IS_CLEANED = {"store.moved"}
SPECIAL = (
    ONLY_WHEN_MANY_KEYS_ARE_PUT
    | ONLY_WHEN_A_NAMESPACE_IS_MADE
    | ONLY_WHEN_A_VERSION_IS_OPENED
    | ONLY_WHEN_THE_INDEX_IS_RESTORED
    | ONLY_WHEN_A_POLICY_GETS_SCRATCH_MEMORY
    | ONLY_WHEN_A_SEGMENT_IS_CLEANED
)

OPEN = "cache = kvstrata.open(directory / 'cache', **options)"


@pytest.fixture(scope="module")
def core() -> Path:
    return build()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SPECIAL])
def test_a_death_at_any_point_harms_nobody_else(core: Path, shm: Path, tmp_path: Path, name: str) -> None:
    with Process(core=core) as process:
        process.run("from support.churn import Boss")
        process.run(
            "with Boss(directory, options, writers=2, readers=1, seed=seed) as boss:\n"
            "    for countdown in countdowns:\n"
            "        boss.end(0, signal.SIGTERM, 0)\n"
            "        boss.hire(0, f'{name}:{countdown}')\n"
            "        boss.await_end(0, -signal.SIGKILL)\n"
            "        boss.hire(0)\n"
            "    boss.dismiss_all()\n",
            directory=tmp_path,
            options=OPTIONS,
            seed=len(name),
            countdowns=COUNTDOWNS + [100 + 37 * i for i in range(SOAK - 1)],
            name=name,
        )
        assert list(shm.iterdir()) == []
        process.run(RECLAIM)


@pytest.mark.parametrize("name", sorted(ONLY_WHEN_MANY_KEYS_ARE_PUT))
@pytest.mark.parametrize("countdown", COUNTDOWNS)
def test_a_death_while_the_index_grows_or_is_full(
    core: Path, shm: Path, tmp_path: Path, name: str, countdown: int
) -> None:
    variables = {"directory": tmp_path, "options": OPTIONS | {"disk": 0}}
    with Process(core=core) as survivor:
        survivor.run(OPEN, **variables)
        with Process(core=core, KVSTRATA_FAILPOINT=f"{name}:{countdown}") as victim:
            victim.run(OPEN, **variables)
            victim.start("for i in range(100_000): cache.put(b'%d' % i + b'.' * (i % 3 * 30), b'%d' % i)")
            assert victim.wait() == -9
        survivor.run(
            "for i in range(30_000):\n"
            "    assert cache.get(b'%d' % i + b'.' * (i % 3 * 30)) in (None, b'%d' % i)\n"
            "for i in range(30_000):\n"
            "    cache.put(b'%d' % i + b'.' * (i % 3 * 30), b'%d' % i)\n"
            "    assert cache.get(b'%d' % i + b'.' * (i % 3 * 30)) == b'%d' % i\n"
            "cache.close()\n" + RECLAIM
        )


def test_a_death_while_a_namespace_is_made_gives_no_two_names_the_same_one(
    core: Path, shm: Path, tmp_path: Path
) -> None:
    variables = {"directory": tmp_path, "options": OPTIONS | {"disk": 0}}
    with Process(core=core) as survivor, Process(core=core, KVSTRATA_FAILPOINT="store.defined") as victim:
        survivor.run(OPEN, **variables)
        victim.run(OPEN, **variables)
        victim.start("cache.namespace('a', immutable=True)")
        assert victim.wait() == -9
        survivor.run("b, c = cache.namespace('b'), cache.namespace('c'); b.put('key', b'of b')")
        assert survivor.eval("c.get('key')") is None
        survivor.run("a = cache.namespace('a', policy='sieve'); a.put('key', b'of a')")  # with its options chosen anew
        assert survivor.eval("a.get('key'), b.get('key')") == (b"of a", b"of b")


def test_a_death_while_a_newer_version_is_opened_shows_it_no_older_records(
    core: Path, shm: Path, tmp_path: Path
) -> None:
    variables = {"directory": tmp_path, "options": OPTIONS | {"disk": 0}}
    with Process(core=core) as survivor, Process(core=core, KVSTRATA_FAILPOINT="store.epoch") as victim:
        survivor.run(OPEN + "; cache.namespace('versioned', version=1).put('key', b'old')", **variables)
        victim.run(OPEN, **variables)
        victim.start("cache.namespace('versioned', version=2)")
        assert victim.wait() == -9
        assert survivor.eval("cache.namespace('versioned', version=2).get('key')") is None


@pytest.mark.parametrize("countdown", COUNTDOWNS)
def test_a_death_while_the_index_is_restored_costs_nothing(
    core: Path, shm: Path, tmp_path: Path, countdown: int
) -> None:
    variables = {"directory": tmp_path, "options": OPTIONS}
    with Process(core=core) as process:
        process.run(OPEN, **variables)
        process.run("cache.put_many({b'%d' % i + b'.' * 50: b'%d' % i for i in range(100)}); cache.close()")
        with Process(core=core, KVSTRATA_FAILPOINT=f"store.row:{countdown}") as victim:
            victim.start(OPEN, **variables)
            assert victim.wait() == -9
        process.run(OPEN)
        process.run(
            "assert cache.get_many([b'%d' % i + b'.' * 50 for i in range(100)]) == [b'%d' % i for i in range(100)]"
        )
        process.run("cache.close()\n" + RECLAIM)


@pytest.mark.parametrize("name", sorted(ONLY_WHEN_A_POLICY_GETS_SCRATCH_MEMORY))
@pytest.mark.parametrize(
    ("policy", "countdown"),
    [("lfu", 0), *((policy, n) for policy in ("w-tinylfu", "s3-fifo", "gdsf", "auto") for n in (0, 1, 3))],
)
def test_a_death_while_a_policy_gets_scratch_memory_harms_nobody_else(
    core: Path, shm: Path, tmp_path: Path, name: str, countdown: int, policy: str
) -> None:
    variables = {"directory": tmp_path, "options": OPTIONS | {"disk": 0}, "policy": policy}
    with Process(core=core) as survivor:
        survivor.run(OPEN, **variables)
        with Process(core=core, KVSTRATA_FAILPOINT=f"{name}:{countdown}") as victim:
            victim.run(OPEN, **variables)
            victim.start(
                "ns = cache.namespace('of policy', policy=policy)\nfor i in range(10_000): ns.put(b'%d' % i, b'%d' % i)"
            )
            assert victim.wait() == -9
        survivor.run(
            "ns = cache.namespace('of policy', policy=policy)\n"
            "for i in range(10_000):\n"
            "    assert ns.get(b'%d' % i) in (None, b'%d' % i)\n"
            "for i in range(10_000):\n"
            "    ns.put(b'%d' % i, b'%d' % i)\n"
            "    assert ns.get(b'%d' % i) == b'%d' % i\n"
            "cache.close()\n" + RECLAIM
        )


@pytest.mark.parametrize("countdown", COUNTDOWNS)
def test_a_death_while_what_was_used_is_moved_out_of_a_segment_serves_nobody_another_value(
    core: Path, shm: Path, tmp_path: Path, countdown: int
) -> None:
    variables = {"directory": tmp_path, "options": OPTIONS | {"disk": "8MiB", "disk_policy": "lru"}}
    values = "def value(i): return b'%d ' % i * 2000\ndef key(i): return b'%d' % i\n"
    with Process(core=core) as survivor:
        survivor.run(values + OPEN, **variables)
        with Process(core=core, KVSTRATA_FAILPOINT=f"store.moved:{countdown}") as victim:
            victim.run(values + OPEN, **variables)
            victim.start(
                "for i in range(10_000):\n"
                "    cache.put(key(i), value(i))\n"
                "    if i % 20 == 0:\n"
                "        cache.flush(); cache.demote()\n"
                "        for j in range(max(0, i - 300), i, 3): cache.get(key(j))\n"
            )
            assert victim.wait() == -9
        survivor.run(
            "for i in range(10_000): assert cache.get(key(i)) in (None, value(i))\n"
            "for i in range(1000): cache.put(key(i), value(i))\n"
            "cache.flush()\n"
            "for i in range(10_000): assert cache.get(key(i)) in (None, value(i))\n"
            "cache.close()\n" + RECLAIM
        )
