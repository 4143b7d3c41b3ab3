"""Damage to any file of a closed cache costs hits: no exception, no wrong value, and it goes on working."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.processes import SOAK, Process

import kvstrata
from kvstrata.errors import FormatError

OPTIONS = {"memory": "2MiB", "disk": "16MiB"}
SIZES = [0, 1, 100, 4096, 5000, 65_535, 65_536, 200_000]
NAMES = ["default", "mutable", "immutable"]
LOST = b"this must not come back"

# Offsets and lengths of the fields of a record's header, as docs/format.md has them.
FIELDS = {
    "magic": (0, 4), "format": (4, 1), "codec": (5, 1), "flags": (6, 1), "tag_check": (7, 1), "key_len": (8, 2),
    "payload_offset": (10, 2), "ns": (12, 4), "version": (16, 4), "epoch": (20, 4), "seq": (24, 8),
    "expires": (32, 8), "value_len": (40, 8), "stored_len": (48, 8), "payload_crc": (56, 4), "header_crc": (60, 4),
    "key": (64, 8),
}  # fmt: skip


def key_name(number: int) -> bytes:
    return b"key %04d" % number + b"." * (number % 3 * 30)


def value_of(name: str, number: int) -> bytes:
    return random.Random(f"{name} {number}").randbytes(SIZES[number % len(SIZES)])


def namespaces(cache: kvstrata.Cache) -> dict[str, kvstrata.Namespace]:
    return {
        name: cache if name == "default" else cache.namespace(name, immutable=name == "immutable") for name in NAMES
    }


class Template(NamedTuple):
    """A directory that is copied for each case, and how it came about."""

    directory: Path
    count: int = 3 * len(SIZES)  # of keys in each namespace


FILL = """
from test_damage import LOST, NAMES, Template, key_name, namespaces, value_of
cache = kvstrata.open(directory, **options)
spaces = namespaces(cache)
for name, ns in spaces.items():
    ns.put_many({key_name(i): value_of(name, i) for i in range(count)})
cleared = cache.namespace("cleared")
cleared.put_many({key_name(i): LOST for i in range(10)})
spaces["mutable"].put_many({b"deleted %d" % i: LOST for i in range(10)})
spaces["mutable"].put_many({b"overwritten %d" % i: LOST for i in range(10)})
cache.flush()
cleared.clear()
for i in range(10):
    spaces["mutable"].delete(b"deleted %d" % i)
spaces["mutable"].put_many({b"overwritten %d" % i: b"new" for i in range(10)})
cache.flush()
"""


@pytest.fixture(scope="module", params=["closed", "killed"])
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A cache that was closed, or one whose processes were killed and whose shared memory is gone."""
    template = Template(tmp_path_factory.mktemp(request.param) / "cache")
    with Process(KVSTRATA_SHM_DIR=str(template.directory.parent)) as process:
        process.run(FILL, directory=template.directory, options=OPTIONS, count=template.count)
        if request.param == "closed":
            process.run("cache.close()")
        else:
            process.kill()
    return template


@pytest.fixture
def copy() -> Iterator[Path]:
    """Where the damaged copies go: in memory, so that nothing here waits for a disk."""
    with tempfile.TemporaryDirectory(prefix="test-of-kvstrata-", dir="/dev/shm") as directory:
        yield Path(directory) / "cache"


Damage = Callable[[Path], None]


Values = dict[tuple[str, bytes], bytes]


def values_there(cache: kvstrata.Cache, expected: Values) -> int:
    """Count the values that are there, none of which may be wrong."""
    spaces = namespaces(cache)
    found = 0
    for (name, key), value in expected.items():
        got = spaces[name].get(key)
        assert got in (None, value), f"{name} {key!r} has a wrong value"
        found += got is not None
    return found


def put_all(cache: kvstrata.Cache, expected: Values) -> None:
    for name, ns in namespaces(cache).items():
        ns.put_many({key: value for (of, key), value in expected.items() if of == name})
    cache.flush()
    cache.demote()


