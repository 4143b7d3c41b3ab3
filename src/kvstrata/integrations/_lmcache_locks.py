"""Locks of LMCache's L2 adapters: what somebody is about to load stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstrata._core import Pin

__all__ = ["Locks"]


@dataclass
class _Lock:
    count: int
    nbytes: int
    until: float
    pin: Pin | None


class Locks:
    """Counted locks on records, of `limit` bytes in all; each is a pin, once its record is in memory.

    Pins belong to this process: when it dies they go. A lock that nobody lets go ends `timeout` seconds after it was
    taken last. Thread-safe.
    """

    def __init__(self, limit: int, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._timeout = timeout
        self._clock = clock
        self._mutex = threading.Lock()
        self._locks: dict[bytes, _Lock] = {}
        self._nbytes = 0
        self._refused = self._expired = 0

    def lock(self, key: bytes, nbytes: int, pin: Pin | None) -> bool:
        """Lock a record once more, with its pin if it lies in memory; False where that would exceed the limit.

        The pin is kept, or released.
        """
        until = self._clock() + self._timeout
        with self._mutex:
            held = self._locks.get(key)
            if held is not None:
                held.count += 1
                held.until = until
                if held.pin is None:
                    held.pin, pin = pin, None
            elif self._nbytes + nbytes <= self.limit:
                self._locks[key] = _Lock(1, nbytes, until, pin)
                self._nbytes += nbytes
                pin = None
            else:
                self._refused += 1
            granted = key in self._locks
        if pin is not None:
            pin.release()
        return granted

    def unlock(self, keys: Sequence[bytes]) -> None:
        """Take one lock off each; what isn't locked is left alone."""
        with self._mutex:
            for key in keys:
                held = self._locks.get(key)
                if held is not None:
                    held.count -= 1
                    if not held.count:
                        self._drop(key)

    def expire(self) -> None:
        """End locks that nobody has let go for too long."""
        now = self._clock()
        with self._mutex:
            for key in [key for key, held in self._locks.items() if held.until <= now]:
                self._drop(key)
                self._expired += 1

    def clear(self) -> None:
        """End all locks."""
        with self._mutex:
            for key in list(self._locks):
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        held = self._locks.pop(key)
        self._nbytes -= held.nbytes
        if held.pin is not None:
            held.pin.release()

    def __contains__(self, key: bytes) -> bool:
        with self._mutex:
            return key in self._locks

    def unpinned(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return those that are locked, but not in memory yet."""
        with self._mutex:
            return [key for key in keys if (held := self._locks.get(key)) is not None and held.pin is None]

    def attach(self, key: bytes, pin: Pin) -> None:
        """Let a pin stand for a lock, if it is still held; else it is released."""
        with self._mutex:
            held = self._locks.get(key)
            if held is not None and held.pin is None:
                held.pin = pin
                return
        pin.release()

    def views(self, keys: Sequence[bytes]) -> list[memoryview | None]:
        """Return what locks hold in memory; it stays while there is a view of it, also when it is unlocked."""
        with self._mutex:
            locks = [self._locks.get(key) for key in keys]
            return [None if held is None or held.pin is None else memoryview(held.pin) for held in locks]

    def stats(self) -> dict[str, int]:
        """Return how much is locked, and how often a lock was refused or had to be ended."""
        with self._mutex:
            return {
                "locked_keys": len(self._locks),
                "locked_bytes": self._nbytes,
                "locks": sum(held.count for held in self._locks.values()),
                "locks_refused": self._refused,
                "locks_expired": self._expired,
            }
