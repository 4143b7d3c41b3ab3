"""What a power loss leaves of a directory: recorded by record_io.c, replayed as far as one likes.

What had been synced is there. What had not may be there or not, each write and each change of the directory by itself,
and of a write any part of so many bytes: so a later one can be there without an earlier one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_HEAD = struct.Struct("<QQQQQQ")
MARKS = "marks"  # the file in which the recorded process says what it does; in no image


class Operation(NamedTuple):
    """One of `record_io.c`; `file` tells files apart, 0 is the directory."""

    what: str
    file: int
    offset: int
    length: int
    name: str
    data: bytes


def build_library(name: str, directory: Path) -> Path:
    """Compile `name`.c, to be loaded before libc; skips where there's no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("standing between a process and its files takes a C compiler, and there is no cc")
    library = directory / f"{name}.so"
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def mark(root: Path, **what: Any) -> None:
    """Say something in the record."""
    with (root / MARKS).open("ab", buffering=0) as file:
        file.write(json.dumps(what).encode())


class Recording:
    """The operations of a process, and the images that a power loss at one of them can leave."""

    def __init__(self, log: Path, root: Path) -> None:
        self.operations: list[Operation] = []
        self.marks: list[tuple[int, dict[str, Any]]] = []  # after how many operations what was said
        self._covered: list[dict[int, int]] = []  # for each number of operations: up to which a file is synced
        self._read(log.read_bytes(), root.stat().st_ino)

    def _read(self, data: bytes, directory: int) -> None:
        files: dict[int, int] = {}  # inode -> file: inodes are used again
        begun: dict[int, int] = {}
        covered: dict[int, int] = {}
        marks = -1
        at = 0
        while at < len(data):
            what, inode, offset, length, names, count = _HEAD.unpack_from(data, at)
            at += _HEAD.size
            name, at = data[at : at + names].decode(), at + names
            content, at = data[at : at + count], at + count
            kind = chr(what)
            if kind == "c":
                files[inode] = len(self.operations) + 1
                if name == MARKS:
                    marks = inode
            if inode and inode == marks:
                if kind == "w":
                    self.marks.append((len(self.operations), json.loads(content)))
                continue
            file = 0 if inode == directory else files.get(inode, 0)
            if kind == "s":
                begun[file] = len(self.operations)
            elif kind == "S":
                covered[file] = max(covered.get(file, 0), begun[file])
            self.operations.append(Operation(kind, file, offset, length, name, content))
            self._covered.append(dict(covered))

    def sync_points(self) -> list[int]:
        """Return after how many operations something was just to be synced, or just was, and the end."""
        found = [i + (operation.what == "S") for i, operation in enumerate(self.operations) if operation.what in "sS"]
        return [*(at for at in found if at), len(self.operations)]

    def image(self, count: int, chance: random.Random | None, *, kept: float, torn: int) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of each file after `count` operations and a power loss.

        Of what wasn't synced a part `kept` is there, in blocks of `torn` bytes; without `chance` all.
        """
        covered = self._covered[count - 1]
        names: dict[str, int] = {}
        contents: dict[int, bytearray] = {}
        for i, (kind, file, offset, length, name, data) in enumerate(self.operations[:count]):
            of_directory = kind in "cru"
            synced = i < covered.get(0 if of_directory else file, 0)
            if chance is not None and not synced and kind != "w" and chance.random() > kept:
                continue
            if kind == "c":
                names[name] = file
            elif kind == "u":
                names.pop(name, None)
            elif kind == "r":
                old, new = name.split("\n")
                if old in names:
                    names[new] = names.pop(old)
            elif kind == "t":
                content = contents.setdefault(file, bytearray())
                del content[offset:]
                content.extend(bytes(offset - len(content)))
            elif kind == "a":
                content = contents.setdefault(file, bytearray())
                content.extend(bytes(max(0, offset + length - len(content))))
            elif kind == "w":
                content = contents.setdefault(file, bytearray())
                if chance is None or synced:
                    _write(content, offset, data)
                    continue
                start = 0
                while start < len(data):
                    end = min(len(data), (offset + start) // torn * torn + torn - offset)
                    if chance.random() < kept:
                        _write(content, offset + start, data[start:end])
                    start = end
        for name, file in names.items():
            if not name.endswith("-shm"):  # a mapping, which SQLite makes anew when nobody has it open
                yield name, bytes(contents.get(file, b""))


def _write(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data


def lay_out(image: Iterator[tuple[str, bytes]], directory: Path) -> None:
    """Make a directory of an image, in place of what is there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in image:
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
