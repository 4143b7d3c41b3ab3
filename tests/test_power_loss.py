"""What the disk tier keeps when power is lost, in any state that the file system may then leave it in.

The promise: nothing comes back that was deleted, overwritten, cleared or of an older version before, whatever has been
synced. What was there at a sync is there after it, unless mutable records were removed since: then these are lost, and
the immutable ones are not.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.power import Recording, build_library, lay_out
from support.processes import SOAK, Process
from support.values import serial_of
from test_disk import Host

import kvstrata
from kvstrata.tiers import ledger
from kvstrata.tiers.disk import SYNC_S
from kvstrata.tiers.ledger import Ledger, Mark

KEYS = 12
OPTIONS = {"memory": "2MiB", "disk": "8MiB", "shared": False}

# Every operation has a number and says when it starts and when it has returned. Keys of the immutable namespace are
# never put with another value.
WORKLOAD = """
import random
from kvstrata.tiers.ledger import Ledger, Mark
from test_disk import Host
from support.power import mark
from support.values import SMALLEST, make_value
rng = random.Random(seed)
number = 0
version = 1
def opened():
    global cache, spaces
    cache = kvstrata.open(root, **options)
    spaces = {
        "mutable": cache.namespace("mutable", version=version),
        "immutable": cache.namespace("immutable", immutable=True),
    }
def raise_version(number):
    global version
    version += 1
    spaces["mutable"] = cache.namespace("mutable", version=version)
def do(ns, key, how, call):
    global number
    number += 1
    mark(root, at="start", number=number, ns=ns, key=key, how=how)
    call(number)
    mark(root, at="done", number=number, ns=ns, key=key, how=how)
def put(ns, key):
    size = rng.choice([SMALLEST, 500, 5000, 70_000])
    def call(number):
        name = b"%02d" % key
        value = make_value(name, 0 if ns == "immutable" else number, 600 * key + 100 if ns == "immutable" else size)
        spaces[ns].put(name, value, tags=["all"] if ns == "mutable" and key % 2 else None)
    do(ns, key, "put", call)
def remove(ns, key):
    name = b"%02d" % key
    call = rng.choice([spaces[ns].delete, lambda name: spaces[ns].delete_many([name]), spaces[ns].delete_prefix])
    do(ns, key, "delete", lambda number: call(name))
def sync():
    cache.flush()
    mark(root, at="sync", number=number)
    cache.below.tier.sync()
    mark(root, at="synced", number=number)
def some(steps):
    for _ in range(steps):
        ns, key, chosen = rng.choice(list(spaces)), rng.randrange(keys), rng.random()
        if chosen < 0.62:
            put(ns, key)
        elif chosen < 0.82:
            remove(ns, key)
        elif chosen < 0.86:
            do(ns, None, "clear", lambda number: spaces[ns].clear())
        elif chosen < 0.88:
            do("mutable", None, "clear tag", lambda number: spaces["mutable"].delete_tag("all"))
        elif chosen < 0.90:
            do("mutable", None, "version", raise_version)
        elif chosen < 0.96:
            cache.flush()
        else:
            cache.flush()
            cache.demote()
"""
# Rounds of work; what is only put after a sync shows that all of it is kept.
STEADY = """
opened()
for _ in range(5):
    some(12)
    sync()
    for key in range(keys):
        put("immutable", key)
    sync()
    for key in range(4):
        put("immutable", keys + key)
    cache.flush()
    some(12)
cache.close()
opened()
some(10)
cache.flush()
"""
# More than fits, so that segments go; and a catalog that is lost, and made anew of the segments.
CHURNING = """
opened()
for _ in range(4):
    for filler in range(45):
        cache.put(b"filler %d" % filler, bytes(70_000))
    some(15)
    cache.flush()
cache.close()
for file in root.glob("catalog-*"):
    file.unlink()
opened()
some(15)
cache.flush()
"""
# What is deleted as soon as it has gone with its segment: the index knows nothing of it on disk any more.
EVICTED = """
opened()
filler = cache.namespace("filler", immutable=True)
for round_number in range(6):
    for key in range(keys):
        put("immutable", key)
    cache.flush()
    cache.demote()
    cache.below.tier.sync()
    left = set(range(keys))
    i = 0
    while left:
        i += 1
        filler.put(b"%d %d" % (round_number, i), bytes(70_000))
        cache.flush()
        for key in [key for key in left if b"%02d" % key not in spaces["immutable"]]:
            left.remove(key)
            do("immutable", key, "delete", lambda number: spaces["immutable"].delete(b"%02d" % key))
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library("record_io", tmp_path_factory.mktemp("library"))


def record(recorder: Path, directory: Path, script: str, seed: int) -> Recording:
    root, log = directory / "cache", directory / "log"
    root.mkdir()
    options = OPTIONS if script is STEADY else OPTIONS | {"disk": "4MiB"}
    environment = {"LD_PRELOAD": str(recorder), "RECORD_ROOT": str(root), "RECORD_LOG": str(log)}
    with Process(**environment) as process:
        process.run(WORKLOAD, root=root, options=options, seed=seed, keys=KEYS)
        process.run(script)
        recording = Recording(log, root)
        process.kill()
    return recording


