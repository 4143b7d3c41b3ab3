"""What writes records to a disk tier: to segments first, then their rows, and what becomes of those that can't be."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstrata.errors import InvalidValue, TierFull, TierUnavailable
from kvstrata.record import NamespaceInfo
from kvstrata.tiers.base import Later
from kvstrata.tiers.counters import reason

if TYPE_CHECKING:
    from kvstrata._core import DirtyRecord, Store
    from kvstrata.tiers.breaker import Breaker
    from kvstrata.tiers.catalog import Catalog
    from kvstrata.tiers.counters import Counters
    from kvstrata.tiers.encodings import Encodings
    from kvstrata.tiers.ledger import Ledger
    from kvstrata.tiers.quotas import Quotas
    from kvstrata.tiers.recovery import Recovery
    from kvstrata.tiers.segments import SegmentSet
    from kvstrata.tiers.wear import WriteLimit

__all__ = ["Writer"]

_POSTPONED_AT_ONCE = 32 << 20  # bytes


class Writer:
    """Settles every record that it is given with the store: durable, failed, or postponed until the device does."""

    def __init__(
        self,
        store: Store,
        segments: SegmentSet,
        catalog: Catalog,
        ledger: Ledger,
        recovery: Recovery,
        quotas: Quotas,
        limit: WriteLimit,
        counters: Counters,
        breaker: Breaker,
        encodings: Encodings,
        *,
        known: Callable[[int], NamespaceInfo],
        register: Callable[[NamespaceInfo], None],
    ) -> None:
        """Prepare; `known(ns)` is what the catalog has of a namespace, and `register` raises its version or epoch."""
        self._store = store
        self._segments = segments
        self._catalog = catalog
        self._ledger = ledger
        self._recovery = recovery
        self._quotas = quotas
        self._limit = limit
        self._counters = counters
        self._breaker = breaker
        self._encodings = encodings
        self._known = known
        self._register = register
        self._owed = False  # whether anything was postponed, as far as this process knows
        self._unsettled: deque[Callable[[], None]] = deque()  # what settles records whose rows are committed

    def write(self, records: Sequence[DirtyRecord], later: Later) -> None:
        """Store records that are pinned in memory, and settle each; see `DiskTier.write`."""
        alive = self._store.still_live(list(records))
        left = [record for record, lives in zip(records, alive, strict=True) if lives]
        self._store.mark_failed([record for record, lives in zip(records, alive, strict=True) if not lives])
        left = self._within_limit(self._within_quota([record for record in left if self._encoded(record)]))
        if not left:
            return
        if not self._breaker.allow():
            self._counters.add("refused_records", len(left))
            self._postpone(left)
        else:
            self._write(left, later)

    def write_postponed(self) -> int:
        """Have what was postponed taken once more; returns how many records that is."""
        queued = 0
        if self._owed:
            with contextlib.suppress(TierUnavailable):  # somebody holds a lock
                queued = self._store.write_postponed(_POSTPONED_AT_ONCE if self._breaker.well else 1)  # one, to see
                self._counters.add("retried_records", queued)
                self._owed = queued > 0
        return queued

    def _encoded(self, record: DirtyRecord) -> bool:
        """Encode a record; False for one that can't be, which is left to memory."""
        try:
            self._encodings.apply(record, self._store.seed)
        except InvalidValue as error:
            self._failed("encoding", error, [record])
            return False
        return True

    def _within_quota(self, records: list[DirtyRecord]) -> list[DirtyRecord]:
        """Return those that a quota can hold at all, and leave the others to memory."""
        fits = self._quotas.hold(records)
        for record, may in zip(records, fits, strict=True):
            if not may:
                self._failed("quota", f"a record of {record.length:,} bytes is larger than its namespace's", [record])
        return [record for record, may in zip(records, fits, strict=True) if may]

    def _within_limit(self, records: list[DirtyRecord]) -> list[DirtyRecord]:
        """Return those that may be written now, and leave the others to memory."""
        admitted = [self._limit.admits(record.length) for record in records]
        over = [record for record, may in zip(records, admitted, strict=True) if not may]
        if over:
            self._counters.add("limited_records", len(over))
            self._store.mark_failed(over)
        return [record for record, may in zip(records, admitted, strict=True) if may]

    def _write(self, left: list[DirtyRecord], later: Later) -> None:
        """Store records, and tell what commits their rows."""
        told = False
        openings = self._breaker.openings
        while left:
            try:
                segment, offsets = self._append(left)
            except TierFull as error:
                self._failed("full", error, left[:1])  # the others may be smaller
                left = left[1:]
            except (OSError, TierUnavailable) as error:
                self._broken(error, left)
                return
            else:
                written, left = left[: len(offsets)], left[len(offsets) :]
                later(functools.partial(self._settle, written, segment, offsets, openings))
                told = True
        if not told:
            self._breaker.success()

    def _append(self, records: list[DirtyRecord]) -> tuple[int, list[int]]:
        return self._recovery.mended(lambda: self._segments.append(records, hold=True))

    def _settle(self, records: list[DirtyRecord], segment: int, offsets: list[int], openings: int) -> None:
        """Commit rows of records that are written, settle them, and let go of their segment."""
        try:
            # Else the device has failed since they were written: what was under way says nothing against that.
            if self._commit(records, segment, offsets) and self._breaker.openings == openings:
                self._breaker.success()
        finally:
            self._segments.release(segment)

    def _commit(self, records: list[DirtyRecord], segment: int, offsets: list[int]) -> bool:
        """Make rows of records that are written, and settle them; returns False when the catalog fails."""
        start = 0
        while start < len(records):
            part = self._quotas.part(records[start : start + self._catalog.batch_rows])
            places = offsets[start : start + len(part)]
            try:
                with self._ledger.hold():  # nobody else adds between
                    self._quotas.make_room(part)
                    alive = self._add(part, segment, places)
            except TierFull as error:
                self._failed("full", error, records[start:])
                return True
            except TierUnavailable as error:
                self._broken(error, records[start:])
                return False
            durable = [(r, at) for r, at, lives in zip(part, places, alive, strict=True) if lives]
            self._counters.add("written_records", len(durable))
            self._counters.add("written_bytes", sum(record.length for record, _ in durable))
            gone = [r for r, lives in zip(part, alive, strict=True) if not lives]
            self._finish(functools.partial(self._mark, durable, segment, gone))
            start += len(part)
        return True

    def _mark(self, durable: list[tuple[DirtyRecord, int]], segment: int, gone: list[DirtyRecord]) -> None:
        self._store.mark_durable([record for record, _ in durable], segment, [at for _, at in durable])
        self._store.mark_failed(gone)

    def _finish(self, mark: Callable[[], None]) -> bool:
        """Settle records whose rows are committed: they never count as failed. False when somebody holds a lock."""
        try:
            mark()
        except TierUnavailable:
            self._unsettled.append(mark)
            return False
        return True

    def settle_the_rest(self) -> None:
        """Settle what is committed and was kept from it, as far as nobody holds a lock any more."""
        with contextlib.suppress(IndexError):  # another thread took the last one
            while self._unsettled and self._finish(self._unsettled.popleft()):
                pass

    def close(self) -> None:
        """Let go of what could not be settled: whoever takes over what this process leaves has to find out."""
        self.settle_the_rest()
        self._unsettled.clear()

    def _add(self, records: list[DirtyRecord], segment: int, offsets: list[int]) -> list[bool]:
        """Commit rows; the store is asked which records still count. Returns which do."""
        for ns, version, epoch in {(r.ns, r.version, r.epoch) for r in records}:
            # The catalog must not fall behind the store, or the rows would be stale after a restart.
            known = self._known(ns)
            if epoch > known.epoch or version > known.version:
                self._register(NamespaceInfo(ns, known.name, version, epoch, known.immutable))
        rows = [
            (r.ns, r.key, r.seq, segment, at, r.length, r.expires, r.version, r.epoch, r.flags, r.tags)
            for r, at in zip(records, offsets, strict=True)
        ]
        return self._recovery.mended(lambda: self._catalog.add(rows, lambda: self._store.still_live(records)))

    def _broken(self, error: OSError | TierUnavailable, records: list[DirtyRecord]) -> None:
        """Count a fault of the device, and postpone what it didn't take."""
        self._counters.fault(reason(error), error)
        self._postpone(records)
        self._breaker.failure(reason(error), error)

    def _postpone(self, records: list[DirtyRecord]) -> None:
        """Let records stay in memory, until a write succeeds; those that are still there are then written."""
        self._counters.add("failed_records", len(records))
        self._owed = True
        self._store.postpone(records)

    def _failed(self, kind: str, error: object, records: list[DirtyRecord]) -> None:
        """Let records stay in memory only."""
        if not records:
            return
        self._counters.add("failed_records", len(records))
        self._counters.fault(kind, error)
        self._store.mark_failed(records)
