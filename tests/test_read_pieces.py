"""Reading many pieces of a file in one call: neighbours are read together, and each piece has an end of its own."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata import _core

PIECE = 4096
CONTENT = random.Random(0).randbytes(200 * PIECE + 1000)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def content(offset: int, size: int) -> bytes:
    return CONTENT[offset : offset + size]


def test_pieces_come_in_the_order_in_which_they_were_asked_for_wherever_they_lie(fd: int) -> None:
    offsets = [number * PIECE for number in range(190)]  # more side by side than one read takes
    random.Random(1).shuffle(offsets)
    pieces = [(offset, bytearray(PIECE)) for offset in offsets]

    assert _core.read_pieces(fd, pieces) == [0] * len(pieces)

    assert all(buffer == content(offset, PIECE) for offset, buffer in pieces)


def test_gaps_overlaps_and_empty_pieces_are_read_as_asked_for(fd: int) -> None:
    places = [(7, 100), (107, 3), (107, 50), (200, 0), (200, 5000), (100_000, 1), (50, 60)]
    pieces = [(offset, bytearray(size)) for offset, size in places]

    assert _core.read_pieces(fd, pieces) == [0] * len(pieces)

    assert [bytes(buffer) for _, buffer in pieces] == [content(*place) for place in places]


def test_what_lies_beyond_the_end_fails_alone(fd: int) -> None:
    end = len(CONTENT) // PIECE * PIECE
    pieces = [(offset, bytearray(PIECE)) for offset in (end - 2 * PIECE, end, end + PIECE, end - PIECE)]

    assert _core.read_pieces(fd, pieces) == [0, errno.ENODATA, errno.ENODATA, 0]

    assert pieces[0][1] == content(end - 2 * PIECE, PIECE)
    assert pieces[3][1] == content(end - PIECE, PIECE)


def test_an_error_of_the_file_is_that_of_each_piece(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # a directory can't be read
    try:
        assert _core.read_pieces(fd, [(0, bytearray(8)), (8, bytearray(8))]) == [errno.EISDIR] * 2
    finally:
        os.close(fd)


def test_nothing_is_asked_for(fd: int) -> None:
    assert _core.read_pieces(fd, []) == []