@pytest.fixture
def loses_power(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What is opened next is opened after another start of the machine."""
    boots = itertools.count(1)

    def boot() -> None:
        this = next(boots).to_bytes(16, "little")
        monkeypatch.setattr(ledger, "boot_id", lambda: this)
        monkeypatch.setattr("kvstrata.tiers.catalog_file.boot_id", lambda: this)

    return boot


def images(recording: Recording, chance: random.Random, count: int) -> Iterator[tuple[str, int, Any]]:
    """Yield what to call an image, how many operations led to it, and its files.

    Some are left just before something is synced or just after it, others anywhere.
    """
    for number in range(count):
        anywhere = chance.randrange(1, len(recording.operations) + 1)
        at = chance.choice([chance.choice(recording.sync_points()), anywhere])
        kept = chance.choice([0.0, 0.1, 0.5, 0.9])
        torn = chance.choice([512, 4096, 1 << 40])
        whole = number % 7 == 0
        told = f"image {number}, after {at} operations: {'all' if whole else f'{kept:g}, torn at {torn}'}"
        yield told, at, recording.image(at, None if whole else chance, kept=kept, torn=torn)


class Said:
    """What had been said when power was lost."""

    def __init__(self, recording: Recording, at: int) -> None:
        self.events = [what for when, what in recording.marks if when <= at]
        synced = [i for i, what in enumerate(self.events) if what["at"] == "synced"]
        self.synced = synced[-1] if synced else None
        begun = [i for i, what in enumerate(self.events) if what["at"] == "sync" and synced and i < synced[-1]]
        self.begun = begun[-1] if begun else 0

    def check(self, ns: str, key: int, value: bytes | None) -> None:
        """Fail if this value must not be there."""
        if value is None:
            return
        number = serial_of(b"%02d" % key, value)
        mine = [what for what in self.events if what.get("ns") == ns and what.get("key") in (key, None)]
        if ns == "immutable":  # its value tells no number
            last_removed = max(
                (i for i, what in enumerate(mine) if _removes(what) and what["at"] == "done"), default=-1
            )
            last_put = max((i for i, what in enumerate(mine) if what["how"] == "put"), default=-1)
            assert last_put > last_removed, "was deleted"
            return
        done = [what for what in mine if what["at"] == "done"]
        put = max((what["number"] for what in done if what["how"] == "put"), default=0)
        removed = max((what["number"] for what in done if _removes(what, key)), default=0)
        started = max((what["number"] for what in mine if what["how"] == "put"), default=0)
        assert put <= number, f"has put {number}, which {put} overwrote"
        assert removed < number, f"has put {number}, which {removed} deleted"
        assert number <= started

    def must_be_there(self, ns: str, key: int) -> bool:
        """Whether a sync since has kept the value of this key."""
        if self.synced is None:
            return False
        since = self.events[self.begun :]
        if any(_removes(what) and what["ns"] == ns and what.get("key") in (key, None) for what in since):
            return False
        if ns == "mutable" and any(what.get("ns") == ns for what in since):
            return False
        before = [what for what in self.events[: self.begun] if what.get("ns") == ns and what.get("key") in (key, None)]
        last = [what for what in before if what["how"] == "put" or _removes(what)]
        return bool(last) and last[-1]["how"] == "put" and last[-1]["at"] == "done"


def _removes(what: dict[str, Any], key: int = 1) -> bool:
    how = what.get("how")
    return how in ("delete", "clear", "version") or (how == "clear tag" and key % 2 == 1)


@pytest.mark.parametrize(
    ("script", "seed"),
    [(STEADY, 1), (STEADY, 2), (CHURNING, 3), (EVICTED, 4)],
    ids=["steady", "steady too", "churning", "evicted"],
)
def test_a_power_loss_never_brings_back_what_was_removed_and_keeps_what_was_synced(
    recorder: Path, shm: Path, tmp_path: Path, loses_power: Callable[[], None], script: str, seed: int
) -> None:
    recording = record(recorder, tmp_path, script, seed)
    chance = random.Random(seed)
    copy = tmp_path / "image"
    found = kept = 0
    for told, at, image in images(recording, chance, 110 * SOAK):
        lay_out(image, copy)
        loses_power()
        said = Said(recording, at)
        with kvstrata.open(copy, **OPTIONS) as cache:
            versions = {ns.name: ns.version for ns in cache.below.namespaces()}
            for name in ("mutable", "immutable"):
                ns = cache.namespace(name, immutable=name == "immutable", version=versions.get(name, 1))
                for key in range(KEYS + 4):
                    value = ns.get(b"%02d" % key)
                    found += value is not None
                    try:
                        said.check(name, key, value)
                        if script is STEADY and said.must_be_there(name, key):
                            assert value is not None, "was synced"
                            kept += 1
                    except AssertionError as error:
                        raise AssertionError(f"{told}: {name} {key}: {error}") from error
            cache.put(b"another", b"1")
            cache.flush()
    assert found > 50
    assert kept > 100 or script is not STEADY


def test_all_is_synced_some_time_after_the_first_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    host = Host(tmp_path)
    host.put(b"key", b"value")
    host.flush()
    host.delete(b"key")

    def mark() -> Mark:
        of_another = Ledger(tmp_path)
        with of_another.hold():
            found = of_another.read()
        assert found is not None
        return found

    host.tier.tend()
    assert mark().unsynced
    assert mark().safe < mark().commits
    now += SYNC_S
    host.tier.tend()
    assert not mark().unsynced
    assert mark().safe == mark().commits
    host.close()
