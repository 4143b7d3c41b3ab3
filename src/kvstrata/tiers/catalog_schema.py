"""What is in a catalog's database: tables, settings, and the checks of what is read from it."""

from __future__ import annotations

import sqlite3
import struct
from typing import TYPE_CHECKING

from kvstrata import _core
from kvstrata.errors import FormatError, TierUnavailable
from kvstrata.record import PAGE, NamespaceInfo

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ANY",
    "COLUMNS",
    "FORMAT",
    "LOG_FRAME",
    "SOUND",
    "UPSERT",
    "CatalogDamaged",
    "Row",
    "check",
    "create",
    "describes_surroundings",
    "growth",
    "put_namespace",
    "put_tag",
    "read_meta",
    "read_namespaces",
    "read_tags",
    "settle",
]

FORMAT = 1
LOG_FRAME = PAGE + 24  # bytes of a page in the write-ahead log

Row = tuple[int, bytes, int, int, int, int, int, int, int, int, int]
"""ns, key, seq, segment, offset, length, expires, version, epoch, flags, tags: as the native store takes them."""

_SCHEMA = {
    "meta": "CREATE TABLE meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "namespaces": (
        "CREATE TABLE namespaces(id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, version INTEGER NOT NULL,"
        " epoch INTEGER NOT NULL, immutable INTEGER NOT NULL, crc INTEGER NOT NULL)"
    ),
    "records": (
        "CREATE TABLE records(ns INTEGER NOT NULL, key BLOB NOT NULL, seq INTEGER NOT NULL,"
        " segment INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,"
        " expires INTEGER NOT NULL,"
        " version INTEGER NOT NULL, epoch INTEGER NOT NULL, flags INTEGER NOT NULL, tags INTEGER NOT NULL,"
        " PRIMARY KEY(ns, key)"
        ") WITHOUT ROWID"
    ),
    "tags": "CREATE TABLE tags(slot INTEGER PRIMARY KEY, seq INTEGER NOT NULL, crc INTEGER NOT NULL)",
    "records_by_segment": "CREATE INDEX records_by_segment ON records(segment)",
    "usage": (
        "CREATE TABLE usage(ns INTEGER PRIMARY KEY, records INTEGER NOT NULL, bytes INTEGER NOT NULL,"
        " quota INTEGER NOT NULL)"
    ),
    "count_added": (
        "CREATE TRIGGER count_added AFTER INSERT ON records BEGIN"
        " INSERT INTO usage VALUES(new.ns, 1, new.length, 0)"
        " ON CONFLICT(ns) DO UPDATE SET records=records+1, bytes=bytes+excluded.bytes; END"
    ),
    "count_changed": (
        "CREATE TRIGGER count_changed AFTER UPDATE OF length ON records BEGIN"
        " UPDATE usage SET bytes=bytes+new.length-old.length WHERE ns=new.ns; END"
    ),
    "count_removed": (
        "CREATE TRIGGER count_removed AFTER DELETE ON records BEGIN"
        " UPDATE usage SET records=records-1, bytes=bytes-old.length WHERE ns=old.ns; END"
    ),
}
ANY = (1 << 63) - 1  # above every sequence number
COLUMNS = "ns, key, seq, segment, offset, length, expires, version, epoch, flags, tags"
UPSERT = (
    f"INSERT INTO records({COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT(ns, key) DO UPDATE SET"
    " seq=excluded.seq, segment=excluded.segment, offset=excluded.offset, length=excluded.length,"
    " expires=excluded.expires, version=excluded.version, epoch=excluded.epoch, flags=excluded.flags,"
    " tags=excluded.tags"
    " WHERE excluded.seq >= records.seq"
)
# What a row must look like so that the store can take it: damage may have changed types and ranges.
SOUND = (
    "typeof(key)='blob' AND length(key) BETWEEN 1 AND 1024"
    " AND typeof(seq)='integer' AND seq BETWEEN 0 AND 72057594037927936"
    " AND typeof(segment)='integer' AND segment BETWEEN 1 AND 4294967295"
    " AND typeof(offset)='integer' AND offset BETWEEN 4096 AND 140737488355328 AND offset % 64 = 0"
    " AND typeof(length)='integer' AND length BETWEEN 128 AND 140737488355328 AND length % 64 = 0"
    " AND typeof(expires)='integer' AND expires BETWEEN 0 AND 9223372036854775806"
    " AND typeof(flags)='integer' AND flags BETWEEN 0 AND 255"
    " AND typeof(tags)='integer'"
)
_SURROUNDINGS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_AUTH,
}


class CatalogDamaged(TierUnavailable):
    """The catalog can't be used any more and has to be replaced."""


