"""What a tier below memory has to do for the cache. Batched throughout: one call carries a whole request.

A `Tier` is under the host's index. A `RecordStore` is not: it is asked after a miss, through `tiers.keyed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvstrata._core import DirtyRecord, Pin
from kvstrata.errors import TierUnavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstrata.tiers.encodings import Encodings

__all__ = [
    "Arrived",
    "Key",
    "Later",
    "NamedRecord",
    "NamespaceState",
    "RecordStore",
    "Stats",
    "StoreFault",
    "Tier",
    "at_once",
]

Key = str | bytes
Arrived = Callable[[int, Pin | memoryview], None]
Later = Callable[[Callable[[], None]], None]
Stats = dict[str, int | float | str | None]


def at_once(settle: Callable[[], None]) -> None:
    """Settle in the thread that has stored."""
    settle()


class NamespaceState(NamedTuple):
    """What a persistent tier remembers of a namespace."""

    id: int
    name: str
    version: int
    epoch: int
    immutable: bool


class Tier(Protocol):
    """A persistent store of records below the memory tier.

    The host's index says what is where, so a tier is asked only for records that it has. Faults of the tier are
    counted and become misses; only what the caller asked to be made durable (a deletion, a new epoch) raises
    TierUnavailable when that could not be done.
    """

    name: str
    encodings: Encodings
    """How values are stored in it."""

    def recover(self) -> None:
        """Bring what is stored in order, and tell a store that is new what there is."""

    def namespaces(self) -> list[NamespaceState]:
        """Return those that it knows."""

    def open_namespace(self, name: str, version: int, immutable: bool) -> NamespaceState:
        """Make a namespace known, or a newer version of it; raises VersionConflict for an older one."""

    def set_quota(self, ns: int, quota: int) -> None:
        """Bound the bytes that a namespace has here, 0 = no bound."""

    def usage(self) -> dict[int, tuple[int, int]]:
        """Return by number of a namespace how many records and bytes it has here."""

    def set_epoch(self, ns: int, epoch: int) -> None:
        """Make records of an earlier epoch unreachable, also after a restart, before it returns."""

    def remove_tag(self, slot: int, seq: int) -> None:
        """Make records with that tag and a lower number unreachable, also after a restart, before it returns."""

    def write(self, records: list[DirtyRecord], later: Later = at_once) -> None:
        """Store records that are pinned in memory, and settle each with the store: durable, or failed.

        `later(settle)` is told what settles those that were stored, one after the other: it may be called while others
        are stored, from any thread, in this order; by default it is called at once.
        """

    def load(self, ns: int, keys: Sequence[Key], arrived: Arrived | None = None) -> list[Pin | memoryview | None]:
        """Return the values: promoted to memory and pinned, or, where memory has no room, in private memory.

        `arrived` is called with the position of a key and its value as soon as it is there, from any thread, so that
        it can be used while others are read.
        """

    def delete(self, ns: int, keys: Sequence[tuple[Key, int | None]]) -> None:
        """Forget records, or with a number only those with a lower one, also after a restart, before it returns."""

    def delete_prefix(self, ns: int, prefix: bytes, below: int) -> None:
        """Forget records whose keys start with `prefix` and whose number is below `below`, like `delete`."""

    def save(self, name: str, data: bytes) -> None:
        """Keep a small file beside the records, in place of an older one; raises OSError, TierError."""

    def try_again(self, *, now: bool) -> int:
        """Have records that could not be stored taken once more, before the process ends; returns how many.

        `now`: even if it isn't time to try; else only where nothing has failed since the last success.
        """

    def tend(self) -> None:
        """Do what is due, without raising for faults; called after each batch, or ten times a second."""

    def stats(self) -> Stats:
        """Return counters, in bytes and numbers of records."""

    def close(self) -> None:
        """Let go of everything. What was written stays."""


class NamedRecord(NamedTuple):
    """A record to be stored under a name: the bytes of all `parts`, one after the other."""

    name: bytes
    parts: Sequence[Buffer]
    expires: int
    """ms since the Unix epoch, 0 = never. The record's own header says the same."""
    lasting: bool = False
    """Whether others count for nothing without it: a store that removes records to make room keeps it. Such a name is
    always written so, and never deleted."""

    @property
    def length(self) -> int:
        """Its bytes."""
        return sum(memoryview(part).nbytes for part in self.parts)


class StoreFault(TierUnavailable):
    """A store could not do all that was asked, within the time that it had.

    `kind` is what it is counted under, such as "ECONNREFUSED" or "timeout"; the message holds no secrets. `found` is
    what a read did get, if it was one. With `sent`, what was to be changed may still be, later; without, nothing will.
    `answered`: the store can be reached and refuses only this, so others may well be served.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        found: list[Buffer | None] | None = None,
        sent: bool = True,
        answered: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.found = found
        self.sent = sent
        self.answered = answered


class RecordStore(Protocol):
    """Whole records by name, outside the host's index: a server, an object store, another engine.

    Names are 1 to 256 bytes of any kind; what is equal in its first bytes belongs together, for engines that keep an
    order. A record is stored and given back as a whole, byte for byte, or it is absent: a store may lose records at
    any time, but it never makes up, cuts or mixes any, and once a write or delete has returned, a read that starts
    later sees it. Who reads checks what it gets, so a store doesn't. Times are in seconds; each bounds the whole call
    as long as nothing arrives, and while bytes do, it goes on as long as they would take at 32 MiB/s. Every method may
    be called from any thread, raises StoreFault and nothing else, and isn't used any more in a forked child.
    """

    name: str

    def read(self, names: Sequence[bytes], timeout_s: float) -> list[Buffer | None]:
        """Return the records, None where there is none."""

    def contains(self, names: Sequence[bytes], timeout_s: float) -> list[bool]:
        """Say of which names there is a record; one whose time is over counts for none if the store knows of it."""

    def write(
        self, records: Sequence[NamedRecord], timeout_s: float, *, then_read: bytes | None = None
    ) -> Buffer | None:
        """Store records, replacing those of the same names; then read one name, and return what is there.

        That saves a round trip where there are any. After a fault, any of the records may have been stored.
        """

    def delete(self, names: Sequence[bytes], timeout_s: float) -> None:
        """Forget records, before it returns. That there is none is no fault."""

    def stats(self) -> Stats:
        """Return what the store says of itself, without asking anybody else, and without secrets."""

    def close(self) -> None:
        """Let go of everything. What was written stays."""
