"""Write-behind: what is put in memory reaches the tier below soon after, in batches.

A record can't leave memory before the tier below has it. When that tier falls behind, puts wait for it (the store
sees to that), so memory is never full of what can't leave.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from kvstrata import _core
from kvstrata.errors import TierUnavailable
from kvstrata.threads import new_thread, thread_pool
from kvstrata.tiers.base import Tier

__all__ = ["WriteBehind"]

_log = logging.getLogger("kvstrata")

_BATCH_RECORDS = 1024
_BATCH_BYTES = 32 << 20
_IDLE_S = 0.1
_GATHER_S = 0.2  # each batch takes the GIL some fifty times from whoever computes
_HOUSEKEEPING_S = 60.0


class WriteBehind:
    """A thread that takes this process's new records to `tier`, oldest first, and one that settles what it has taken.

    Now and then, and when it ends, it does `housekeeping`.
    """

    def __init__(self, store: _core.Store, tier: Tier, housekeeping: Callable[[], None]) -> None:
        self._store = store
        self._tier = tier
        self._housekeeping = housekeeping
        self._stopping = threading.Event()
        self._settler = thread_pool(1, "kvstrata-settle")
        self._settling: Future[None] | None = None
        self._thread = new_thread(self._run, "kvstrata-write-behind")
        self._thread.start()

    def _run(self) -> None:
        done = time.monotonic()
        tried = False
        while True:
            stopping = self._stopping.is_set()
            waits = (0.0, 0.0) if stopping else (_IDLE_S, _GATHER_S)
            records = self._store.take_dirty(_BATCH_RECORDS, _BATCH_BYTES, *waits)
            if records:
                self._guarded(records, partial(self._tier.write, records, partial(self._settle, records)))
            elif stopping:
                self._wait_for_settler()  # so that the tier knows how it went
                if not self._tier.try_again(now=not tried):
                    break
                tried = True
            if time.monotonic() - done > _HOUSEKEEPING_S:  # also while records come without end
                self._keep_house()
                done = time.monotonic()
            self._tier.tend()
        self._settler.shutdown()
        self._keep_house()

    def _settle(self, records: list[_core.DirtyRecord], settle: Callable[[], None]) -> None:
        """Have it done while the next records are being written; one at a time, in order."""
        self._wait_for_settler()
        try:
            self._settling = self._settler.submit(self._guarded, records, settle)
        except RuntimeError:  # the interpreter is ending, and starts no more threads
            settle()

    def _wait_for_settler(self) -> None:
        settling, self._settling = self._settling, None
        if settling is not None:
            settling.result()

    def _guarded(self, records: list[_core.DirtyRecord], work: Callable[[], None]) -> None:
        """Do what is to settle records.

        The tier settles every record itself. If a defect keeps it from that, they stay in memory unwritten, and the
        thread goes on: one bad batch must not stop all later ones.
        """
        try:
            work()
        except Exception:  # noqa: BLE001 - see above
            _log.exception("kvstrata: %d records could not be written to the %s tier", len(records), self._tier.name)
            self._let_go(records)

    def _keep_house(self) -> None:
        try:
            self._housekeeping()
        except Exception:  # noqa: BLE001 - nothing that it does is worth the thread
            _log.exception("kvstrata: the housekeeping failed")

    def _let_go(self, records: list[_core.DirtyRecord]) -> None:
        """Leave records to memory, however long somebody holds a lock that it takes; unless all is to end.

        Nobody knows by now which of them have rows.
        """
        self._store.doubt(records)
        while True:
            try:
                return self._store.mark_failed(records)
            except TierUnavailable:
                if self._stopping.is_set():
                    return None

    def flush(self, timeout: float) -> bool:
        """Wait until all that this process has put is below; False when the time was over first."""
        self._store.write_lazy()
        return self._store.wait_until_settled(timeout)

    def stop(self) -> None:
        """Write what is left, and end the thread."""
        with suppress(TierUnavailable):
            self._store.write_lazy()
        self._stopping.set()
        self._store.wake_writer()
        self._thread.join()
