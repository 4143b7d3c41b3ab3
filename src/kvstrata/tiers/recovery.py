"""How a disk tier comes back: after a restart, after a power loss, and when its catalog is lost."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from kvstrata.errors import CorruptRecord, TierFull
from kvstrata.record import IMMUTABLE, TAGGED, NamespaceInfo, parse_descriptor
from kvstrata.tiers.catalog import Catalog, CatalogDamaged
from kvstrata.tiers.segment_format import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from kvstrata._core import Store
    from kvstrata.tiers.catalog import Row
    from kvstrata.tiers.counters import Counters
    from kvstrata.tiers.ledger import Ledger
    from kvstrata.tiers.segments import SegmentSet

__all__ = ["Recovery", "recovered"]

T = TypeVar("T")
log = logging.getLogger("kvstrata.disk")

_BATCH = 4096
_Known = tuple[int, bytes, int, int]
"""ns, key, seq and offset of a record that counts."""


class Recovery:
    """Brings a directory in order, and its catalog, whenever that turns out to be damaged.

    `namespaces`, by number, are what this process knows; they are kept up to date. `make_room(bytes)` is called with
    the ledger held and raises TierFull.
    """

    def __init__(
        self,
        directory: Path,
        store: Store,
        ledger: Ledger,
        catalog: Catalog,
        segments: SegmentSet,
        counters: Counters,
        namespaces: dict[int, NamespaceInfo],
        make_room: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._store = store
        self._ledger = ledger
        self._catalog = catalog
        self._segments = segments
        self._counters = counters
        self._namespaces = namespaces
        self._make_room = make_room
        self._index_counts = True  # what the index says is in use, and wasn't just told by the catalog

    def run(self) -> None:
        """Bring the directory in order and tell a store that is new what lies in it. The ledger must be held."""
        self._index_counts = False
        for leftover in (*self._directory.glob("probe-*.tmp"), *self._directory.glob("hottest.new")):
            leftover.unlink(missing_ok=True)
        mark = self._ledger.read()
        if mark is not None and mark.seed != self._store.seed:
            self._start_over()
        for segment in self._segments.all():
            read_header(self._segments.path_of(segment.number))  # raises FormatError
        try:
            existed = self._catalog.open()
        except CatalogDamaged as damage:
            self._rebuild(damage)
        else:
            if not existed and self._segments.all():
                self._rebuild(CatalogDamaged("there was none"))
        try:
            self._restore()
        except CatalogDamaged as damage:
            self._rebuild(damage)
            for segment in self._segments.all():
                self._store.drop_segment(segment.number)  # what it was told so far
            self._restore()
        try:
            self._make_room(0)
        except TierFull:
            self._drop_everything()
        self._index_counts = True

    def mended(self, call: Callable[[], T]) -> T:
        """Call, and once more after a rebuild if the catalog turns out to be damaged."""
        try:
            return call()
        except CatalogDamaged as damage:
            self._rebuild(damage)
            return call()

    def namespaces(self) -> list[NamespaceInfo]:
        """Return those that the catalog knows; raises TierUnavailable."""
        known = self.mended(self._catalog.load_namespaces)
        self._namespaces.update((info.id, info) for info in known)
        return known

    def _drop_everything(self) -> None:
        """Make the directory as small as can be, for a capacity that the catalog alone would exceed."""
        log.warning("%s: what was stored under a larger capacity doesn't fit; it is dropped", self._directory)
        self.namespaces()
        self._catalog.replace(self._namespaces, [])
        for segment in self._segments.all():
            if not self._segments.is_being_written(segment.number):
                self._store.drop_segment(segment.number)
                self._segments.remove(segment.number)
        self._catalog.discard_others()

    def _start_over(self) -> None:
        log.warning("%s belongs to another cache, whose records can't be checked; they are dropped", self._directory)
        for segment in self._segments.all():
            self._segments.remove(segment.number)
        self._ledger.write(self._ledger.mark()._replace(seed=self._store.seed))
        self._catalog.replace({}, [])

    def _restore(self) -> None:
        """Tell the store what the catalog knows; drop rows without data, and data without rows."""
        mark = self._ledger.mark()
        if mark.unsynced and not mark.is_of_this_boot:
            log.warning("%s: power was lost while records were deleted; the mutable ones are dropped", self._directory)
            self._catalog.drop_mutable()
        for info in self.namespaces():
            self._store.restore_namespace(info.id, info.name, info.version, info.epoch, info.immutable)
        for slot, seq in self._catalog.load_tags():
            self._store.restore_tag(slot, seq)
        self._catalog.drop_stale()
        sizes = {segment.number: segment.size for segment in self._segments.all()}
        ends = dict.fromkeys(sizes, 0)  # bytes up to the last record of each segment
        lost: set[int] = set()
        highest = 0
        for rows in self._catalog.rows():
            there = []
            for row in rows:
                seq, segment, end = row[2], row[3], row[4] + row[5]
                highest = max(highest, seq)
                if end > sizes.get(segment, 0):
                    lost.add(segment)
                    continue
                there.append(row)
                if end > ends[segment]:
                    ends[segment] = end
            self._counters.add("restored_records", self._store.insert_disk(there))
        self._store.raise_seq(highest)
        for number in lost:
            dropped = self._catalog.drop_segment(number, beyond=sizes.get(number, 0))
            self._counters.add("dropped_rows", dropped)
        for number, end in ends.items():
            if self._segments.is_being_written(number):
                continue  # by a process that has another mapping
            if end:
                self._segments.trim(number, end)
            else:
                self._segments.remove(number)

    def _rebuild(self, damage: CatalogDamaged) -> None:
        """Make a new catalog of what the segments say: of immutable records, and of those that the index knows."""
        with self._ledger.hold():
            if self._catalog.is_superseded():
                self._catalog.close()  # another process has done it
                return
            log.warning("%s: the catalog is rebuilt from the segments: %s", self._directory, damage)
            self._counters.add("catalog_rebuilds")
            found = dict(self._namespaces)
            self._catalog.replace(found, recovered(self._segments, found, self._known))
            self._namespaces.update(found)
            self._catalog.drop_stale()
            with contextlib.suppress(TierFull):
                self._make_room(0)

    def _known(self, segment: int) -> Mapping[_Known, int]:
        """Return what the index has of a segment, and its tags: nothing that was removed, whatever became of rows."""
        if not self._index_counts:
            return {}
        rows = self._store.rows_of(segment, False)
        return {(ns, key, seq, offset): tags for ns, key, seq, offset, *_, tags in rows}


def recovered(
    segments: SegmentSet,
    namespaces: dict[int, NamespaceInfo],
    known_of: Callable[[int], Mapping[_Known, int]] = lambda _: {},
) -> Iterator[list[Row]]:
    """Yield, in batches, rows of all immutable records that are found, and fill in `namespaces` by number.

    Mutable records, and those with tags, come back only where `known_of(segment)` has them and their tags: others could
    have been deleted or overwritten. Rows of older epochs and versions are among those that do; which are the newest is
    known at the end. A namespace that is in `namespaces` already keeps its name, and its epoch and version are only
    raised. What a newer segment says of a number or a name counts against an older one.
    """
    numbers = {info.name: info.id for info in namespaces.values()}
    rows: list[Row] = []
    for segment in reversed(segments.all()):
        described: dict[int, NamespaceInfo] = {}
        counting = known_of(segment.number)
        for offset, record, payload in segments.scan(segment.number):
            if payload is not None:
                described.pop(record.ns, None)
                with contextlib.suppress(CorruptRecord):
                    info = parse_descriptor(payload)
                    known = namespaces.get(info.id)
                    is_new = known is None and info.name not in numbers
                    if info.id == record.ns and (is_new or (known is not None and known.name == info.name)):
                        described[info.id] = info
                        namespaces[info.id] = _newest(known or info, info)
                        numbers[info.name] = info.id
                continue
            info_of_record = described.get(record.ns)
            tags = counting.get((record.ns, record.key, record.seq, offset))
            implied = info_of_record is not None and info_of_record.immutable and record.flags & IMMUTABLE
            if tags is not None or (implied and not record.flags & TAGGED):
                rows.append(
                    (
                        record.ns,
                        record.key,
                        record.seq,
                        segment.number,
                        offset,
                        record.length,
                        record.expires,
                        record.version,
                        record.epoch,
                        record.flags,
                        tags or 0,
                    )
                )
                if len(rows) >= _BATCH:
                    yield rows
                    rows = []
    yield rows


def _newest(known: NamespaceInfo, found: NamespaceInfo) -> NamespaceInfo:
    return NamespaceInfo(
        known.id,
        known.name,
        max(known.version, found.version),
        max(known.epoch, found.epoch),
        known.immutable,
    )
