"""The database of a catalog: its files, connections and transactions.

A database whose damage can be seen raises CatalogDamaged; `CatalogFile.replace` then puts another in its place, also
under the feet of processes that have the old one open: they notice at their next transaction. Each new one has a name
of its own, since SQLite deletes a log by its name, and must not find another's there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.forking import after_fork, before_fork
from kvstrata.record import PAGE, NamespaceInfo
from kvstrata.tiers import catalog_schema as schema
from kvstrata.tiers.blockio import sync_directory
from kvstrata.tiers.catalog_schema import CatalogDamaged, Row
from kvstrata.tiers.ledger import Ledger, Mark, boot_id

__all__ = ["CatalogFile", "Lasting"]

_NAME = re.compile(r"catalog-(\d{6})\.(db|new)(-wal|-shm|-journal)?")
Lasting = Literal["later", "marked", "synced"]
"""How a commit gets onto the device: when there's time; the same, but the ledger says before that something may come
back when power is lost; at once, before the call returns. The last costs some milliseconds, the second as much once in
a while, and then power loss costs all mutable records."""
_out_of_reach: set[Path] = set()  # directories that this forked process can't use, as its parent was using them


class CatalogFile:
    """The database of one directory. Threads may share it; a forked child opens it anew.

    `room(bytes)` is called, with the ledger held, before a transaction that lets it grow by up to so many bytes; it
    makes room or raises TierFull. Every method raises CatalogDamaged, and TierUnavailable when the file system or
    another process is in the way.
    """

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        *,
        room: Callable[[int], None] = lambda _: None,
        batch_rows: int = 1024,
        wal_bytes: int = 4 << 20,
        patience: float = 5.0,
    ) -> None:
        self._directory = directory
        self._generation = 0  # number of the catalog that is open, 0 = none
        self.batch_rows = batch_rows  # most rows of one transaction
        self._ledger = ledger
        self._room = room
        self._wal_bytes = wal_bytes  # size at which the write-ahead log is copied into the database
        self._patience = patience  # seconds
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._held_for_fork = False
        self._log_is_lost = False  # it could not be synced, and the kernel doesn't try again to write the same bytes
        self._named_log = 0  # inode of the write-ahead log whose name is known to be on the device
        self.unsynced_since: float | None = None  # when this process committed what isn't yet (time.monotonic)
        before_fork(self)
        after_fork(self)

    # ---- Life

    @property
    def path(self) -> Path:
        """The database that is open, or was last."""
        return self._path_of(self._generation)

    def open(self) -> bool:
        """Open the catalog and read it through, or make an empty one; returns whether it was there.

        Raises CatalogDamaged when it can't be relied on, FormatError when a newer release wrote it. Who joins
        others that have done so need not: the first use opens it.
        """
        with self._ledger.hold(), self._lock, self._translated():
            self.close()
            mark = self._ledger.read()
            self._generation = self._newest()
            if self._generation == 0:
                self._generation = 1
                if mark is not None and mark.commits > 0:
                    raise CatalogDamaged("it is gone")
                schema.create(self.path, commits=0).close()
                self._connect()
                self._ledger.write(self._ledger.mark()._replace(commits=0, safe=0, boot=boot_id()))
                return False
            self._discard(self._generation)
            if self.path.stat().st_size == 0:
                raise CatalogDamaged("it is empty")
            connection = self._connect()
            schema.check(connection, thoroughly=True)
            if mark is None:
                raise CatalogDamaged("the ledger is damaged, and with it the proof that nothing is missing")
            self._check_commits(connection, mark)
            return True

    def close(self) -> None:
        """Close the connection; the last one of all processes folds the write-ahead log into the database."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()  # never fails for long: a log that can't be folded up stays

    def replace(self, namespaces: Mapping[int, NamespaceInfo], batches: Iterable[Sequence[Row]]) -> None:
        """Put a new catalog with this content in place of the old one, whatever that has become.

        `namespaces` is looked at after `batches`, which may fill it in.
        """
        with self._ledger.hold(), self._lock, self._translated():
            self.close()
            generation = max([0, *(number for number, _ in self._files())]) + 1
            self._discard(generation)
            # Killed from here to the end, the next one finds that the catalog is gone, and makes another.
            mark = self._ledger.mark()
            commits = mark.commits + 1
            self._ledger.write(mark._replace(commits=commits, safe=commits), through=True)
            fresh = self._path_of(generation).with_suffix(".new")
            connection = schema.create(fresh, commits=commits)
            try:
                connection.execute("BEGIN IMMEDIATE")
                for rows in batches:
                    connection.executemany(schema.UPSERT, rows)
                for namespace in namespaces.values():
                    schema.put_namespace(connection, namespace)
                connection.execute("COMMIT")
            finally:
                connection.close()
            fresh.rename(self._path_of(generation))
            sync_directory(self._directory)
            self._generation = generation
            self._connect()

    def discard_others(self) -> None:
        """Remove what is left of catalogs that were replaced; the ledger must be held."""
        self._discard(self._generation)

    def is_superseded(self) -> bool:
        """Whether another process has put another catalog in place of the one that is open."""
        return self._newest() > self._generation

    @property
    def reserve(self) -> int:
        """Bytes that should stay free for deletions: by them the catalog grows before it frees anything."""
        return self._wal_bytes + schema.growth(self.batch_rows)

    # ---- Power loss

    def sync(self) -> None:
        """Have all that was committed on the device, and say so in the ledger."""
        with self._ledger.hold(), self._lock, self._translated():
            connection = self._current_connection()
            self.unsynced_since = None
            mark = self._ledger.mark()
            self._sync_log()
            commits = schema.read_meta(connection, "commits")
            self._ledger.write(mark._replace(boot=boot_id(), safe=commits, unsynced=False), through=True)

    def _sync_log(self) -> None:
        """Have the log on the device; what was copied from it into the database, SQLite has synced."""
        try:
            fd = os.open(f"{self.path}-wal", os.O_RDONLY)
        except FileNotFoundError:
            return  # all is in the database
        try:
            self._log_is_lost = True
            os.fdatasync(fd)
            self._log_is_lost = False
            inode = os.fstat(fd).st_ino
        finally:
            os.close(fd)
        if inode != self._named_log:
            sync_directory(self._directory)
            self._named_log = inode

    # ---- Inside: transactions

    @contextlib.contextmanager
    def _transaction(
        self, rows: int, key_bytes: int | None = None, *, must: bool = False, lasting: Lasting = "later"
    ) -> Iterator[sqlite3.Connection]:
        """Commit what is done inside. `must`: a deletion, durable even where the capacity forbids it."""
        with self._ledger.hold(), self._lock, self._translated():
            connection = self._current_connection()
            try:
                self._room(schema.growth(rows, key_bytes) + self._unwritten())
            except TierFull:
                if not must:
                    raise
            connection = self._current_connection()  # making room can have replaced it
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                mark = self._ledger.mark()
                commits = self._check_commits(connection, mark) + 1
                connection.execute("UPDATE meta SET value=? WHERE name='commits'", (commits,))
                if lasting == "marked" and not mark.unsynced:
                    mark = mark._replace(unsynced=True)
                    self._ledger.write(mark, through=True)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            if self.unsynced_since is None:
                self.unsynced_since = time.monotonic()
            if lasting == "synced":
                self._sync_log()
            self._ledger.write(mark._replace(commits=commits))

    def _check_commits(self, connection: sqlite3.Connection, mark: Mark) -> int:
        commits = schema.read_meta(connection, "commits")
        if commits < mark.expected:
            raise CatalogDamaged(f"it has lost {mark.expected - commits} transactions")
        return commits

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            yield self._current_connection()

    def _unwritten(self) -> int:
        """Bytes that the database file will grow by when the log is copied into it."""
        with self._lock:
            if self._connection is None:
                return 0
            with self._translated():
                pages: int = self._connection.execute("PRAGMA page_count").fetchone()[0]
        with contextlib.suppress(FileNotFoundError):
            return max(0, pages * PAGE - self.path.stat().st_size)
        return 0

    # ---- Inside: files and connections

    def _path_of(self, generation: int) -> Path:
        return self._directory / f"catalog-{generation:06d}.db"

    def _files(self) -> Iterator[tuple[int, Path]]:
        """Yield (generation, path) of everything that bears the name of a catalog or belongs to one."""
        for path in self._directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                yield int(match[1]), path

    def _newest(self) -> int:
        return max([0, *(number for number, path in self._files() if path.suffix == ".db")])

    def _discard(self, but: int) -> None:
        """Remove all catalogs but one; what isn't a file, and so isn't ours, is set aside."""
        for generation, path in list(self._files()):
            if generation == but and ".new" not in path.name:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rename(path.with_name(f"{path.name}.set-aside-{time.time_ns()}"))
            else:
                path.unlink(missing_ok=True)

    def _current_connection(self) -> sqlite3.Connection:
        """Return a connection to the catalog that is in place now."""
        if self._directory in _out_of_reach:
            raise TierUnavailable("this process was forked while its parent used the catalog, and can't use it")
        if self._log_is_lost:
            self._log_is_lost = False
            raise CatalogDamaged("its log could not be synced")
        if self._connection is not None and self.path.exists():
            return self._connection
        self.close()
        generation = self._newest()
        if generation == 0:
            raise CatalogDamaged("there is none")
        self._generation = generation
        connection = self._connect()
        schema.check(connection, thoroughly=False)
        return connection

    def _connect(self) -> sqlite3.Connection:
        if not self.path.is_file():
            raise CatalogDamaged("it is no file")
        connection = sqlite3.connect(
            self.path,
            timeout=self._patience,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        try:
            schema.settle(connection, self._wal_bytes)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    # SQLite keeps count of a process's locks in its memory. A forked child inherits the count and not the locks: even
    # a new connection to the same file would go by them. So none is open during a fork.

    def _prepare_fork(self) -> None:
        self._held_for_fork = self._lock.acquire(timeout=self._patience)
        if self._held_for_fork and (self._connection is None or not self._connection.in_transaction):
            self.close()

    def _go_on_after_fork(self) -> None:
        if self._held_for_fork:
            self._held_for_fork = False
            self._lock.release()

    def _forget_parent(self) -> None:
        self._lock = threading.RLock()
        self._held_for_fork = False
        if self._connection is not None:
            # A thread of the parent's was too slow, or the very one that forked is inside of a transaction.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))  # it must not even be closed here
            self._connection = None
            _out_of_reach.add(self._directory)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.Error as error:
            in_the_way = any(Path(f"{self.path}{suffix}").is_dir() for suffix in ("", "-wal", "-shm"))
            # A database may say of itself that it is read-only, and ours never does.
            read_only = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY
            claimed = read_only and os.access(self.path, os.W_OK)
            if schema.describes_surroundings(error) and not in_the_way and not claimed:
                raise TierUnavailable(f"{self.path}: {error}") from error
            raise CatalogDamaged(f"{self.path}: {error}") from error
        except OSError as error:  # of the ledger, or while syncing
            raise TierUnavailable(f"{self._directory}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:  # in the message of an error, which quotes what is damaged
            raise CatalogDamaged(f"{self.path}: {error}") from error
