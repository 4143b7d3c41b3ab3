"""Records in LMDB: a B+ tree in one file, for several processes of a host.

Two trees: name -> number and record, and number -> names written with it, by which the oldest leave. What was
overwritten or deleted stays in the second until its number comes: LMDB's module lets the GIL go at each call, and where
others compute, a thread waits long to have it back, so a record costs one call. The file has its full size from the
beginning, so a full disk is met when it is made and not by SIGBUS later.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvstrata.errors import ConfigMismatch, CorruptRecord, MissingExtra, TierUnavailable
from kvstrata.tiers.base import NamedRecord, Stats, StoreFault
from kvstrata.tiers.engines.directory import FileLock, boot_id, set_aside
from kvstrata.tiers.engines.filter_file import FilterFile
from kvstrata.tiers.engines.lmdb_file import PAGE, check_map
from kvstrata.tiers.engines.names import SCAN_S, some_of
from kvstrata.tiers.engines.turns import Turns

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["BtreeStore"]

_NUMBER = struct.Struct(">Q")
_LENGTH = struct.Struct(">H")  # before each name of a batch
_HEAD = struct.Struct(">QQ")  # before each record: its number, and when its time is over (ms, Unix epoch, 0 = never)
_LASTING = 0  # the number of records that have no place in the order, so they never leave to make room
_USED = 0.7  # of the map: the rest is for copies of changed pages, and pages that readers still see
_BATCH = 1800  # bytes of names under one number: more would take pages of their own
_EVICTED_AT_ONCE = 32
_CHECKED_EACH = 256  # part of the map that is written until its pages are counted again
_SYNC_S = 5.0
_SETUP_S = 10.0
_MARK = "unsynced"

T = TypeVar("T")
_log = logging.getLogger("kvstrata")


def _check_mark(mark: Path) -> None:
    if mark.exists() and mark.read_text() != boot_id():
        raise CorruptRecord("the machine went down while it was written")


class BtreeStore:
    """A RecordStore in a directory that takes `cap` bytes of disk, from the beginning."""

    name = "btree"

    def __init__(self, directory: Path, cap: int) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise MissingExtra("btree", "lmdb") from error
        self._lmdb = lmdb
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._size = (cap - (1 << 20) - FilterFile.size(cap)) // PAGE * PAGE  # the rest: the lock's table
        self.filter = FilterFile(directory, cap)
        self._numbers = {"damaged_directories": 0, "evicted_records": 0}
        self._turns = Turns()  # one thread at a time: each call of lmdb lets the GIL go
        self._synced = time.monotonic()
        self._last_number = 0
        self._unchecked = self._size  # bytes written since its pages were counted
        self._setup = FileLock(directory.with_name(f"{directory.name}.setup"))  # held where users come and go
        self._users = FileLock(directory.with_name(f"{directory.name}.users"))
        self.scanning = FileLock(directory.with_name(f"{directory.name}.scan"))
        try:
            with self._setup.held(_SETUP_S):
                if self._users.take():
                    self._make_sound()
                else:
                    self._check_size()
                    self.filter.join()
                self._env: Any = self._open()
                self._users.take(shared=True)  # which nobody is in the way of: others do this in the setup lock too
        except BaseException:
            self._close_locks()
            raise

    # ---- Opening

    @property
    def _map(self) -> Path:
        return self._directory / "data.mdb"

    def _check_size(self) -> None:
        if self._map.stat().st_size != self._size:
            raise ConfigMismatch(f"{self._directory} is open elsewhere with another disk=; use the same")

    def _make_sound(self) -> None:
        """With nobody else in it: see that it can be opened, else begin anew."""
        mark = self._directory / _MARK
        self._drop_another_size()
        if self._directory.exists():
            try:
                _check_mark(mark)
                check_map(self._map, self._size)
            except (CorruptRecord, OSError, struct.error, ValueError) as why:
                set_aside(self._directory, why)
                self._numbers["damaged_directories"] += 1
        empty = not self._directory.exists()
        if empty:
            self._make()
        self.filter.open(empty=empty)
        (self._directory / "lock.mdb").unlink(missing_ok=True)  # of readers that are gone
        mark.write_text(boot_id())

    def _drop_another_size(self) -> None:
        """Remove what is in order, but was made with another `disk`: it would come on top of that."""
        with suppress(CorruptRecord, OSError, struct.error, ValueError):
            size = self._map.stat().st_size
            check_map(self._map, size)
            if size != self._size:
                shutil.rmtree(self._directory)
                _log.warning("kvstrata: %s was made with another disk= and is begun anew", self._directory)

    def _make(self) -> None:
        draft = self._directory.with_name(f"{self._directory.name}.new")
        draft.mkdir(mode=0o700, exist_ok=True)
        file = draft / "data.mdb"
        file.unlink(missing_ok=True)
        env = self._lmdb.open(str(draft), map_size=self._size, max_dbs=2, sync=False)
        for tree in (b"records", b"batches"):
            env.open_db(tree)
        env.sync(True)
        env.close()
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, self._size)
        draft.rename(self._directory)

    def _open(self) -> Any:
        env = None
        try:
            env = self._lmdb.open(
                str(self._directory), map_size=self._size, max_dbs=2, sync=False, max_readers=1024, create=False
            )
            env.reader_check()
            self._records = env.open_db(b"records", create=False)
            self._batches = env.open_db(b"batches", create=False)
        except self._lmdb.Error as error:
            if env is not None:
                env.close()
            raise TierUnavailable(f"{self._directory} can't be opened: {error}") from error
        return env

    # ---- Records

    @contextmanager
    def _turn(self, timeout_s: float) -> Iterator[None]:
        if not self._turns.take(timeout_s):
            raise StoreFault("timeout", f"btree: other threads have had it for {timeout_s:g} s", sent=False)
        try:
            yield
        finally:
            self._turns.release()

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except self._lmdb.Error as error:
            raise StoreFault(type(error).__name__, f"btree: {error}", sent=False) from error

    def read(self, names: Sequence[bytes], timeout_s: float) -> list[Buffer | None]:
        """See RecordStore."""

        def read() -> list[Buffer | None]:
            with self._env.begin(db=self._records) as txn:
                found = [txn.get(name) for name in names]
            now = time.time() * 1000
            return [None if _over(data, now) else memoryview(data)[_HEAD.size :] for data in found]

        with self._turn(timeout_s):
            return self._ask(read)

    def contains(self, names: Sequence[bytes], timeout_s: float) -> list[bool]:
        """See RecordStore."""
        now = time.time() * 1000

        def contains() -> list[bool]:
            with self._env.begin(db=self._records, buffers=True) as txn:
                return [not _over(txn.get(name), now) for name in names]

        with self._turn(timeout_s):
            return self._ask(contains)

    def write(
        self, records: Sequence[NamedRecord], timeout_s: float, *, then_read: bytes | None = None
    ) -> Buffer | None:
        """See RecordStore."""
        items = [(record, b"".join(record.parts)) for record in records]
        need = sum(len(data) + 2 * PAGE for _, data in items)
        if need > self._size * (1 - _USED) / 2:
            if len(items) == 1:
                raise StoreFault("too large", "btree: a record is larger than 15 % of the disk's bytes", sent=False)
            half = len(records) // 2
            self.write(records[:half], timeout_s)
            return self.write(records[half:], timeout_s, then_read=then_read)
        if items:
            self._changing(timeout_s, lambda: self._put(items), need)
        return None if then_read is None else self.read([then_read], timeout_s)[0]

    def delete(self, names: Sequence[bytes], timeout_s: float) -> None:
        """See RecordStore."""
        if names:
            self._changing(timeout_s, lambda: self._transact(lambda txn: self._remove(txn, names)), 0)

    def _changing(self, timeout_s: float, change: Callable[[], object], need: int) -> None:
        with self._turn(timeout_s):
            self._make_room(need)
            self._ask(change)
            late = time.monotonic() - self._synced > _SYNC_S
            if late:
                self._synced = time.monotonic()
        if late:  # while others read on
            self._ask(lambda: self._env.sync(True))

    def _transact(self, change: Callable[[Any], object]) -> None:
        """Make a change as one transaction; where the map is full, the oldest leave first."""
        for _ in range(64):
            try:
                with self._env.begin(write=True) as txn:
                    change(txn)
            except self._lmdb.MapFullError:
                self._evict()
            else:
                return
        raise StoreFault("full", "btree: there is no room, though much was removed", sent=False)

    def _put(self, items: Sequence[tuple[NamedRecord, bytes]]) -> None:
        def put(txn: Any) -> None:
            aging = [(record, data) for record, data in items if not record.lasting]
            numbers = self._number_batches(txn, [record.name for record, _ in aging])
            for (record, data), number in zip(aging, numbers, strict=True):
                txn.put(record.name, _HEAD.pack(number, record.expires) + data, db=self._records)
            for record, data in items:
                if record.lasting:
                    txn.put(record.name, _HEAD.pack(_LASTING, record.expires) + data, db=self._records)

        self._transact(put)

    def _number_batches(self, txn: Any, names: Sequence[bytes]) -> list[int]:
        """Enter names as the newest; returns a number for each."""
        numbers: list[int] = []
        batch = b""
        for position, name in enumerate(names):
            batch += _LENGTH.pack(len(name)) + name
            if len(batch) < _BATCH and position + 1 < len(names):
                continue
            number = max(time.time_ns(), self._last_number + 1)
            if not txn.put(_NUMBER.pack(number), batch, db=self._batches, append=True):
                # the clock was set back, or another process has just been here
                cursor = txn.cursor(db=self._batches)
                number = _NUMBER.unpack(cursor.key())[0] + 1 if cursor.last() else number
                txn.put(_NUMBER.pack(number), batch, db=self._batches, append=True)
            self._last_number = number
            numbers += [number] * (position + 1 - len(numbers))
            batch = b""
        return numbers

    def _remove(self, txn: Any, names: Sequence[bytes]) -> None:
        for name in names:
            txn.delete(name, db=self._records)

    # ---- Names

    def count(self) -> int:
        """See NamedStore."""

        def count() -> int:
            with self._env.begin() as txn:
                entries: int = txn.stat(self._records)["entries"]
                return entries

        with self._turn(SCAN_S):
            return self._ask(count)

    def scan(self) -> Iterator[list[bytes]]:
        """See NamedStore."""
        last: bytes | None = b""
        while last is not None:
            with self._turn(SCAN_S):
                names = self._ask(partial(self._names_after, last))
            yield names
            last = names[-1] if names else None

    def _names_after(self, last: bytes) -> list[bytes]:
        with self._env.begin(db=self._records) as txn:
            cursor = txn.cursor()
            if not cursor.set_range(last + b"\0"):
                return []
            return some_of(cursor.iternext(keys=True, values=False))

    # ---- The oldest leave

    def _used(self) -> float:
        with self._env.begin() as txn:
            trees = [txn.stat(self._records), txn.stat(self._batches)]
        pages = sum(tree["branch_pages"] + tree["leaf_pages"] + tree["overflow_pages"] for tree in trees)
        return float(pages * PAGE / self._size)

    def _make_room(self, need: int) -> None:
        """Let the oldest leave for what needs so many bytes, and pages in which there may be room for it."""
        self._unchecked += need
        if self._unchecked * _CHECKED_EACH < self._size:
            return
        self._unchecked = 0
        while self._ask(self._used) > _USED:
            if not self._evict():
                return

    def _evict(self) -> int:
        """Remove the oldest batches; returns how many."""
        batches = evicted = 0

        def evict() -> None:
            nonlocal batches, evicted
            with self._env.begin(write=True, buffers=True) as txn:
                cursor = txn.cursor(db=self._batches)
                looked = 0
                while looked < _EVICTED_AT_ONCE and cursor.first():
                    number, names = map(bytes, cursor.item())
                    for name in _names_in(names):
                        looked += 1
                        data = txn.get(name, db=self._records)
                        if data is not None and data[: _NUMBER.size] == number:
                            txn.delete(name, db=self._records)
                            evicted += 1
                    cursor.delete()
                    batches += 1

        self._ask(evict)
        self._numbers["evicted_records"] += evicted
        return batches

    # ---- Figures and life

    def stats(self) -> Stats:
        """See RecordStore."""
        try:
            records = self.count()
            with self._turn(SCAN_S):
                used = int(self._ask(self._used) * self._size)
        except StoreFault:
            records = used = 0
        return {"records": records, "used_bytes": used, "disk_bytes": self._size, **self._numbers}

    def close(self) -> None:
        """See RecordStore."""
        with self._turn(_SETUP_S):
            try:
                self._env.sync(True)
                with self._setup.held(_SETUP_S):
                    self._env.close()
                    if self._users.take():  # the last one out
                        self.filter.close()
                        (self._directory / _MARK).unlink(missing_ok=True)
            except (self._lmdb.Error, TierUnavailable, OSError):
                pass  # the mark stays: only a machine that goes down makes something of it
            finally:
                self._env.close()
                self._close_locks()

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the files, and of the parent's handle, or lmdb would refuse to make another."""
        self._env = None
        self._close_locks()

    def _close_locks(self) -> None:
        self._users.close()
        self._setup.close()
        self.scanning.close()


def _over(data: Buffer | None, now: float) -> bool:
    """Whether there is no record, or none any more."""
    return data is None or 0 < _HEAD.unpack_from(data)[1] <= now


def _names_in(batch: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(batch):
        end = at + _LENGTH.size + _LENGTH.unpack_from(batch, at)[0]
        yield batch[at + _LENGTH.size : end]
        at = end
