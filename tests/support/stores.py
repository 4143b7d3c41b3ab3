"""Stores of records that need nobody else: in memory, and at fault when a test says so; and hosts that use them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvstrata import _core
from kvstrata.tiers.base import NamedRecord, RecordStore, Stats, StoreFault
from kvstrata.tiers.keyed import Found, KeyedTier
from kvstrata.tiers.keyed_space import KeyedSpace


class MemoryStore:
    """A RecordStore in this process. `fault` is raised by every call while it is set; `calls` counts by verb."""

    name = "store in memory"

    def __init__(self, records: dict[bytes, tuple[bytes, int]] | None = None) -> None:
        self.records = {} if records is None else records  # name -> bytes, and when they expire
        self.fault: StoreFault | None = None
        self.calls: dict[str, int] = {}
        self.closed = False
        self._lock = threading.Lock()

    def read(self, names: Sequence[bytes], timeout_s: float) -> list[bytes | None]:
        self._called("read")
        with self._lock:
            return [self._get(name) for name in names]

    def contains(self, names: Sequence[bytes], timeout_s: float) -> list[bool]:
        self._called("contains")
        with self._lock:
            return [self._get(name) is not None for name in names]

    def write(
        self, records: Sequence[NamedRecord], timeout_s: float, *, then_read: bytes | None = None
    ) -> bytes | None:
        self._called("write")
        with self._lock:
            for record in records:
                self.records[record.name] = b"".join(bytes(part) for part in record.parts), record.expires
            return None if then_read is None else self._get(then_read)

    def delete(self, names: Sequence[bytes], timeout_s: float) -> None:
        self._called("delete")
        with self._lock:
            for name in names:
                self.records.pop(name, None)

    def stats(self) -> Stats:
        return {"records": len(self.records)}

    def close(self) -> None:
        self.closed = True

    def _called(self, verb: str) -> None:
        self.calls[verb] = self.calls.get(verb, 0) + 1
        if self.fault is not None:
            # A new one each time: an exception keeps what was in its frames.
            fault = self.fault
            raise StoreFault(fault.kind, str(fault), found=fault.found, sent=fault.sent, answered=fault.answered)

    def _get(self, name: bytes) -> bytes | None:
        data, expires = self.records.get(name, (None, 0))
        return None if data is None or 0 < expires <= time.time() * 1000 else data


class Host:
    """A host with records of its own: what is put can be written to a tier."""

    def __init__(
        self, store: RecordStore, name: str = "ns", version: int = 1, memory: int = 4 << 20, **options: object
    ) -> None:
        self.native = _core.Store.open_private(memory)
        self.tier = KeyedTier(store, lookup_s=10.0, **options)  # type: ignore[arg-type]
        self.local = self.native.open_namespace(0, name, version, "lru", 0, 0, False)
        self.space: KeyedSpace = self.tier.open_namespace(name, version)
        self.epoch = 1

    def write(self, items: dict[bytes, bytes], ttl_ms: int = 0) -> None:
        for key, value in items.items():
            self.local.put(key, value, ttl_ms)
        self.tier.write(self.space, [r for r in self.local.records(list(items)) if r is not None])

    def load(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [None if found is None else bytes(found.value) for found in self.found(keys)]

    def found(self, keys: Sequence[bytes]) -> list[Found | None]:
        return self.tier.load(self.space, keys, self.epoch)