def describes_surroundings(error: sqlite3.Error) -> bool:
    """Whether an error speaks of locks, space or the device, not of what is in the database."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    if code in (sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS):
        return False
    return code & 0xFF in _SURROUNDINGS


def create(path: Path, *, commits: int) -> sqlite3.Connection:
    """Make an empty catalog that counts `commits` already; without a log until `settle`."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        path.chmod(0o600)
        connection.execute(f"PRAGMA page_size={PAGE}")
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.values():
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={FORMAT}")
        connection.executemany("INSERT INTO meta VALUES(?,?)", [("format", FORMAT), ("commits", commits)])
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def settle(connection: sqlite3.Connection, wal_bytes: int) -> None:
    """Apply the settings of every connection; raises TierUnavailable when the file system can't take them.

    The write-ahead log is copied into the database once it has `wal_bytes` in use: a file that was once as long
    stays so, hence SQLite's own count of frames decides. It never waits for a reader.
    """
    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise TierUnavailable(f"the file system can't hold a catalog: its journal mode is {mode!r}, not 'wal'")
    for setting in (
        "synchronous=NORMAL",
        f"wal_autocheckpoint={max(1, wal_bytes // LOG_FRAME)}",
        "cache_spill=OFF",  # else a page could be logged more than once
        "temp_store=MEMORY",
        "mmap_size=0",  # a truncated mapped file would kill the process
        "cell_size_check=ON",
        "trusted_schema=OFF",
    ):
        connection.execute(f"PRAGMA {setting}")


def check(connection: sqlite3.Connection, *, thoroughly: bool) -> None:
    """Raise CatalogDamaged when this is no sound catalog, FormatError when a newer release wrote it.

    `thoroughly` reads the whole database.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != FORMAT:
        # A newer release says so in two places; a flipped bit does in one.
        if version > FORMAT and read_meta(connection, "format") == version:
            raise FormatError(f"the catalog has format {version}; this release reads up to {FORMAT}")
        raise CatalogDamaged(f"format {version}, which is none")
    schema = connection.execute("SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")
    if dict(schema.fetchall()) != _SCHEMA or read_meta(connection, "format") != FORMAT:
        raise CatalogDamaged("it has other tables than it should")
    if thoroughly:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise CatalogDamaged(str(verdict))
    read_namespaces(connection)


def read_meta(connection: sqlite3.Connection, name: str) -> int:
    """Return a number by its name; raises CatalogDamaged."""
    row = connection.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
    if row is None or not isinstance(row[0], int):
        raise CatalogDamaged(f"it lacks {name!r}")
    return row[0]


def read_namespaces(connection: sqlite3.Connection) -> list[NamespaceInfo]:
    """Return all namespaces; raises CatalogDamaged when a row isn't as it was written."""
    found = []
    for number, name, version, epoch, immutable, crc in connection.execute(
        "SELECT id, name, version, epoch, immutable, crc FROM namespaces ORDER BY id"
    ):
        try:
            namespace = NamespaceInfo(number, name.decode(), version, epoch, bool(immutable))
            intact = _namespace_crc(namespace) == crc
        except (AttributeError, UnicodeDecodeError, TypeError, struct.error):
            intact = False
        if not intact:
            raise CatalogDamaged(f"the row of namespace {number!r} is damaged")
        found.append(namespace)
    return found


def put_namespace(connection: sqlite3.Connection, namespace: NamespaceInfo) -> None:
    """Write the row of a namespace."""
    connection.execute(
        "INSERT OR REPLACE INTO namespaces(id, name, version, epoch, immutable, crc) VALUES(?,?,?,?,?,?)",
        (
            namespace.id,
            namespace.name.encode(),
            namespace.version,
            namespace.epoch,
            int(namespace.immutable),
            _namespace_crc(namespace),
        ),
    )


def read_tags(connection: sqlite3.Connection) -> list[tuple[int, int]]:
    """Return (slot, seq) of each removed tag; raises CatalogDamaged when a row isn't as it was written."""
    found = []
    for slot, seq, crc in connection.execute("SELECT slot, seq, crc FROM tags"):
        try:
            intact = _tag_crc(slot, seq) == crc
        except struct.error:
            intact = False
        if not intact:
            raise CatalogDamaged(f"the row of tag {slot!r} is damaged")
        found.append((slot, seq))
    return found


def put_tag(connection: sqlite3.Connection, slot: int, seq: int) -> None:
    """Write the row of a removed tag, unless there is one with a higher number."""
    connection.execute(
        "INSERT INTO tags(slot, seq, crc) VALUES(?,?,?) ON CONFLICT(slot) DO UPDATE SET seq=excluded.seq,"
        " crc=excluded.crc WHERE excluded.seq > tags.seq",
        (slot, seq, _tag_crc(slot, seq)),
    )


def growth(rows: int, key_bytes: int | None = None) -> int:
    """Return how many bytes a transaction that touches `rows` rows can add to the files.

    Each row changes a leaf of the table and up to two of the index. Long keys, of `key_bytes` together (None:
    of any length), need pages of their own and split many; a few inner pages come on top.
    """
    if key_bytes is None:
        key_bytes = 1024 * rows
    return (3 * rows + key_bytes // 128 + 12) * LOG_FRAME + 32768


def _tag_crc(slot: int, seq: int) -> int:
    return _core.crc32c(struct.pack("<HQ", slot, seq))


def _namespace_crc(namespace: NamespaceInfo) -> int:
    numbers = struct.pack("<IIIB", namespace.id, namespace.version, namespace.epoch, namespace.immutable)
    return _core.crc32c(numbers + namespace.name.encode())
