"""The small file of a disk tier whose lock serialises its writers, and which says how far they came.

Everything that allocates in the directory or changes the catalog holds the lock: so the capacity can be a
hard bound, and a catalog can be replaced while other processes have it open. The kernel releases the lock of
a process that dies.

The counter of commits stands outside of SQLite on purpose. A damaged write-ahead log makes SQLite lose its
last transactions without a word, and a deletion among them would be undone; a catalog that has fewer commits
than the ledger counts is therefore taken for damaged.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvstrata import _core
from kvstrata.errors import FormatError, TierUnavailable
from kvstrata.forking import after_fork

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Ledger", "Mark", "boot_id"]

# magic, format, commits, segment, seed, boot, safe, unsynced, checksum of the 60 bytes before
_LAYOUT = struct.Struct("<4sIQQI16sQI4xI")
_MAGIC = b"KVSL"
FORMAT = 1
_PATIENCE_S = 5.0


@functools.cache
def boot_id() -> bytes:
    """Return 16 bytes that differ after each start of the machine; where it doesn't tell, in each process."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return os.urandom(16)


def _lock_timeout() -> float:
    try:
        return max(0.0, float(os.environ.get("KVSTRATA_LOCK_TIMEOUT", "")))
    except ValueError:
        return _PATIENCE_S


class Mark(NamedTuple):
    """How far the writers of a directory came."""

    commits: int = 0
    """Transactions that were committed to the catalog."""
    segment: int = 0
    """The highest segment number that was ever given out."""
    seed: int = 0
    """What the header checksums of the cache's records start from."""
    boot: bytes = bytes(16)
    """Of which start of the machine all this is: what was not synced before another one may be lost."""
    safe: int = 0
    """Commits that are known to be synced."""
    unsynced: bool = False
    """Whether deletions of mutable records may be among the commits that are not."""

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the machine has been running since it was written."""
        return self.boot == boot_id()

    @property
    def expected(self) -> int:
        """How many commits the catalog has at least, if nothing is damaged."""
        return self.commits if self.is_of_this_boot else self.safe


class Ledger:
    """The lock of a directory and its mark. One object may be shared by threads; `hold` may be nested.

    Who wants it waits for `patience` seconds at most; by default 5, or what $KVSTRATA_LOCK_TIMEOUT says.
    """

    def __init__(self, directory: Path, *, seed: int = 0, patience: float | None = None) -> None:
        self.path = directory / "ledger"
        self._known = Mark(seed=seed)  # what to go on with when the file gets damaged
        self._patience = _lock_timeout() if patience is None else patience
        self._fd = -1
        self._depth = 0
        self._thread_lock = threading.RLock()
        after_fork(self)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep all other threads and processes out; raises TierUnavailable when that takes too long."""
        if not self._thread_lock.acquire(timeout=self._patience):
            raise TierUnavailable(f"another thread holds {self.path} for more than {self._patience} s")
        try:
            if self._depth == 0:
                self._lock_file()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._thread_lock.release()

    def read(self) -> Mark | None:
        """Return the mark, None when there is none or it is damaged. The lock must be held.

        Raises FormatError when a newer release wrote it.
        """
        data = os.pread(self._fd, _LAYOUT.size, 0)
        if len(data) < _LAYOUT.size:
            return None
        magic, version, commits, segment, seed, boot, safe, unsynced, checksum = _LAYOUT.unpack(data)
        if magic != _MAGIC or _core.crc32c(data[:-4]) != checksum:
            return None
        if version > FORMAT:
            raise FormatError(f"{self.path} has format {version}; this release reads up to {FORMAT}")
        self._known = Mark(commits, segment, seed, boot, safe, unsynced & 1 == 1)
        return self._known

    def mark(self) -> Mark:
        """Return the mark, or the last that was seen where it is damaged. The lock must be held."""
        return self.read() or self._known

    def write(self, mark: Mark, *, through: bool = False) -> None:
        """Replace the mark, with `through` also on the device. The lock must be held."""
        self._known = mark
        data = _LAYOUT.pack(_MAGIC, FORMAT, *mark, 0)[:-4]
        before = os.pread(self._fd, _LAYOUT.size, 0)
        os.pwrite(self._fd, data + _core.crc32c(data).to_bytes(4, "little"), 0)
        if through:
            try:
                os.fdatasync(self._fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.pwrite(self._fd, before, 0)  # or what isn't on the device would pass for it
                raise

    def close(self) -> None:
        """Give the file back; it is opened again when needed."""
        with self._thread_lock:
            self._close_file()

    def __del__(self) -> None:
        self._close_file()

    def _lock_file(self) -> None:
        deadline = time.monotonic() + self._patience
        pause = 0.0002
        while True:
            try:
                if self._fd < 0:
                    self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    return
                self._close_file()
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TierUnavailable(
                        f"another process holds {self.path} for more than {self._patience} s; is it stopped?"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 1.5, 0.01)
            except OSError as error:
                raise TierUnavailable(f"{self.path} can't be opened: {error.strerror}") from error

    def _is_current(self) -> bool:
        """Whether the locked file is still in the directory: a lock on a removed one excludes nobody."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._fd))

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _forget_parent(self) -> None:
        # The lock belongs to the open file, which a child shares: held open here it would outlive the parent.
        self._thread_lock = threading.RLock()
        self._depth = 0
        self._close_file()
