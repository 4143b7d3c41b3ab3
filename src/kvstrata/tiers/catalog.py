"""The catalog of a disk tier: its namespaces and where records lie, kept by SQLite across restarts.

It is never trusted: a record's own header decides what it is. So a row that lies costs a miss, and only what
no record can say, the epoch and version of a namespace, has a checksum here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from kvstrata.errors import TierUnavailable
from kvstrata.record import NamespaceInfo
from kvstrata.tiers import catalog_schema as schema
from kvstrata.tiers.catalog_file import CatalogFile, Lasting
from kvstrata.tiers.catalog_schema import FORMAT, CatalogDamaged, Row

__all__ = ["FORMAT", "Catalog", "CatalogDamaged", "Lasting", "Move", "Row", "Usage"]

Move = tuple[int, int, int, bytes, int, int, int]
"""To which segment and offset, of which ns, key and seq, from which segment and offset."""


class Usage(NamedTuple):
    """What the rows of a namespace come to; bytes are those of whole records, quota 0 is none."""

    records: int
    bytes: int
    quota: int


class Catalog(CatalogFile):
    """The catalog of one directory: what is asked of it and told to it. Every method raises as those of its file do."""

    # ---- Namespaces

    def load_namespaces(self) -> list[NamespaceInfo]:
        """Return all namespaces."""
        with self._reading() as connection:
            return schema.read_namespaces(connection)

    def register_namespace(self, wanted: NamespaceInfo) -> NamespaceInfo:
        """Return the namespace of this name, made from `wanted` when there is none, whose id 0 means any.

        A higher version or epoch in `wanted` is taken over; with a version the epoch rises too, as it does in
        the store. Raises TierUnavailable when its id is another's.
        """
        lasting: Lasting = "synced" if wanted.immutable or wanted.version > 1 else "marked"
        with self._transaction(1, lasting=lasting) as connection:
            known = schema.read_namespaces(connection)
            found = next((namespace for namespace in known if namespace.name == wanted.name), None)
            if found is None:
                number = wanted.id or max((namespace.id for namespace in known), default=0) + 1
                if any(namespace.id == number for namespace in known):
                    raise TierUnavailable(f"namespace number {number} of {wanted.name!r} belongs to another")
                found = NamespaceInfo(number, wanted.name, wanted.version, wanted.epoch, wanted.immutable)
            elif wanted.id not in (0, found.id):
                raise TierUnavailable(f"namespace {wanted.name!r} has number {found.id}, not {wanted.id}")
            epoch = found.epoch + 1 if wanted.version > found.version else found.epoch
            merged = NamespaceInfo(
                found.id,
                found.name,
                max(found.version, wanted.version),
                max(epoch, wanted.epoch),
                wanted.immutable,
            )
            schema.put_namespace(connection, merged)
        return merged

    def usage(self) -> dict[int, Usage]:
        """Return by namespace what its rows come to, and its quota."""
        with self._reading() as connection:
            found = connection.execute("SELECT ns, records, bytes, quota FROM usage").fetchall()
        return {ns: Usage(*numbers) for ns, *numbers in found}

    def set_quota(self, ns: int, quota: int) -> None:
        """Commit how many bytes a namespace may have, 0 = any number."""
        with self._transaction(1) as connection:
            connection.execute(
                "INSERT INTO usage VALUES(?,0,0,?) ON CONFLICT(ns) DO UPDATE SET quota=excluded.quota", (ns, quota)
            )

    def oldest(self, ns: int, size: int) -> list[tuple[bytes, int]]:
        """Return key and number of the records of a namespace that were written first, `size` bytes or a bit more."""
        found: list[tuple[bytes, int]] = []
        with self._reading() as connection:
            for key, seq, length in connection.execute(
                "SELECT key, seq, length FROM records WHERE ns=? ORDER BY segment, offset", (ns,)
            ):
                if size <= 0:
                    break
                found.append((key, seq))
                size -= length
        return found

    # ---- Tags

    def load_tags(self) -> list[tuple[int, int]]:
        """Return (slot, seq) of each removed tag: records with the tag and a lower number are not there."""
        with self._reading() as connection:
            return schema.read_tags(connection)

    def remove_tag(self, slot: int, seq: int) -> None:
        """Commit that records with this tag and a lower number are not there."""
        with self._transaction(1, must=True, lasting="synced") as connection:
            schema.put_tag(connection, slot, seq)

    # ---- Records

    def rows(self, batch: int = 8192) -> Iterator[list[Row]]:
        """Yield the rows of all records that may still be served, in batches, each read by itself."""
        now = time.time_ns() // 1_000_000
        for namespace in self.load_namespaces():
            key = b""
            while True:
                with self._reading() as connection:
                    rows: list[Row] = connection.execute(
                        f"SELECT {schema.COLUMNS} FROM records WHERE ns=? AND key>? AND epoch=? AND version=?"
                        f" AND (expires=0 OR expires>?) AND {schema.SOUND} ORDER BY key LIMIT ?",
                        (namespace.id, key, namespace.epoch, namespace.version, now, batch),
                    ).fetchall()
                if rows:
                    yield rows
                if len(rows) < batch:
                    break
                if rows[-1][1] <= key:
                    raise CatalogDamaged("its rows are out of order")
                key = rows[-1][1]

    def add(self, rows: Sequence[Row], live: Callable[[], Sequence[bool]]) -> list[bool]:
        """Commit the rows of those records that `live` says still count; returns which those are.

        `live` is asked while no deletion can be committed, so none can be overtaken. At most batch_rows rows.
        Raises TierFull when the catalog has no room for them.
        """
        with self._transaction(len(rows), sum(len(row[1]) for row in rows)) as connection:
            alive = list(live())
            connection.executemany(schema.UPSERT, [row for row, wanted in zip(rows, alive, strict=True) if wanted])
        return alive

    def move(self, moves: Sequence[Move]) -> None:
        """Commit that records lie elsewhere, those that are still where they were. At most batch_rows of them."""
        with self._transaction(len(moves), sum(len(move[3]) for move in moves)) as connection:
            connection.executemany(
                "UPDATE records SET segment=?, offset=? WHERE ns=? AND key=? AND seq=? AND segment=? AND offset=?",
                moves,
            )

    def delete(self, ns: int, keys: Iterable[tuple[bytes, int | None]], lasting: Lasting = "marked") -> int:
        """Commit the deletion of rows, of those with a lower number where one is given; returns how many."""
        wanted = [(ns, key, schema.ANY if below is None else below) for key, below in keys]
        deleted = 0
        for start in range(0, len(wanted), self.batch_rows):
            part = wanted[start : start + self.batch_rows]
            key_bytes = sum(len(key) for _, key, _ in part)
            with self._transaction(len(part), key_bytes, must=True, lasting=lasting) as connection:
                deleted += connection.executemany("DELETE FROM records WHERE ns=? AND key=? AND seq<?", part).rowcount
        return deleted

    def delete_prefix(self, ns: int, prefix: bytes, below: int, lasting: Lasting = "marked") -> int:
        """Commit the deletion of rows whose key starts with `prefix`, and whose number is lower than `below`."""
        condition, bounds = "ns=? AND seq<? AND key>=?", (ns, below, prefix)
        after = prefix.rstrip(b"\xff")
        if after:  # the first key that is no more of them
            end = after[:-1] + bytes([after[-1] + 1])
            return self._delete_where(condition + " AND key<?", (*bounds, end), lasting)
        return self._delete_where(condition, bounds, lasting)

    def drop_segment(self, segment: int, *, beyond: int = 0) -> int:
        """Commit the deletion of all rows of `segment` that end after byte `beyond`; returns how many.

        Synced: the index forgets them with that, and a key that isn't known to be on disk is overwritten and deleted
        without a transaction.
        """
        deleted = self._delete_where("segment=? AND offset+length>?", (segment, beyond), "synced")
        self._shrink()
        return deleted

    def drop_stale(self) -> int:
        """Delete the rows that can't be served any more: of older epochs and versions, expired, unsound."""
        now = time.time_ns() // 1_000_000
        deleted = 0
        for namespace in self.load_namespaces():
            deleted += self._delete_where(
                f"ns=? AND (epoch<>? OR version<>? OR (expires>0 AND expires<=?) OR NOT ({schema.SOUND}))",
                (namespace.id, namespace.epoch, namespace.version, now),
            )
        return deleted

    def drop_mutable(self) -> None:
        """Delete the rows of all namespaces that aren't immutable."""
        for namespace in self.load_namespaces():
            if not namespace.immutable:
                self._delete_where("ns=?", (namespace.id,))

    # ---- Inside

    def _delete_where(self, condition: str, arguments: tuple[int | bytes, ...], lasting: Lasting = "later") -> int:
        deleted = 0
        each: Lasting = "later" if lasting == "synced" else lasting
        while True:
            with self._transaction(self.batch_rows, must=True, lasting=each) as connection:
                found = connection.execute(
                    f"SELECT ns, key FROM records WHERE {condition} LIMIT ?", (*arguments, self.batch_rows)
                ).fetchall()
                connection.executemany("DELETE FROM records WHERE ns=? AND key=?", found)
            deleted += len(found)
            if len(found) < self.batch_rows:
                break
        if lasting == "synced":  # all at once
            with self._ledger.hold(), self._lock, self._translated():
                self._sync_log()
        return deleted

    def _shrink(self) -> None:
        """Give pages back to the file system, some at a time, when a quarter of the database is empty."""
        with self._reading() as connection:
            free, pages = (
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count")
            )
        if free > max(64, pages // 4):
            with self._transaction(self.batch_rows, must=True) as connection:
                for _ in range(min(free, 2 * self.batch_rows)):
                    connection.execute("PRAGMA incremental_vacuum(1)")  # of a larger number one is done, too
