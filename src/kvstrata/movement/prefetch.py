"""Prefetch: bringing up in the background what somebody is about to ask for.

A hint, not a promise: what can't be brought, for whatever reason, is counted, and the load that comes later finds out.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvstrata.threads import new_thread
from kvstrata.tiers.base import Key

if TYPE_CHECKING:
    from kvstrata._core import Pin

__all__ = ["DEFAULT_IN_FLIGHT", "Prefetch", "Prefetcher"]

log = logging.getLogger("kvstrata")

DEFAULT_IN_FLIGHT = "64MiB"
_MOST_QUEUED = 64  # requests; the oldest is dropped for the newest, whose load is nearer
_AT_ONCE = 256  # keys that are looked up at once

Sizes = Callable[[int, list[Key]], list[int]]
"""Of keys of a namespace, the bytes of each record that lies below memory only; 0 for others."""
Load = Callable[[int, list[Key]], "Sequence[Pin | memoryview | None]"]
Fetch = Callable[[list[Key]], "Sequence[Pin | memoryview | None]"]
"""Brings up, of keys of one namespace, what lies on this host nowhere but elsewhere; a view is what had no room."""


class Prefetch:
    """A request that is carried out in the background. Threads may share it; in a forked child nothing goes on."""

    def __init__(self, ns: int, keys: list[Key], room: int, fetch: Fetch | None = None) -> None:
        self.ns = ns
        self.keys = keys
        self.room = room
        self.fetch = fetch
        self.loaded = 0
        """Records that were brought into memory so far."""
        self.cancelled = False
        self._ended = threading.Event()
        self._pid = os.getpid()

    @property
    def done(self) -> bool:
        """Whether nothing goes on any more: all was brought that could be, or it was cancelled or dropped."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Bring nothing more, except what is being read now."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, for `timeout` seconds at most; returns whether it is."""
        if self._pid != os.getpid():
            return self.done
        return self._ended.wait(timeout)

    def end(self) -> None:
        """For the one who carries it out: nothing more will come."""
        self._ended.set()


class _Elsewhere:
    """How many records are asked for at once where nobody knows their sizes: as those are that came before."""

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._records = self._nbytes = 0
        self.at_once = 1

    @property
    def mean(self) -> int:
        """Bytes of a record that came."""
        return self._nbytes // self._records if self._records else 0

    def seen(self, records: int, nbytes: int) -> None:
        """Note what a portion brought."""
        self._records += records
        self._nbytes += nbytes
        fitting = self._in_flight // max(1, self.mean) if self._records else 2 * self.at_once
        self.at_once = max(1, min(fitting, _AT_ONCE))


class Prefetcher:
    """Carries out prefetches for one cache, one after the other, with at most `in_flight` bytes being read at a time.

    (A record that is larger than that comes alone.) Its thread lives as long as there is something to do.
    """

    def __init__(self, sizes: Sizes, load: Load, in_flight: int) -> None:
        self._sizes = sizes
        self._load = load
        self._in_flight = in_flight
        self._lock = threading.Lock()
        self._queue: deque[Prefetch] = deque()
        self._current: Prefetch | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._bytes_now = 0
        self._numbers = dict.fromkeys(
            ("requests", "done_requests", "dropped_requests", "cancelled_requests", "failed_requests",
             "cut_requests", "loaded_records", "loaded_bytes"), 0
        )  # fmt: skip

    def request(self, ns: int, keys: list[Key], room: int, fetch: Fetch | None = None) -> Prefetch:
        """Queue keys of a namespace, to be brought in that order as long as they fit into `room` bytes.

        What isn't on this host is brought by `fetch`, if there is one.
        """
        wanted = Prefetch(ns, keys, room, fetch)
        with self._lock:
            self._numbers["requests"] += 1
            if self._stopped or not self._in_flight:
                self._finish(wanted, "dropped_requests")
                return wanted
            if len(self._queue) >= _MOST_QUEUED:
                self._finish(self._queue.popleft(), "dropped_requests")
            self._queue.append(wanted)
            if self._thread is None:
                self._thread = new_thread(self._run, "kvstrata-prefetch")
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter ends, or the system has no more threads
                    self._thread = None
                    self._finish(self._queue.pop(), "dropped_requests")
        return wanted

    def stats(self) -> dict[str, int]:
        """Return counters of this process, and what is queued and in flight now.

        "cut_requests" ended early because the memory was full, or the request too large for it.
        """
        with self._lock:
            return {**self._numbers, "queued_requests": len(self._queue), "in_flight_bytes": self._bytes_now}

    def stop(self) -> None:
        """Drop what is queued, and return when nothing is read any more."""
        with self._lock:
            self._stopped = True
            while self._queue:
                self._finish(self._queue.popleft(), "dropped_requests")
            if self._current is not None:
                self._current.cancel()
            thread = self._thread
        if thread is not None:
            thread.join()

    # ---- In its thread

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = self._current = None
                    return
                request = self._current = self._queue.popleft()
            try:
                how = self._carry_out(request)
            except Exception as error:  # noqa: BLE001 - a hint has nobody to raise to
                log.debug("a prefetch failed: %s", error)
                how = "failed_requests"
            with self._lock:
                self._bytes_now = 0
                self._finish(request, how)

    def _carry_out(self, request: Prefetch) -> str:
        left = request.room
        elsewhere = _Elsewhere(self._in_flight)
        for bring, keys, size in self._portions(request, elsewhere):
            if request.cancelled:
                return "cancelled_requests"
            if size > left:
                return "cut_requests"
            with self._lock:
                self._bytes_now = size
            values = bring(keys)
            brought = [value for value in values if value is not None and not isinstance(value, memoryview)]
            nbytes = sum(map(len, brought))
            for pin in brought:
                pin.release()
            if bring is request.fetch:
                elsewhere.seen(len(brought), nbytes)
                size = nbytes
            left -= size
            request.loaded += len(brought)
            with self._lock:
                self._numbers["loaded_records"] += len(brought)
                self._numbers["loaded_bytes"] += nbytes
            if any(isinstance(value, memoryview) for value in values):
                return "cut_requests"  # memory is full of what may not leave
        return "cancelled_requests" if request.cancelled else "done_requests"

    def _portions(self, request: Prefetch, elsewhere: _Elsewhere) -> Iterator[tuple[Fetch, list[Key], int]]:
        """Yield keys that aren't in memory, what brings them, and about how many bytes: as many as may be in flight."""
        load = functools.partial(self._load, request.ns)
        portion: list[Key] = []
        size = 0
        for start in range(0, len(request.keys), _AT_ONCE):
            keys = request.keys[start : start + _AT_ONCE]
            rest: list[Key] = []
            for key, nbytes in zip(keys, self._sizes(request.ns, keys), strict=True):
                if not nbytes:
                    rest.append(key)
                    continue
                if portion and size + nbytes > self._in_flight:
                    yield load, portion, size
                    portion, size = [], 0
                portion.append(key)
                size += nbytes
            if request.fetch is None:
                continue
            if portion:
                yield load, portion, size
                portion, size = [], 0
            while rest:
                some, rest = rest[: elsewhere.at_once], rest[elsewhere.at_once :]
                yield request.fetch, some, len(some) * elsewhere.mean
        if portion:
            yield load, portion, size

    def _finish(self, request: Prefetch, how: str) -> None:
        self._numbers[how] += 1
        request.end()
