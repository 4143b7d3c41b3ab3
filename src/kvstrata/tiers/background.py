"""A thread for work that is wanted now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvstrata.threads import new_thread

__all__ = ["OnDemand"]


class OnDemand:
    """Does `work` in a thread of that name, once for all who have wanted it since it last began.

    The thread starts when work is first wanted. What `work` returns is how long to pause after it, in s; it must not
    raise, and may want itself again.
    """

    def __init__(self, name: str, work: Callable[[], float]) -> None:
        self._name = name
        self._work = work
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self.stopped = threading.Event()
        """Set once `stop` was called: `work` may look at it, or wait for it."""

    def want(self) -> None:
        """Have it done soon; returns at once."""
        self._wanted.set()
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self.stopped.is_set():
                    self._thread = new_thread(self._run, self._name)
                    self._thread.start()

    def stop(self) -> None:
        """End the thread, once the work under way is done."""
        self.stopped.set()
        self._wanted.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while not self.stopped.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if not self.stopped.is_set():
                self.stopped.wait(self._work())
