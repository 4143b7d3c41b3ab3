"""What a tier counts, and how it tells of faults: each kind once in the log, and every one in a number."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
from collections import Counter

from kvstrata.forking import after_fork

__all__ = ["Counters", "errno_name", "reason"]

log = logging.getLogger("kvstrata.disk")


class Counters:
    """Numbers by name, for all threads."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._numbers: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._lock = threading.Lock()
        after_fork(self)

    def add(self, name: str, number: int = 1) -> None:
        """Add to a number."""
        with self._lock:
            self._numbers[name] += number

    def fault(self, kind: str, error: object) -> None:
        """Count a fault under "error <kind>" and log the first of its kind."""
        with self._lock:
            self._numbers[f"error {kind}"] += 1
            first = kind not in self._logged
            self._logged.add(kind)
        if first:
            log.warning("%s: %s: %s (further faults of this kind are only counted)", self._subject, kind, error)

    def snapshot(self) -> dict[str, int]:
        """Return all numbers."""
        with self._lock:
            return dict(self._numbers)

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()


_SQLITE = {  # it keeps the number to itself
    sqlite3.SQLITE_FULL: "ENOSPC",
    sqlite3.SQLITE_IOERR: "EIO",
    sqlite3.SQLITE_READONLY: "EROFS",
    sqlite3.SQLITE_PERM: "EACCES",
    sqlite3.SQLITE_NOMEM: "ENOMEM",
}


def reason(error: BaseException) -> str:
    """Return what is behind an error in a word: "ENOSPC" and the like, else SQLite's name for it or "catalog"."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return errno_name(cause.errno)
        if isinstance(cause, sqlite3.Error) and hasattr(cause, "sqlite_errorcode"):
            return _SQLITE.get(cause.sqlite_errorcode & 0xFF, cause.sqlite_errorname)
        cause = cause.__cause__
    return "catalog"


def errno_name(code: int | None) -> str:
    """Return "ENOSPC" and the like."""
    return errno.errorcode.get(code or 0, f"errno {code}")
