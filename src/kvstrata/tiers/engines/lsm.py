"""Records in RocksDB: a log-structured merge tree, for one process.

Records lie in slices, column families that are filled one after the other; a name counts in the newest that has it,
and a record that was deleted is an empty one there. So the oldest leave as a whole slice, whose files go at once, and
what goes with it is never younger than what stays. Records that are lasting lie in the default column family.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvstrata.errors import CorruptRecord, MissingExtra, TierUnavailable
from kvstrata.tiers.base import NamedRecord, Stats, StoreFault
from kvstrata.tiers.engines.directory import FileLock, set_aside
from kvstrata.tiers.engines.filter_file import FilterFile
from kvstrata.tiers.engines.manifest import check_manifest
from kvstrata.tiers.engines.names import SCAN_S, some_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LsmStore"]

_SLICES = 8  # parts of the directory's bytes
_MIB = 1 << 20
_EXPIRES = struct.Struct("<Q")  # before each record: when its time is over, ms since the Unix epoch, 0 = never
_abandoned: list[Any] = []  # handles of a parent: their threads aren't in this process, so they are never closed

T = TypeVar("T")


class LsmStore:
    """A RecordStore in a directory of at most `cap` bytes; raises TierUnavailable where another process has it."""

    name = "lsm"
    scanning = None

    def __init__(self, directory: Path, cap: int) -> None:
        try:
            import rocksdict
        except ImportError as error:
            raise MissingExtra("lsm", "rocksdict") from error
        self._rocks = rocksdict
        self._directory = directory
        self._cap = cap
        self._slice_bytes = cap // _SLICES
        self._numbers = {"damaged_directories": 0, "evicted_slices": 0}
        self._lock = threading.Lock()
        self.filter = FilterFile(directory, cap)
        self._unseen = 0  # bytes written since the directory was looked at
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._alone = FileLock(directory.with_name(f"{directory.name}.lock"))
        try:
            self._open_alone()
            self.filter.open(empty=self._is_new)
        except BaseException:
            self._alone.close()
            raise

    # ---- Opening

    def _options(self) -> Any:
        rocks = self._rocks
        options = rocks.Options(raw_mode=True)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        options.set_wal_recovery_mode(rocks.DBRecoveryMode.tolerate_corrupted_tail_records())
        buffer = min(max(self._cap // 128, _MIB), 32 * _MIB)
        options.set_write_buffer_size(buffer)
        options.set_max_write_buffer_number(2)
        options.set_db_write_buffer_size(2 * buffer)
        options.set_max_total_wal_size(2 * buffer)
        options.set_target_file_size_base(4 * buffer)
        options.set_max_manifest_file_size(_MIB)
        options.set_manifest_preallocation_size(64 << 10)
        options.set_keep_log_file_num(2)
        options.set_max_log_file_size(256 << 10)
        options.set_max_open_files(256)
        options.set_compression_type(rocks.DBCompressionType.none())
        table = rocks.BlockBasedOptions()
        table.set_bloom_filter(10.0, False)
        table.set_block_cache(rocks.Cache(8 * _MIB))
        table.set_cache_index_and_filter_blocks(False)
        options.set_block_based_table_factory(table)
        return options

    def _open_alone(self) -> None:
        """Open it, where need be anew; nobody else may have it."""
        if not self._alone.take():
            raise TierUnavailable(
                f"{self._directory} is open in another process, and disk_engine='lsm' is for one; use 'btree' or 'log'"
            )
        try:
            if self._directory.exists() and any(self._directory.iterdir()):
                check_manifest(self._directory)
            self._open()
        except Exception as why:
            if not self._directory.exists():
                raise
            set_aside(self._directory, why)
            self._numbers["damaged_directories"] += 1
            self._open()

    def _open(self) -> None:
        options = self._options()
        self._directory.mkdir(mode=0o700, exist_ok=True)  # what RocksDB makes in it is for everybody to read
        known = ["default"]
        if (self._directory / "CURRENT").exists():
            known = self._rocks.Rdict.list_cf(str(self._directory), options)
        numbers = sorted(int(name) for name in known if name != "default")
        if "default" not in known or any(str(n) not in known for n in numbers):
            raise CorruptRecord("its slices have other names")
        families = {str(number): options for number in numbers}
        self._db: Any = self._rocks.Rdict(str(self._directory), options, families)
        self._slices: list[tuple[int, Any]] = [(n, self._db.get_column_family(str(n))) for n in reversed(numbers)]
        self._filled = self._slice_bytes // 2 if numbers else 0  # nobody knows: at most half a slice is lost
        self._is_new = not numbers
        if self._is_new:
            self._begin_slice()

    def _begin_slice(self) -> None:
        number = self._slices[0][0] + 1 if self._slices else 1
        handle = self._db.create_column_family(str(number), self._options())
        self._slices = [(number, handle), *self._slices]
        self._filled = 0

    # ---- Records

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except StoreFault:
            raise
        except Exception as error:
            raise StoreFault("rocksdb", f"lsm: {error}", sent=False) from error

    def _find(self, names: Sequence[bytes]) -> list[bytes | None]:
        for _ in range(3):
            slices = self._slices  # newest first; one that is dropped meanwhile raises, and is looked up no more
            try:
                return self._find_in(slices, names)
            except Exception:
                if slices is self._slices:
                    raise
        return self._find_in(self._slices, names)

    def _find_in(self, slices: Sequence[tuple[int, Any]], names: Sequence[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(names)
        left = list(range(len(names)))
        for _, handle in [(0, self._db), *slices]:
            if not left:
                break
            for position, data in zip(left, handle.get([names[i] for i in left]), strict=True):
                found[position] = data
            left = [i for i in left if found[i] is None]
        now = time.time() * 1000
        return [data if data and not _over(data, now) else None for data in found]

    def read(self, names: Sequence[bytes], timeout_s: float) -> list[Buffer | None]:  # noqa: ARG002
        """See RecordStore."""
        return self._ask(lambda: _records(self._find(names)))

    def contains(self, names: Sequence[bytes], timeout_s: float) -> list[bool]:  # noqa: ARG002
        """See RecordStore."""
        return [data is not None for data in self._ask(lambda: self._find(names))]

    def write(
        self, records: Sequence[NamedRecord], timeout_s: float, *, then_read: bytes | None = None
    ) -> Buffer | None:
        """See RecordStore."""
        items = [
            (record.name, b"".join((_EXPIRES.pack(record.expires), *record.parts)), record.lasting)
            for record in records
        ]
        if any(len(data) > self._slice_bytes // 2 for _, data, _ in items):
            raise StoreFault("too large", "lsm: a record is larger than 1/16 of the disk's bytes", sent=False)
        self._put(items, timeout_s)
        return None if then_read is None else self.read([then_read], timeout_s)[0]

    def delete(self, names: Sequence[bytes], timeout_s: float) -> None:
        """See RecordStore."""
        self._put([(name, b"", False) for name in names], timeout_s)

    def _put(self, items: Sequence[tuple[bytes, bytes, bool]], timeout_s: float) -> None:
        if not items:
            return
        with self._locked(timeout_s):
            self._ask(lambda: self._put_locked(items))

    @contextmanager
    def _locked(self, timeout_s: float) -> Iterator[None]:
        """Keep others from writing, and slices from being dropped; raises StoreFault if that takes longer, in s."""
        if not self._lock.acquire(timeout=timeout_s):
            raise StoreFault("timeout", "lsm: other threads are writing", sent=False)
        try:
            yield
        finally:
            self._lock.release()

    def _put_locked(self, items: Sequence[tuple[bytes, bytes, bool]]) -> None:
        batch = self._rocks.WriteBatch(raw_mode=True)
        family = self._db.get_column_family_handle(str(self._slices[0][0]))
        size = 0
        for name, data, lasting in items:
            batch.put(name, data, None if lasting else family)
            size += len(name) + len(data)
        self._db.write(batch)
        self._filled += size
        self._unseen += size
        if self._filled >= self._slice_bytes // 2:
            self._begin_slice()
        if self._unseen >= self._cap // 64:
            self._unseen = 0
            self._keep_within()

    # ---- Names

    def count(self) -> int:
        """See NamedStore: records that were deleted have names, too."""

        def count() -> int:
            return sum(handle.property_int_value("rocksdb.estimate-num-keys") or 0 for _, handle in self._slices)

        return self._ask(count)

    def scan(self) -> Iterator[list[bytes]]:
        """See NamedStore."""
        for number in [number for number, _ in self._slices]:
            last: bytes | None = b""
            while last is not None:
                # No slice is dropped meanwhile, and none is kept between: then its files would stay, and others would
                # have to go in their place.
                with self._locked(SCAN_S):
                    names, last = self._ask(partial(self._names_after, number, last))
                yield names

    def _names_after(self, number: int, last: bytes) -> tuple[list[bytes], bytes | None]:
        """Some of the names of a slice, and the last of them; None where there are no more."""
        handle = dict(self._slices).get(number)
        if handle is None:
            return [], None
        options: Any = self._rocks.ReadOptions()
        options.fill_cache(False)
        iterator = handle.iter(options)
        iterator.seek(last + b"\0")
        names = some_of(_names_from(iterator))
        if iterator.valid():
            return names, names[-1]
        iterator.status()  # raises where it ended early
        return names, None

    # ---- The oldest leave

    def _du(self) -> int:
        total = 0
        for file in self._directory.iterdir():
            try:
                total += file.stat().st_blocks * 512
            except FileNotFoundError:
                continue  # compacted away meanwhile
        return total

    def _keep_within(self) -> None:
        """Drop the oldest slices until a quarter of the bytes is free, for what is under way."""
        while len(self._slices) > 1 and self._du() > self._cap // 4 * 3:
            number = self._slices[-1][0]
            self._slices = self._slices[:-1]  # whoever still reads it holds the last reference, and its files
            self._db.drop_column_family(str(number))
            self._numbers["evicted_slices"] += 1

    # ---- Figures and life

    def stats(self) -> Stats:
        """See RecordStore."""
        return {"slices": len(self._slices), "disk_bytes": self._du(), **self._numbers}

    def close(self) -> None:
        """See RecordStore."""
        with self._lock:
            try:
                for _, handle in self._slices:
                    handle.close()
                self._slices = []
                self._db.close()
                self.filter.close()
            except Exception:  # noqa: BLE001 - what was written is in its log
                pass
            finally:
                self._alone.close()

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the lock's file; RocksDB's handles are the parent's."""
        _abandoned.append((self._db, self._slices))
        self._alone.close()


def _over(data: bytes, now: float) -> bool:
    return bool(0 < _EXPIRES.unpack_from(data)[0] <= now)


def _records(found: list[bytes | None]) -> list[Buffer | None]:
    return [None if data is None else memoryview(data)[_EXPIRES.size :] for data in found]


def _names_from(iterator: Any) -> Iterator[bytes]:
    while iterator.valid():
        yield iterator.key()
        iterator.next()