def check(template: Template, directory: Path, damage: Damage) -> int:
    """Open a damaged copy and use it; returns how many values were still there."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(template.directory, directory)
    damage(directory)
    expected = {(name, key_name(i)): value_of(name, i) for name in NAMES for i in range(template.count)}
    found = 0
    with kvstrata.open(directory, **OPTIONS) as cache:
        found = values_there(cache, expected)
        mutable = cache.namespace("mutable")
        assert mutable.get_many([b"deleted %d" % i for i in range(10)]) == [None] * 10
        assert set(mutable.get_many([b"overwritten %d" % i for i in range(10)])) <= {None, b"new"}
        assert cache.namespace("cleared").get_many([key_name(i) for i in range(10)]) == [None] * 10
        put_all(cache, expected)
        assert values_there(cache, expected) == len(expected)
    with kvstrata.open(directory, **OPTIONS) as cache:
        # What was not met in the first session may have cost it what it stored.
        if values_there(cache, expected) < len(expected):
            put_all(cache, expected)
    with kvstrata.open(directory, **OPTIONS) as cache:
        assert values_there(cache, expected) == len(expected)
    return found


def files(template: Template) -> list[str]:
    return sorted(path.name for path in template.directory.iterdir())


def flip(name: str, offset: int, mask: int = 0xFF) -> Damage:
    def damage(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[offset] ^= mask
        (directory / name).write_bytes(data)

    return damage


def records(template: Template) -> Iterator[tuple[str, int, int]]:
    """Yield file, offset and key length of every record of a key of ours."""
    for file in sorted(template.directory.glob("*.kvs")):
        data = file.read_bytes()
        for offset in range(0, len(data), 64):
            if data[offset : offset + 4] == b"KVSR" and data[offset + 64 : offset + 68] == b"key ":
                yield file.name, offset, int.from_bytes(data[offset + 8 : offset + 10], "little")


def test_without_damage_everything_is_there(shm: Path, template: Template, copy: Path) -> None:
    assert check(template, copy, lambda _: None) == len(NAMES) * template.count


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_byte_in_any_field_of_a_record(shm: Path, template: Template, copy: Path, field: str) -> None:
    start, length = FIELDS[field]
    there = list(records(template))
    assert len(there) > 2 * template.count
    choose = random.Random(field)
    for _ in range(SOAK):
        file, offset, _ = choose.choice(there)
        damage = flip(file, offset + start + choose.randrange(length), 1 << choose.randrange(8))
        found = check(template, copy, damage)
        assert found >= len(NAMES) * template.count - 1


def test_flipped_bytes_in_payloads_and_padding(shm: Path, template: Template, copy: Path) -> None:
    there = list(records(template))
    choose = random.Random(1)

    def damage(directory: Path) -> None:
        for file, offset, key_length in choose.sample(there, 10):
            flip(file, offset + 64 + key_length + choose.randrange(64))(directory)

    for _ in range(SOAK):
        assert check(template, copy, damage) >= len(NAMES) * template.count - 10


def test_flipped_bytes_in_any_file(shm: Path, template: Template, copy: Path) -> None:
    choose = random.Random(2)
    for name in files(template):
        size = (template.directory / name).stat().st_size
        offsets = {choose.randrange(min(size, limit)) for limit in (64, 4096, size) for _ in range(2 * SOAK) if size}
        for offset in sorted(offsets):
            try:
                check(template, copy, flip(name, offset, 1 << choose.randrange(8)))
            except FormatError:
                assert name == "identity.json"  # which has one byte that says its format, and no checksum
            except BaseException as error:
                error.add_note(f"{name}, byte {offset} of {size}")
                raise


@pytest.mark.parametrize("how", ["halved", "emptied", "vanished", "overwritten", "longer"])
def test_any_file_cut_short_or_gone(shm: Path, template: Template, copy: Path, how: str) -> None:
    choose = random.Random(how)
    for name in files(template):

        def damage(directory: Path, name: str = name) -> None:
            path = directory / name
            data = path.read_bytes()
            match how:
                case "halved":
                    path.write_bytes(data[: len(data) // 2])
                case "emptied":
                    path.write_bytes(b"")
                case "vanished":
                    path.unlink()
                case "overwritten":
                    path.write_bytes(choose.randbytes(len(data)))
                case "longer":
                    path.write_bytes(data + choose.randbytes(5000))

        try:
            check(template, copy, damage)
        except BaseException as error:
            error.add_note(f"{name} {how}")
            raise


def test_everything_overwritten_at_once(shm: Path, template: Template, copy: Path) -> None:
    def damage(directory: Path) -> None:
        for path in directory.iterdir():
            path.write_bytes(random.Random(3).randbytes(path.stat().st_size))

    assert check(template, copy, damage) == 0
