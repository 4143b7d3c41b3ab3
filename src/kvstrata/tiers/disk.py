"""The disk tier: records in segment files; where they lie is in the catalog and in the host's index.

It settles every record that it is given and answers every load: what goes wrong below is counted, logged once
and becomes a miss. Only a deletion or a new epoch raises, since it isn't durable then. When the device fails again and
again, it isn't asked any more but now and then: meanwhile records stay in memory only, and loads are misses.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.errors import TierUnavailable, VersionConflict
from kvstrata.record import PAGE, NamespaceInfo, build_descriptor
from kvstrata.tiers.base import Arrived, Key, Later, NamespaceState, Stats, at_once
from kvstrata.tiers.blockio import page_ceil
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.capacity import Capacity
from kvstrata.tiers.catalog import Catalog, Lasting
from kvstrata.tiers.cleaning import Cleaner
from kvstrata.tiers.counters import Counters, reason
from kvstrata.tiers.encodings import Encodings
from kvstrata.tiers.ledger import Ledger
from kvstrata.tiers.loading import Loaded, Loader, key_bytes
from kvstrata.tiers.partial import PartLoader
from kvstrata.tiers.quotas import Quotas
from kvstrata.tiers.recovery import Recovery
from kvstrata.tiers.segments import SegmentSet, segment_bytes_for
from kvstrata.tiers.small_files import replace_file
from kvstrata.tiers.wear import WriteLimit
from kvstrata.tiers.writing import Writer

if TYPE_CHECKING:
    from kvstrata._core import DirtyRecord, Store
    from kvstrata.codecs.encryption import Sealer

__all__ = ["DiskTier"]


SYNC_S = 5.0  # after so long what was committed is synced, as file systems do with their journals
_FIRST_EPOCH = 1  # as in the store
_COUNTERS = (
    "written_records",
    "written_bytes",
    "failed_records",
    "refused_records",
    "retried_records",
    "refused_loads",
    "limited_records",
    "reinserted_records",
    "reinserted_bytes",
    "loaded_records",
    "loaded_bytes",
    "unpromoted_records",
    "shared_loads",
    "sealed_records",
    "corrupt_records",
    "vanished_records",
    "dropped_segments",
    "dropped_rows",
    "catalog_rebuilds",
    "restored_records",
)


class DiskTier:
    """The disk tier of one directory, for all processes that open it. Threads may share one."""

    name = "disk"

    def __init__(
        self,
        directory: Path,
        capacity: int,
        store: Store,
        *,
        sealer: Sealer | None = None,
        policy: str = "fifo",
        write_limit: int = 0,
        direct: bool = True,
        depth: int = 8,
    ) -> None:
        """Prepare the tier: at most `capacity` bytes over all files in it, `depth` transfers at a time.

        With a `sealer` all values are encrypted. `policy` is one of `config.DISK_POLICIES`, `write_limit` in bytes per
        second by this process, 0 = none. Raises TierUnavailable when the directory can't be used.
        """
        self.directory = directory
        self.capacity = capacity
        self._store = store
        self.encodings = Encodings(sealer)
        self._counters = Counters(str(directory))
        self._namespaces: dict[int, NamespaceInfo] = {}
        self._segment_bytes = segment_bytes_for(capacity)
        self._segments_ahead = 2 if policy == "lru" else 1  # what is to be kept takes time to be written anew
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ledger = Ledger(directory, seed=store.seed)
            self._catalog = Catalog(
                directory,
                self._ledger,
                room=self._make_room,
                batch_rows=max(8, min(1024, capacity // (64 * 11 * PAGE))),
                wal_bytes=max(256 << 10, min(4 << 20, capacity // 16), min(32 << 20, capacity // 64)),
            )
            self._capacity = Capacity(
                directory,
                capacity,
                reserve=self._catalog.reserve,
                ledger=self._ledger,
                order=lambda segments: self._cleaner.order(segments),
                keep_some=lambda number: self._cleaner.keep_some(number),
                drop=self._drop_segment,
            )
            self._segments = SegmentSet(
                directory,
                seed=store.seed,
                segment_bytes=self._segment_bytes,
                ledger=self._ledger,
                make_room=self._make_room_for_segment,
                describe=self._descriptor,
                direct=direct,
                depth=depth,
            )
        except OSError as error:
            raise TierUnavailable(f"{directory} can't hold a disk tier: {error.strerror or error}") from error
        self._recovery = Recovery(
            directory,
            store,
            self._ledger,
            self._catalog,
            self._segments,
            self._counters,
            self._namespaces,
            self._make_room,
        )
        self._quotas = Quotas(self._catalog, store, lambda ns: self._known(ns).immutable)
        self._write_limit = WriteLimit(write_limit)
        self._cleaner = Cleaner(
            policy, store, self._segments, self._catalog, self._ledger, self._counters, self._write_limit.admits
        )
        # A full or read-only file system can still be read.
        self._writing = Breaker(f"writing to {directory}")
        self._reading = Breaker(f"reading from {directory}")
        self._writer = Writer(
            store,
            self._segments,
            self._catalog,
            self._ledger,
            self._recovery,
            self._quotas,
            self._write_limit,
            self._counters,
            self._writing,
            self.encodings,
            known=self._known,
            register=self._raise,
        )
        self._loader = Loader(
            store,
            self._segments,
            self._counters,
            self._reading,
            self.encodings,
            describe=self._from_catalog,
            forget=self._forget,
        )
        self._parts = PartLoader(store, self._segments, self._counters, self._loader, depth=depth)

    def recover(self) -> None:
        """Bring the directory in order and tell a store that is new what lies in it.

        Raises FormatError when a newer release wrote it, TierUnavailable when it can't be used.
        """
        try:
            with self._ledger.hold():
                self._recovery.run()
                self.sync()
        except OSError as error:
            raise TierUnavailable(f"{self.directory} can't be used: {error.strerror or error}") from error

    def close(self) -> None:
        """Finish the segment that is being written, fold up the catalog and let go of the directory."""
        self._capacity.close()
        self._writer.close()
        self._segments.seal()
        with contextlib.suppress(TierUnavailable):
            self.sync()
        self._segments.close()
        self._catalog.close()
        self._ledger.close()

    def sync(self) -> None:
        """Have all that was written on the device, so that it outlasts a power loss; raises TierUnavailable."""
        try:
            self._segments.sync()
            self._recovery.mended(self._catalog.sync)
        except OSError as error:
            raise TierUnavailable(f"{self.directory} can't be synced: {error.strerror or error}") from error

    def tend(self) -> None:
        """Sync what has waited for it long enough, and have written and settled what was postponed."""
        self._writer.settle_the_rest()
        if self._writing.due:
            self._writer.write_postponed()
        since = self._catalog.unsynced_since
        if since is not None and time.monotonic() - since >= SYNC_S and self._writing.state == "closed":
            try:
                self.sync()
            except TierUnavailable as error:
                self._counters.fault(reason(error), error)
                self._writing.failure(reason(error), error)

    def try_again(self, *, now: bool) -> int:
        """Have what was postponed taken once more, before the process ends; returns how many records that is.

        `now`: even if the device failed just now; else only where it does what it should.
        """
        if now:
            self._writing.hurry()
        return self._writer.write_postponed() if now or self._writing.well else 0

    # ---- Namespaces

    def namespaces(self) -> list[NamespaceState]:
        """Return those that the catalog knows; raises TierUnavailable."""
        return [_state(info) for info in self._recovery.namespaces()]

    def number_of(self, name: str, version: int, immutable: bool) -> int:
        """Return the number of a namespace, which is made so if there is none of that name; raises TierUnavailable."""
        for info in self._recovery.mended(self._catalog.load_namespaces):
            if info.name == name:
                return info.id
        return self.open_namespace(name, version, immutable).id

    def open_namespace(self, name: str, version: int, immutable: bool) -> NamespaceState:
        """Make a namespace known, or a newer version of it, also after a restart.

        Raises VersionConflict when it has moved on to a version above this one, and TierUnavailable.
        """
        known = self._recovery.mended(self._catalog.load_namespaces)
        info = next((info for info in known if info.name == name), None)
        if info is None or info.version < version or info.immutable != immutable:
            wanted = NamespaceInfo(0, name, version, _FIRST_EPOCH, immutable)
            info = self._recovery.mended(lambda: self._catalog.register_namespace(wanted))
        if info.version > version:
            raise VersionConflict(f"namespace {name!r} has moved on to version {info.version}")
        self._namespaces[info.id] = info
        return _state(info)

    def set_quota(self, ns: int, quota: int) -> None:
        """Bound the bytes that a namespace has on disk, for all processes; 0 = no bound. Raises TierUnavailable."""
        self._recovery.mended(lambda: self._quotas.set(ns, quota))

    def usage(self) -> dict[int, tuple[int, int]]:
        """Return by number of a namespace how many records and bytes it has on disk; none when that isn't known."""
        try:
            return {ns: (use.records, use.bytes) for ns, use in self._recovery.mended(self._catalog.usage).items()}
        except TierUnavailable:
            return {}

    def set_epoch(self, ns: int, epoch: int) -> None:
        """Make records of an earlier epoch unreachable, also after a restart.

        Raises TierUnavailable when that can't be made durable.
        """
        with self._ledger.hold():  # or another thread would find it known before it is committed
            known = self._known(ns)
            if epoch > known.epoch:
                self._raise(NamespaceInfo(ns, known.name, known.version, epoch, known.immutable))

    def remove_tag(self, slot: int, seq: int) -> None:
        """Make records with that tag and a lower number unreachable, also after a restart.

        Raises TierUnavailable when that can't be made durable.
        """
        self._recovery.mended(lambda: self._catalog.remove_tag(slot, seq))

    # ---- Records

    def write(self, records: Sequence[DirtyRecord], later: Later = at_once) -> None:
        """Store records that are pinned in memory, and settle each with the store: durable, or failed.

        `later(settle)` may have the rows of what is on the device committed while the next bytes are on their way.
        """
        self._writer.write(records, later)

    def load(self, ns: int, keys: Sequence[Key], arrived: Arrived | None = None) -> Loaded:
        """Return the values: promoted to memory and pinned, or in private memory where the tier has no room.

        None means that a key is not on disk, is in memory already, or could not be read. `arrived(position, value)` is
        called for each value as soon as it is there, from any thread.
        """
        return self._loader.load(ns, keys, arrived)

    def parts(self) -> PartLoader:
        """Return what loads records piece by piece."""
        return self._parts

    def delete(self, ns: int, keys: Sequence[tuple[Key, int | None]]) -> None:
        """Forget records, also after a restart; where a number is given only those with a lower one.

        Raises TierUnavailable when that can't be made durable.
        """
        rows = [(key_bytes(key), below) for key, below in keys]
        # Where a key implies its value, one that was put again may as well come back.
        removes = any(below is None for _, below in rows)
        lasting: Lasting = "marked" if not self._known(ns).immutable else "synced" if removes else "later"
        self._recovery.mended(lambda: self._catalog.delete(ns, rows, lasting))

    def delete_prefix(self, ns: int, prefix: bytes, below: int) -> None:
        """Forget the records whose keys start with `prefix`, if their number is below `below`, also after a restart.

        Raises TierUnavailable when that can't be made durable.
        """
        lasting: Lasting = "synced" if self._known(ns).immutable else "marked"
        self._recovery.mended(lambda: self._catalog.delete_prefix(ns, prefix, below, lasting))

    def save(self, name: str, data: bytes) -> None:
        """Keep a small file beside the segments, in place of an older one, within the capacity.

        Raises OSError, TierFull, TierUnavailable.
        """
        with self._ledger.hold():
            self._make_room(page_ceil(len(data)))
            replace_file(self.directory / name, data, sync=False)

    def stats(self) -> Stats:
        """Return sizes in bytes and the counters of this process; "error <kind>" counts faults.

        "write_breaker" and "read_breaker" are "closed" while all is well, and otherwise "open" or "half-open", with the
        reason under "write_last_error" and "read_last_error".
        """
        used = segments = 0
        with contextlib.suppress(OSError):
            used, segments = self._capacity.used(), len(self._segments.all())
        return {
            "capacity": self.capacity,
            "used_bytes": used,
            "segments": segments,
            "direct": int(self._segments.direct),
            **dict.fromkeys(_COUNTERS, 0),
            **self._counters.snapshot(),
            **{f"write_{name}": value for name, value in self._writing.stats().items()},
            **{f"read_{name}": value for name, value in self._reading.stats().items()},
        }

    # ---- Inside: what proved to be wrong

    def _forget(self, ns: int, records: list[tuple[bytes, int]]) -> bool:
        """Drop records that proved to be wrong from catalog and index.

        While there is a row, the index has to know of it, or nobody would delete it when its key is put again.
        """
        try:
            self.delete(ns, [(key, seq + 1) for key, seq in records])
        except TierUnavailable as error:
            self._counters.fault(reason(error), error)
            self._reading.failure(reason(error), error)
            return False
        for key, seq in records:
            self._store.forget_disk(ns, key, seq)
        return True

    # ---- Inside: namespaces

    def _raise(self, wanted: NamespaceInfo) -> None:
        """Commit a higher version or epoch of a namespace. The ledger must be held."""
        before = self._namespaces[wanted.id]
        self._namespaces[wanted.id] = wanted  # first, for a rebuild meanwhile
        try:
            self._namespaces[wanted.id] = self._recovery.mended(lambda: self._catalog.register_namespace(wanted))
        except BaseException:
            self._namespaces[wanted.id] = before  # or nobody would commit it any more
            raise

    def _known(self, ns: int) -> NamespaceInfo:
        if ns not in self._namespaces:
            self.namespaces()
        if ns not in self._namespaces:
            raise TierUnavailable(f"the disk tier does not know namespace number {ns}")
        return self._namespaces[ns]

    def _from_catalog(self, ns: int) -> NamespaceInfo | None:
        try:
            return next((info for info in self._catalog.load_namespaces() if info.id == ns), None)
        except TierUnavailable:
            return None

    def _descriptor(self, ns: int, version: int, epoch: int) -> bytes:
        known = self._known(ns)
        info = NamespaceInfo(ns, known.name, version, epoch, known.immutable)
        return build_descriptor(info, seed=self._store.seed)

    # ---- Inside: capacity

    def _make_room(self, need: int) -> None:
        self._capacity.make(self._segments, need)

    def _make_room_for_segment(self, size: int) -> None:
        self._capacity.make(self._segments, size)
        self._capacity.make_ahead(self._segments, size + self._segments_ahead * self._segment_bytes)

    def _drop_segment(self, number: int) -> None:
        # Rows first, so that none ever outlives what it points to; then the index. The row of what that has there may
        # say otherwise: who moved it may have been killed in between.
        keys: dict[int, list[tuple[bytes, int]]] = {}
        for ns, key, seq, *_ in sorted(self._store.rows_of(number, False)):  # in the order of the rows
            keys.setdefault(ns, []).append((key, seq + 1))
        for ns, below in keys.items():
            self._catalog.delete(ns, below, "later")
        self._catalog.drop_segment(number)  # synced, and with it all before
        self._store.drop_segment(number)
        self._counters.add("dropped_segments")


def _state(info: NamespaceInfo) -> NamespaceState:
    return NamespaceState(info.id, info.name, info.version, info.epoch, info.immutable)
