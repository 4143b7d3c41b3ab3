"""Records in object storage with the interface of S3, through obstore: each record is an object.

An object has no time to live there, so that stands in the record only; a rule of the bucket should remove what is old.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from kvstrata.errors import MissingExtra
from kvstrata.threads import new_thread
from kvstrata.tiers.base import NamedRecord, Stats, StoreFault

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["S3Store"]

T = TypeVar("T")
_AT_ONCE = 32  # requests
_RATE = 32 << 20  # bytes a second, at which a transfer may go on
_GRACE_S = 5.0  # for the loop to end what has no time left


class S3Store:
    """One bucket, or what starts with `prefix` in it. `options` are those of obstore's S3Store.

    Without keys among them, obstore finds them as AWS's own tools do. `label` is what it is called in logs and errors:
    it must hold no secrets. Raises MissingExtra, and what obstore raises for options that it doesn't understand.
    """

    def __init__(self, label: str, bucket: str, prefix: str, options: dict[str, Any]) -> None:
        try:
            import obstore
            from obstore.store import S3Store as Bucket
        except ImportError:
            raise MissingExtra("s3", "obstore") from None
        self.name = label
        self._obstore = obstore
        endpoint = str(options.get("endpoint", ""))
        self._bucket = Bucket(
            bucket,
            prefix=prefix or None,
            client_options={"allow_http": endpoint.startswith("http://"), "timeout": "60s", "connect_timeout": "5s"},
            # Backed off with jitter, for as long as somebody waits: each call has its own limit.
            retry_config={
                "max_retries": 6,
                "retry_timeout": timedelta(seconds=10),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=25), "max_backoff": timedelta(seconds=1), "base": 2,
                },
            },
            **options,
        )  # fmt: skip
        self._requests = 0
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()  # so that nothing is started once it is being closed
        self._closed = False
        self._thread = new_thread(self._loop.run_forever, "kvstrata-s3")
        self._thread.start()

    # ---- The protocol

    def read(self, names: Sequence[bytes], timeout_s: float) -> list[Buffer | None]:
        """Return the records, None where there is none; many at once."""
        found: list[Buffer | None] = [None] * len(names)

        async def read_one(position: int, until: _Until) -> None:
            try:
                answer = await self._obstore.get_async(self._bucket, _path(names[position]))
            except FileNotFoundError:
                return
            until.extend(answer.meta["size"])
            found[position] = await answer.bytes_async()

        try:
            self._all(read_one, len(names), timeout_s)
        except StoreFault as fault:
            fault.found = list(found)
            raise
        return found

    def contains(self, names: Sequence[bytes], timeout_s: float) -> list[bool]:
        """Say of which names there is a record; an expired one counts, as the store doesn't know."""
        there = [False] * len(names)

        async def ask(position: int, _: _Until) -> None:
            try:
                await self._obstore.head_async(self._bucket, _path(names[position]))
            except FileNotFoundError:
                return
            there[position] = True

        self._all(ask, len(names), timeout_s)
        return there

    def write(
        self, records: Sequence[NamedRecord], timeout_s: float, *, then_read: bytes | None = None
    ) -> Buffer | None:
        """Store records, many at once; then read one."""

        async def write_one(position: int, until: _Until) -> None:
            record = records[position]
            until.extend(record.length)
            body = record.parts[0] if len(record.parts) == 1 else b"".join(record.parts)
            await self._obstore.put_async(self._bucket, _path(record.name), body, use_multipart=False)

        self._all(write_one, len(records), timeout_s)
        return None if then_read is None else self.read([then_read], timeout_s)[0]

    def delete(self, names: Sequence[bytes], timeout_s: float) -> None:
        """Forget records."""

        async def delete_one(position: int, _: _Until) -> None:
            try:
                await self._obstore.delete_async(self._bucket, _path(names[position]))
            except FileNotFoundError:
                return

        self._all(delete_one, len(names), timeout_s)

    def stats(self) -> Stats:
        """Return how many requests were made."""
        return {"requests": self._requests}

    def close(self) -> None:
        """Give up what is under way."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._thread.is_alive():  # as it isn't in a forked child
            asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- Inside

    async def _cancel_all(self) -> None:
        """Let those who wait for an answer have one before the loop stops, which nobody would settle later."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_GRACE_S)

    def _all(self, one: Callable[[int, _Until], Coroutine[Any, Any, None]], count: int, timeout_s: float) -> None:
        """Run one coroutine for each position, within the time limit; raises the first fault when all have ended."""
        until = _Until(timeout_s)

        async def guarded(position: int) -> None:
            async with self._slots:
                self._requests += 1
                await one(position, until)

        async def run() -> list[BaseException | None]:
            tasks = [asyncio.ensure_future(guarded(position)) for position in range(count)]
            pending = set(tasks)
            while pending and until.left() > 0:
                _, pending = await asyncio.wait(pending, timeout=until.left())
            for task in pending:
                task.cancel()
            return list(await asyncio.gather(*tasks, return_exceptions=True))

        if not count:
            return
        with self._lock:
            if self._closed:
                raise StoreFault("closed", f"{self.name} is closed", sent=False)
            running = asyncio.run_coroutine_threadsafe(run(), self._loop)
        for error in self._result(running, until):
            if error is not None:
                raise self._fault(error)

    def _result(self, running: Future[T], until: _Until) -> T:
        """Wait until the loop is done, not much longer than there is time."""
        while True:
            try:
                return running.result(max(0.0, until.left()) + _GRACE_S)
            except TimeoutError:
                if until.left() <= 0:
                    running.cancel()
                    raise StoreFault("timeout", f"{self.name}: no answer within the time limit") from None
            except CancelledError:
                raise StoreFault("closed", f"{self.name} is closed") from None

    def _fault(self, error: BaseException) -> StoreFault:
        """What obstore raises, as a fault. Its text may hold addresses and signatures, so only its kind is told."""
        if isinstance(error, (asyncio.CancelledError, TimeoutError)):
            return StoreFault("timeout", f"{self.name}: no answer within the time limit")
        kind = type(error).__name__
        for word, name in (("refused", "ECONNREFUSED"), ("timed out", "timeout")):
            if word in str(error).lower():
                kind = name
        refused = kind == "PermissionDeniedError"  # maybe only to write
        return StoreFault(kind, f"{self.name}: the request failed ({kind})", sent=not refused, answered=refused)


class _Until:
    """The end of a call, which moves with the bytes that are known to be under way."""

    def __init__(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    def extend(self, nbytes: int) -> None:
        self._at += nbytes / _RATE

    def left(self) -> float:
        return self._at - time.monotonic()


def _path(name: bytes) -> str:
    """The object's name: hexadecimal, since names are any bytes and objects' aren't; spread by its end.

    In parts of 200 characters at most, and the last one ends with ".kvsr": where objects lie in a file system, no name
    may be longer than 255, or be a file and a directory.
    """
    text = name.hex()
    parts = [text[-2:], *(text[start : start + 200] for start in range(0, len(text), 200))]
    return "/".join(parts) + ".kvsr"
