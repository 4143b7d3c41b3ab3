"""The disk tier: records in segment files, where they lie in the catalog and in the host's index.

It settles every record that it is given and answers every load: what goes wrong below is counted, logged once and
becomes a miss. Only a deletion or a new epoch raises, since it isn't durable then.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kvstrata.errors import CorruptRecord, FormatError, TierFull, TierUnavailable, VersionConflict
from kvstrata.record import PAGE, NamespaceInfo, build_descriptor, parse_record, payload_of
from kvstrata.tiers.base import Key, NamespaceState, Stats
from kvstrata.tiers.blockio import SHORT_READ, Read, aligned_buffer, page_ceil
from kvstrata.tiers.catalog import Catalog, CatalogDamaged
from kvstrata.tiers.ledger import Ledger, after_fork
from kvstrata.tiers.recovery import recovered
from kvstrata.tiers.segments import SegmentSet, read_header, segment_bytes_for

if TYPE_CHECKING:
    from kvstrata._core import DirtyRecord, Pin, Store, Write

__all__ = ["DiskTier"]

T = TypeVar("T")
log = logging.getLogger("kvstrata.disk")

_FIRST_EPOCH = 1  # as in the store
_LOADS_AT_ONCE = 64  # blocks of memory that are claimed before they are filled


class DiskTier:
    """The disk tier of one directory, for all processes that open it. Threads may share one."""

    name = "disk"

    def __init__(
        self, directory: Path, capacity: int, store: Store, *, direct: bool = True, depth: int = 8
    ) -> None:
        """Prepare the tier, `capacity` bytes at most over all files of the directory; `depth` transfers at a time.

        Raises TierUnavailable when the directory can't be used.
        """
        self.directory = directory
        self.capacity = capacity
        self._store = store
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._logged: set[str] = set()
        self._namespaces: dict[int, NamespaceInfo] = {}
        self._making_room = False  # the ledger is held
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ledger = Ledger(directory, seed=store.seed)
            rows = max(8, min(1024, capacity // (64 * 3 * PAGE)))
            wal_bytes = max(64 << 10, min(4 << 20, capacity // 64))
            self._catalog = Catalog(
                directory, self._ledger, room=self._make_room, batch_rows=rows, wal_bytes=wal_bytes
            )
            self._segments = SegmentSet(
                directory,
                seed=store.seed,
                segment_bytes=segment_bytes_for(capacity),
                ledger=self._ledger,
                make_room=self._make_room,
                describe=self._describe,
                direct=direct,
                depth=depth,
            )
        except OSError as error:
            raise TierUnavailable(f"{directory} can't hold a disk tier: {error.strerror or error}") from error
        after_fork(self)

    def recover(self) -> None:
        """Bring the directory in order and tell a store that is new what lies in it.

        Raises FormatError when a newer release wrote it, TierUnavailable when it can't be used.
        """
        try:
            with self._ledger.hold():
                self._recover()
        except OSError as error:
            raise TierUnavailable(f"{self.directory} can't be used: {error.strerror or error}") from error

    def close(self) -> None:
        """Finish the segment that is being written, fold up the catalog and let go of the directory."""
        self._segments.close()
        self._catalog.close()
        self._ledger.close()

    # ---- Namespaces

    def namespaces(self) -> list[NamespaceState]:
        """Return those that the catalog knows; raises TierUnavailable."""
        known = self._mended(self._catalog.load_namespaces)
        self._namespaces.update((info.id, info) for info in known)
        return [_state(info) for info in known]

    def open_namespace(self, name: str, version: int, immutable: bool) -> NamespaceState:
        """Make a namespace known, or a newer version of it, also after a restart.

        Raises VersionConflict when it has moved on to a version above this one, and TierUnavailable.
        """
        wanted = NamespaceInfo(0, name, version, _FIRST_EPOCH, immutable)
        for info in self._mended(self._catalog.load_namespaces):
            if info.name == name and info.version == version and info.immutable == immutable:
                break
            if info.name == name and info.version > version:
                raise VersionConflict(f"namespace {name!r} has moved on to version {info.version}")
        else:
            info = self._mended(lambda: self._catalog.register_namespace(wanted))
        self._namespaces[info.id] = info
        return _state(info)

    def set_epoch(self, ns: int, epoch: int) -> None:
        """Make records of an earlier epoch unreachable, also after a restart; raises TierUnavailable if it can't."""
        known = self._known(ns)
        if epoch > known.epoch:
            self._raise(NamespaceInfo(ns, known.name, known.version, epoch, known.immutable))

    # ---- Writing

    def write(self, records: Sequence[DirtyRecord]) -> None:
        """Store records that are pinned in memory, and settle each with the store: durable, or failed."""
        alive = self._store.still_live(list(records))
        dead = [record for record, lives in zip(records, alive, strict=True) if not lives]
        left = [record for record, lives in zip(records, alive, strict=True) if lives]
        self._store.mark_failed(dead)
        while left:
            done = 1
            try:
                segment, offsets = self._mended(lambda batch=left: self._segments.append(batch))  # type: ignore[misc]
                done = len(offsets)
                self._commit(left[:done], segment, offsets)
            except TierFull as error:
                # It may be this record that is too large for the tier.
                self._failed("full", error, left[:done])
            except (OSError, TierUnavailable) as error:
                code = getattr(error, "errno", None)
                self._failed(errno.errorcode.get(code, str(code)) if code else "catalog", error, left)
                return
            left = left[done:]

    def delete(self, ns: int, keys: Sequence[tuple[Key, int | None]]) -> None:
        """Forget records, also after a restart; with a number only those that have a lower one.

        Raises TierUnavailable when that can't be made durable.
        """
        rows = [(_bytes(key), below) for key, below in keys]
        self._mended(lambda: self._catalog.delete(ns, rows))

    # ---- Reading

    def load(self, ns: int, keys: Sequence[Key]) -> list[Pin | memoryview | None]:
        """Return the values: promoted to memory and pinned, or in private memory where the tier has no room for them.

        None means that a key is not on disk, or is in memory already, or could not be read.
        """
        found = self._store.find_on_disk(ns, keys)
        wanted = [
            _Load(i, _bytes(key), *location)
            for i, (key, location) in enumerate(zip(keys, found, strict=True))
            if location is not None
        ]
        results: list[Pin | memoryview | None] = [None] * len(keys)
        for start in range(0, len(wanted), _LOADS_AT_ONCE):
            self._load_some(ns, wanted[start : start + _LOADS_AT_ONCE], results)
        return results

    # ---- What there is to know

    def stats(self) -> Stats:
        """Return sizes in bytes and counters of this process; `error <name>` counts failed transfers by errno."""
        with self._counts_lock:
            counts = dict(self._counts)
        used, segments = 0, 0
        with contextlib.suppress(OSError):
            used, segments = self._used(), len(self._segments.all())
        names = (
            "written_records", "written_bytes", "failed_records", "loaded_records", "loaded_bytes", "unpromoted_records",
            "corrupt_records", "vanished_records", "dropped_segments", "dropped_rows", "catalog_rebuilds", "rows_loaded",
        )  # fmt: skip
        return {
            "capacity": self.capacity,
            "used_bytes": used,
            "segments": segments,
            "direct": int(self._segments.direct),
            **dict.fromkeys(names, 0),
            **counts,
        }

    # ---- Inside: opening

    def _recover(self) -> None:
        for leftover in self.directory.glob("probe-*.tmp"):
            leftover.unlink(missing_ok=True)
        mark = self._ledger.read()
        if mark is not None and mark.seed != self._store.seed:
            self._start_over()
        for segment in self._segments.all():
            read_header(self._segments.path_of(segment.number))  # raises FormatError
        try:
            if not self._catalog.open() and self._segments.all():
                raise CatalogDamaged(f"{self._catalog.path} is gone")
        except CatalogDamaged as damage:
            self._rebuild(str(damage))
        self._mended(self._reconcile)
        self._mended(self._tell_store)

    def _start_over(self) -> None:
        log.warning(
            "%s belongs to another cache, whose records can't be checked; they are dropped", self.directory
        )
        for segment in self._segments.all():
            self._segments.remove(segment.number)
        self._ledger.write(self._ledger.mark()._replace(seed=self._store.seed))
        self._catalog.replace([], [])

    def _reconcile(self) -> None:
        """Let catalog and files agree: drop rows without data, data without rows, and what exceeds the capacity."""
        sizes = {segment.number: segment.size for segment in self._segments.all()}
        extents = self._catalog.extents()
        for number, extent in extents.items():
            size = sizes.get(number, 0)
            if extent.end > size:
                self._count("dropped_rows", self._catalog.drop_segment(number, beyond=size))
        for number in sizes:
            if self._segments.is_being_written(number):
                continue  # by a process that has another mapping: it is told of nothing, but loses nothing
            if number not in extents:
                self._segments.remove(number)
            else:
                self._segments.trim(number, extents[number].end)
        self._store.raise_seq(max((extent.seq for extent in extents.values()), default=0))
        self._catalog.drop_stale()
        with contextlib.suppress(TierFull):
            self._make_room(0)

    def _tell_store(self) -> None:
        for state in self.namespaces():
            self._store.restore_namespace(*state)
        for rows in self._catalog.rows():
            self._count("rows_loaded", self._store.insert_disk(rows))

    def _rebuild(self, reason: str) -> None:
        """Make a new catalog of what the segments themselves say; only immutable records come back."""
        with self._ledger.hold():
            if self._catalog.is_superseded():
                self._catalog.close()  # another process has done it
                return
            log.warning("the catalog is rebuilt from the segments: %s", reason)
            self._count("catalog_rebuilds")
            found = dict(self._namespaces)
            self._catalog.replace(found.values(), recovered(self._segments, found))
            self._namespaces = found
            self._catalog.drop_stale()
            with contextlib.suppress(TierFull):
                self._make_room(0)

    def _mended(self, call: Callable[[], T]) -> T:
        """Call, and once more after a rebuild if the catalog turns out to be damaged."""
        try:
            return call()
        except CatalogDamaged as damage:
            self._rebuild(str(damage))
            return call()

    # ---- Inside: writing

    def _commit(self, records: list[DirtyRecord], segment: int, offsets: list[int]) -> None:
        """Make rows of records that are written, and settle them."""
        for start in range(0, len(records), self._catalog.batch_rows):
            part = records[start : start + self._catalog.batch_rows]
            places = offsets[start : start + len(part)]
            try:
                alive = self._mended(lambda part=part, places=places: self._add(part, segment, places))  # type: ignore[misc]
            except (TierFull, TierUnavailable) as error:
                self._failed("full" if isinstance(error, TierFull) else "catalog", error, records[start:])
                return
            durable = [(r, at) for r, at, lives in zip(part, places, alive, strict=True) if lives]
            dead = [r for r, lives in zip(part, alive, strict=True) if not lives]
            self._count("written_records", len(durable))
            self._count("written_bytes", sum(r.length for r, _ in durable))
            self._store.mark_durable([r for r, _ in durable], segment, [at for _, at in durable])
            self._store.mark_failed(dead)

    def _add(self, records: list[DirtyRecord], segment: int, offsets: list[int]) -> list[bool]:
        """Commit rows; the store is asked which records still count. Returns which do."""
        for ns, version, epoch in {(r.ns, r.version, r.epoch) for r in records}:
            # The catalog must not fall behind the store, or the rows would be stale after a restart.
            known = self._known(ns)
            if epoch > known.epoch or version > known.version:
                self._raise(NamespaceInfo(ns, known.name, version, epoch, known.immutable))
        rows = [
            (r.ns, r.key, r.seq, segment, at, r.length, r.expires, r.version, r.epoch, r.flags)
            for r, at in zip(records, offsets, strict=True)
        ]
        return self._catalog.add(rows, lambda: self._store.still_live(records))

    def _failed(self, kind: str, error: Exception, records: list[DirtyRecord]) -> None:
        """Count and log a fault, and let the records stay in memory only."""
        self._store.mark_failed(records)
        self._count("failed_records", len(records))
        self._fault(kind, error)

    def _fault(self, kind: str, error: object) -> None:
        self._count(f"error {kind}")
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning("%s: %s (further ones are only counted)", self.directory, error)

    def _count(self, name: str, by: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += by

    def _raise(self, wanted: NamespaceInfo) -> None:
        """Commit a higher version or epoch of a namespace."""
        self._namespaces[wanted.id] = wanted  # first, for a rebuild meanwhile
        self._namespaces[wanted.id] = self._mended(lambda: self._catalog.register_namespace(wanted))

    def _known(self, ns: int) -> NamespaceInfo:
        info = self._namespaces.get(ns)
        if info is None:
            self.namespaces()
            info = self._namespaces.get(ns)
        if info is None:
            raise TierUnavailable(f"the disk tier does not know namespace number {ns}")
        return info

    def _describe(self, ns: int, version: int, epoch: int) -> bytes:
        info = self._known(ns)
        return build_descriptor(
            NamespaceInfo(ns, info.name, version, epoch, info.immutable), seed=self._store.seed
        )

    # ---- Inside: capacity

    def _used(self) -> int:
        """Bytes that all files of the directory take."""
        total = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    there = entry.stat(follow_symlinks=False)
                    total += max(page_ceil(there.st_size), there.st_blocks * 512)
        return total

    def _make_room(self, need: int) -> None:
        """Drop the oldest segments until `need` bytes fit. The ledger is held.

        Raises TierFull, and drops nothing, when they can't be made to: processes append to what is left.
        """
        if self._making_room:
            return  # the deletions below are what the reserve is for
        free = self.capacity - self._catalog.reserve - self._used()
        victims = []
        reached = free
        for segment in self._segments.all():
            if reached >= need:
                break
            if not self._segments.is_being_written(segment.number):
                victims.append(segment.number)
                reached += segment.size
        if reached < need:
            raise TierFull("disk", need, max(free, 0))
        self._making_room = True
        try:
            for number in victims:
                # In this order: a row must never outlive what it points to by way of a number that is used again.
                self._catalog.drop_segment(number)
                self._store.drop_segment(number)
                self._segments.remove(number)
                self._count("dropped_segments")
        finally:
            self._making_room = False

    # ---- Inside: reading

    def _load_some(self, ns: int, loads: list[_Load], results: list[Pin | memoryview | None]) -> None:
        promoting: list[Write | None] = []
        reads: list[Read] = []
        for load in loads:
            write = self._store.begin_load(ns, load.key, load.entry, load.seq, load.length)
            promoting.append(write)
            buffer = aligned_buffer(load.length) if write is None else write.view()
            reads.append(Read(load.segment, load.offset, buffer))
        lost: list[tuple[bytes, int]] = []

        def done(index: int, error: int) -> None:
            load, write = loads[index], promoting[index]
            try:
                if error:
                    raise OSError(error, os.strerror(error))
                if write is None:
                    results[load.position] = self._verified(ns, load, reads[index].buffer)
                else:
                    results[load.position] = write.commit()
            except CorruptRecord as corrupt:
                lost.append((load.key, load.seq))
                self._store.count_corrupt()
                self._count("corrupt_records")
                self._fault("corrupt", corrupt)
            except OSError as failure:
                if error in (errno.ENOENT, SHORT_READ):
                    lost.append((load.key, load.seq))
                    self._count("vanished_records")
                else:
                    self._fault(errno.errorcode.get(error, str(error)), failure)
            else:
                if results[load.position] is not None:
                    self._count("loaded_records")
                    self._count("loaded_bytes", load.length)
                return
            if write is not None:
                write.abort()

        self._segments.read(reads, done)
        if lost:
            self._forget(ns, lost)

    def _verified(self, ns: int, load: _Load, data: memoryview) -> memoryview | None:
        """Return the value of a record in private memory, as the store would check it; raises CorruptRecord."""
        self._count("unpromoted_records")
        try:
            record = parse_record(data, seed=self._store.seed)
            info = next((info for info in self._catalog.load_namespaces() if info.id == ns), None)
        except FormatError as error:
            raise CorruptRecord(str(error)) from error
        except TierUnavailable:
            return None
        if (record.ns, record.key, record.seq, record.length) != (ns, load.key, load.seq, load.length):
            raise CorruptRecord("another record lies in its place")
        if info is None or (record.version, record.epoch) != (info.version, info.epoch):
            return None
        if 0 < record.expires <= time.time_ns() // 1_000_000:
            return None
        return payload_of(data, record).toreadonly()

    def _forget(self, ns: int, lost: list[tuple[bytes, int]]) -> None:
        """Drop what proved wrong from index and catalog."""
        for key, seq in lost:
            self._store.forget_disk(ns, key, seq)
        try:
            self.delete(ns, [(key, seq + 1) for key, seq in lost])
        except TierUnavailable as error:
            self._fault("catalog", error)

    def _forget_parent(self) -> None:
        self._counts_lock = threading.Lock()
        self._making_room = False


class _Load(NamedTuple):
    """A record to be loaded, and where it lies; `position` among the keys that were asked for."""

    position: int
    key: bytes
    entry: int
    seq: int
    segment: int
    offset: int
    length: int


def _bytes(key: Key) -> bytes:
    return key.encode() if isinstance(key, str) else bytes(key)


def _state(info: NamespaceInfo) -> NamespaceState:
    return NamespaceState(info.id, info.name, info.version, info.epoch, info.immutable)
