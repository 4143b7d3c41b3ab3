"""Reading many pieces of a file in one call: neighbours are read together, and each piece has an end of its own."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata import _core
from kvstrata.tiers.blockio import aligned_buffer, try_direct

PIECE = 4096
CONTENT = random.Random(0).randbytes(200 * PIECE + 1000)


@pytest.fixture(params=[0, os.O_DIRECT], ids=["cached", "direct"])
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    if request.param and (refusal := try_direct(tmp_path)):
        pytest.skip(f"O_DIRECT is refused here: {refusal}")
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY | request.param)
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


def test_pieces_on_pages_and_others_are_read_in_one_call(fd: int) -> None:
    places = [
        (3 * PIECE, PIECE),
        (4 * PIECE, 2 * PIECE),
        (6 * PIECE + 64, 100),
        (10 * PIECE, PIECE),
        (90 * PIECE, 40 * PIECE),
    ]
    pieces = [(at, aligned_buffer(size) if size % PIECE == 0 else memoryview(bytearray(size))) for at, size in places]
    pieces.append((40 * PIECE, memoryview(bytearray(100 * PIECE))))  # long, and nothing but its memory lies anywhere

    assert _core.read_pieces(fd, pieces) == [0] * len(pieces)

    assert all(buffer == content(at, len(buffer)) for at, buffer in pieces)


def test_what_lies_beyond_the_end_fails_alone(fd: int) -> None:
    end = len(CONTENT) // PIECE * PIECE
    pieces = [(offset, bytearray(PIECE)) for offset in (end - 2 * PIECE, end, end + PIECE, end - PIECE)]

    assert _core.read_pieces(fd, pieces) == [0, errno.ENODATA, errno.ENODATA, 0]

    assert pieces[0][1] == content(end - 2 * PIECE, PIECE)
    assert pieces[3][1] == content(end - PIECE, PIECE)
    assert _core.read_pieces(fd, [(end + 100, bytearray(900)), (end + 100, bytearray(901))]) == [0, errno.ENODATA]


def test_an_error_of_the_file_is_that_of_each_piece(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # a directory can't be read
    try:
        assert _core.read_pieces(fd, [(0, bytearray(8)), (8, bytearray(8))]) == [errno.EISDIR] * 2
    finally:
        os.close(fd)


def test_nothing_is_asked_for(fd: int) -> None:
    assert _core.read_pieces(fd, []) == []
