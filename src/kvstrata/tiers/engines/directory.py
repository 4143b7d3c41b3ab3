"""The directory of an engine: who may open it, and what happens to one that is damaged."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.errors import TierUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FileLock", "boot_id", "set_aside"]

_LONGEST_PAUSE_S = 0.01
_log = logging.getLogger("kvstrata")


def set_aside(directory: Path, why: object) -> None:
    """Move a damaged directory to `<name>.damaged`, in place of the last such one, and say so in the log."""
    other = directory.with_name(f"{directory.name}.damaged")
    shutil.rmtree(other, ignore_errors=True)
    directory.rename(other)
    _log.warning("kvstrata: %s is damaged and begun anew; what was in it is in %s: %s", directory, other, why)


def boot_id() -> str:
    """Return what is another one each time that the machine is booted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class FileLock:
    """An flock on a file that is made if need be; the kernel lets go of it when a process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, *, shared: bool = False, timeout_s: float = 0.0) -> bool:
        """Take it, or change how it is held; False when others had it until the time, in s, was over."""
        until = time.monotonic() + timeout_s
        pause = 0.0001
        while True:
            try:
                fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                time.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                return True

    def release(self) -> None:
        """Let go of it."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextmanager
    def held(self, timeout_s: float) -> Iterator[None]:
        """Hold it for a block; raises TierUnavailable when it can't be had in that time, in s."""
        if not self.take(timeout_s=timeout_s):
            raise TierUnavailable(f"{self.path} is locked by another process for more than {timeout_s:g} s")
        try:
            yield
        finally:
            self.release()

    def close(self) -> None:
        """Close the file. In a forked child the parent keeps the lock."""
        os.close(self._fd)
