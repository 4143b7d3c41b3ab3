"""Which segment goes first when a disk tier is full, and what of it is kept.

Segments of which most is dead (deleted, overwritten, expired) go before all others, and what is left of them is
written anew. Then it's by the policy: "fifo", the oldest; "lru", the oldest, but what was used since it was written
gets a second chance and is written anew; "ttl", the one that expires first. Written anew is at most a quarter of a
segment, so what cleaning costs in writes is bounded. After Rosenblum and Ousterhout, "The design and implementation of
a log-structured file system" (1992), and CacheLib's re-insertion (Berg et al., 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstrata.errors import CorruptRecord, FormatError
from kvstrata.record import LARGE_PAYLOAD, PAGE, parse_record
from kvstrata.tiers.blockio import Read, aligned_buffer, page_ceil
from kvstrata.tiers.catalog import Catalog, Move
from kvstrata.tiers.counters import Counters
from kvstrata.tiers.ledger import Ledger
from kvstrata.tiers.segments import Segment, SegmentSet

if TYPE_CHECKING:
    from kvstrata._core import Store

__all__ = ["Cleaner"]

_KEPT = 4  # one part in so many of a segment is written anew at most; with less alive it counts as mostly dead
_AT_ONCE = 4 << 20  # bytes of memory that it takes


class _Row(NamedTuple):
    """A record that still counts, and where it lies; offset and length in bytes."""

    ns: int
    key: bytes
    seq: int
    offset: int
    length: int
    version: int
    epoch: int
    tags: int


class _Kept(NamedTuple):
    """A record on its way into another segment."""

    row: _Row
    view: memoryview

    @property
    def ns(self) -> int:
        return self.row.ns

    @property
    def version(self) -> int:
        return self.row.version

    @property
    def epoch(self) -> int:
        return self.row.epoch

    @property
    def length(self) -> int:
        return self.row.length


class Cleaner:
    """Chooses segments for a disk tier and writes anew what is to be kept of them.

    `may_write(bytes)` says whether the device may be given so much more.
    """

    def __init__(
        self,
        policy: str,
        store: Store,
        segments: SegmentSet,
        catalog: Catalog,
        ledger: Ledger,
        counters: Counters,
        may_write: Callable[[int], bool],
    ) -> None:
        self._policy = policy
        self._store = store
        self._segments = segments
        self._catalog = catalog
        self._ledger = ledger
        self._counters = counters
        self._may_write = may_write

    def order(self, segments: Sequence[Segment]) -> list[Segment]:
        """Return the segments, those that should go first in front."""
        in_use = {use[0]: use for use in self._store.segments_in_use()}

        def rank(segment: Segment) -> tuple[int, int, int]:
            _, _, alive, _, last_expiry = in_use.get(segment.number, (0, 0, 0, 0, 0))
            if alive * _KEPT <= segment.size:
                return 0 if alive == 0 else 1, 0, segment.number
            return 2, last_expiry if self._policy == "ttl" else 0, segment.number

        return sorted(segments, key=rank)

    def keep_some(self, number: int) -> None:
        """Write anew what is to be kept of a segment that is about to go. The ledger must not be held.

        Raises OSError and TierError.
        """
        size = next((segment.size for segment in self._segments.all() if segment.number == number), 0)
        rows = [_Row(*row) for row in self._store.rows_of(number, False)]
        mostly_dead = sum(row.length for row in rows) * _KEPT <= size
        if not mostly_dead:
            rows = [_Row(*row) for row in self._store.rows_of(number, True)] if self._policy == "lru" else []
        rows.sort(key=lambda row: -row.offset)  # the newest first
        allowed = size // _KEPT
        chosen = []
        for row in rows:
            if row.length <= allowed and self._may_write(row.length):
                allowed -= row.length
                chosen.append(row)
        chosen.sort(key=lambda row: row.offset)
        for batch in _batches(chosen):
            self._move(number, batch)

    def _move(self, number: int, rows: list[_Row]) -> None:
        left = self._read(number, rows)
        while left:
            segment, offsets = self._segments.append(left, hold=True)
            moved, left = left[: len(offsets)], left[len(offsets) :]
            try:
                self._moved(number, moved, segment, offsets)
            finally:
                self._segments.release(segment)

    def _moved(self, number: int, moved: list[_Kept], segment: int, offsets: list[int]) -> None:
        """Commit that records lie elsewhere now, and tell the index."""
        moves: list[Move] = [
            (segment, to, row.ns, row.key, row.seq, number, row.offset)
            for (row, _), to in zip(moved, offsets, strict=True)
        ]
        for start in range(0, len(moves), self._catalog.batch_rows):
            part = moves[start : start + self._catalog.batch_rows]
            with self._ledger.hold():  # whoever drops the segment between would leave rows that the index doesn't know
                # The rows first: what the index says is followed, and it must not point to what a restart doesn't know.
                self._catalog.move(part)
                for to_segment, to, ns, key, seq, from_segment, offset in part:
                    if self._store.move_on_disk(ns, key, seq, from_segment, offset, to_segment, to):
                        self._counters.add("reinserted_records")
        self._counters.add("reinserted_bytes", sum(kept.length for kept in moved))

    def _read(self, number: int, rows: list[_Row]) -> list[_Kept]:
        """Return the records that are there and in order."""
        buffer = aligned_buffer(max(PAGE, page_ceil(sum(_room(row) for row in rows))))
        views: list[memoryview] = []
        at = 0
        for row in rows:
            views.append(buffer[at : at + row.length])
            at += _room(row)
        there = [False] * len(rows)

        def done(index: int, error: int) -> None:
            there[index] = error == 0

        self._segments.read([Read(number, row.offset, view) for row, view in zip(rows, views, strict=True)], done)
        return [
            _Kept(row, view)
            for row, view, read in zip(rows, views, there, strict=True)
            if read and self._is_sound(row, view)
        ]

    def _is_sound(self, row: _Row, view: memoryview) -> bool:
        try:
            found = parse_record(view, seed=self._store.seed)
        except (CorruptRecord, FormatError):
            return False
        return (found.ns, found.key, found.seq, found.length) == (row.ns, row.key, row.seq, row.length)


def _room(row: _Row) -> int:
    """Bytes that a record takes in a buffer from which it can be written without a copy."""
    return page_ceil(row.length) if row.length >= PAGE + LARGE_PAYLOAD else row.length


def _batches(rows: list[_Row]) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    total = 0
    for row in sorted(rows, key=lambda row: row.length < PAGE + LARGE_PAYLOAD):  # those on pages first
        if batch and total + row.length > _AT_ONCE:
            yield batch
            batch, total = [], 0
        batch.append(row)
        total += row.length
    if batch:
        yield batch
