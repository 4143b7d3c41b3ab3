"""Blocks of KV for engines: what every plug-in does the same way.

An engine names blocks by keys of its own, which hold only for one model and layout; so there is a namespace for each
fingerprint. Trouble in the cache never fails a request that could be computed: it is a miss, or a block that wasn't
stored, and it is counted; after some in a row a breaker keeps the engine from waiting for more. Only options that
can't be used raise, when the plug-in starts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import blake3

from kvstrata._core import record_bytes
from kvstrata.cache import Cache
from kvstrata.codecs.registry import codec
from kvstrata.copying import Copiers
from kvstrata.errors import KVStrataError, TierFull, UnknownOption
from kvstrata.opening import open as open_cache
from kvstrata.prefix_loading import StoredHead, Tally, release
from kvstrata.tiers.base import Stats
from kvstrata.tiers.breaker import Breaker

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstrata._core import Pin

__all__ = [
    "PIECE", "EngineBlocks", "Fill", "Take", "Withdrawn", "fingerprint", "let_go", "open_for_engine",
    "share_for_engine",
]  # fmt: skip

T = TypeVar("T")
Fill = Callable[[int, memoryview], None]
"""Writes the block at that position into its place; raises Withdrawn if its source is gone."""
Take = Callable[[int, memoryview], bool]
"""Copies the block at that position out of the memory given; False if it isn't what was expected."""
Give = Callable[[int, "Pin | memoryview"], None]

_CACHE_OPTIONS = (
    "path", "memory", "disk", "disk_policy", "disk_write_limit", "disk_engine", "shared", "huge_pages", "prefetch",
    "near",
    "encryption", "remote", "config",
)  # fmt: skip
_AT_ONCE = 256  # blocks that are pinned at once
PIECE = 64
"""Of a load that may be given up so many blocks are brought at once: as many as the disk tier reads together."""
_CONTEXT = "kvstrata 2026-11-25 engine namespace"


class Withdrawn(Exception):
    """What was to be stored is no longer where it was."""


def open_for_engine(options: Mapping[str, Any], *, known: Sequence[str] = ()) -> Cache:
    """Open the cache that an engine's configuration describes: the arguments of `kvstrata.open`, by their names.

    `known` are options of the plug-in's own, which are left to it. Raises UnknownOption for any other, and what
    `kvstrata.open` raises.
    """
    for name in options:
        if name not in _CACHE_OPTIONS and name not in known:
            raise UnknownOption("option of kvstrata", name, [*_CACHE_OPTIONS, *known])
    return open_cache(**{name: options[name] for name in _CACHE_OPTIONS if name in options})


_shared: dict[str, tuple[Cache, int]] = {}
_sharing = threading.Lock()


def share_for_engine(options: Mapping[str, Any], *, known: Sequence[str] = ()) -> Cache:
    """As `open_for_engine`, once for all parts of an engine in this process; each of them calls `let_go` at its end."""
    name = repr(sorted(options.items()))
    with _sharing:
        cache, users = _shared.get(name) or (open_for_engine(options, known=known), 0)
        _shared[name] = cache, users + 1
    return cache


def let_go(cache: Cache) -> None:
    """Close a cache that is shared, once nobody has it any more."""
    with _sharing:
        name = next(name for name, (held, _) in _shared.items() if held is cache)
        users = _shared[name][1] - 1
        if users:
            _shared[name] = cache, users
            return
        del _shared[name]
    cache.close()


def fingerprint(engine: str, facts: Mapping[str, object]) -> str:
    """Name the namespace of everything that the bytes of a block depend on besides its key.

    Each fact counts by the text of its value: give it plain values, the same in every process.
    """
    digest = blake3.blake3(derive_key_context=_CONTEXT)
    for name in sorted(facts):
        for part in (name, str(facts[name])):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return f"{engine}-{digest.hexdigest(16)}"


def _lossy(wanted: Any) -> list[tuple[str, str]]:
    """Return the lossy codecs among those that a namespace is given, with their tiers."""
    by_tier = wanted if isinstance(wanted, Mapping) else {"": wanted}
    return sorted((tier, str(spec)) for tier, spec in by_tier.items() if spec is not None and codec(spec).lossy)


class EngineBlocks:
    """The blocks of one engine, model and layout. Thread-safe; a block's key implies its bytes.

    `policy` and what is in `namespace_options` are those of `Cache.namespace`. A secret among the facts keeps tenants
    apart.
    """

    def __init__(
        self,
        cache: Cache,
        engine: str,
        facts: Mapping[str, object],
        *,
        policy: str = "auto",
        **namespace_options: Any,
    ) -> None:
        lossy = _lossy(namespace_options.get("codec"))
        if lossy:  # then who hasn't asked for it must not be given what it left
            facts = {**facts, "lossy codecs": lossy}
        self._open(cache, fingerprint(engine, facts), policy, namespace_options)

    @classmethod
    def named(cls, cache: Cache, name: str, *, policy: str = "auto", **namespace_options: Any) -> EngineBlocks:
        """Return the blocks of a namespace whose fingerprint somebody else has made, under its `name`."""
        blocks = cls.__new__(cls)
        blocks._open(cache, name, policy, namespace_options)
        return blocks

    def _open(self, cache: Cache, name: str, policy: str, namespace_options: Mapping[str, Any]) -> None:
        self.cache = cache
        self.name = name
        self.ns = cache.namespace(self.name, policy=policy, immutable=True, **namespace_options)
        self.copiers = Copiers()
        self._breaker = Breaker(f"kvstrata under {name.partition('-')[0]}")
        self._tally = Tally(
            "lookups", "looked_up_blocks", "found_blocks", "loaded_blocks", "loaded_bytes", "missed_blocks",
            "stored_blocks", "stored_bytes", "unstored_blocks", "errors",
        )  # fmt: skip

    def match(self, keys: Sequence[bytes]) -> int:
        """Return how many blocks from the first on are there, in whichever tier; loads nothing."""
        found = self._guarded(lambda: self.ns.contains_prefix(keys), 0) if keys else 0
        self._tally.add(lookups=1, looked_up_blocks=len(keys), found_blocks=found)
        return found

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each block whether it is there; loads nothing."""
        found = self._guarded(lambda: self._present(keys), [False] * len(keys))
        self._tally.add(lookups=1, looked_up_blocks=len(keys), found_blocks=sum(found))
        return found

    def _present(self, keys: Sequence[bytes]) -> list[bool]:
        found = [self.ns._space.contains(key) for key in keys]
        if self.ns._remote is not None and not all(found):  # ask once for all of them
            absent = [position for position, there in enumerate(found) if not there]
            for position, place in zip(absent, self.ns._remote.places([keys[i] for i in absent]), strict=True):
                found[position] = place is not None
        return found

    def sizes_below(self, keys: Sequence[bytes]) -> list[int]:
        """Return for each block the bytes that have to be read from the disk for it; 0 for what is in memory."""
        return self._guarded(lambda: self.cache.below.sizes(self.ns._space.id, keys), [0] * len(keys))

    def store(
        self, keys: Sequence[bytes], nbytes: int, fill: Fill, *, depth: int = 0, holes: bool = False
    ) -> int:  # fmt: skip
        """Store blocks of `nbytes` each, in order, and return how many of them are there.

        `fill(i, memory)` writes block i where it isn't there yet. It ends at the first that can't be stored, or is
        withdrawn, so that none is stored behind a hole; with `holes` only what is withdrawn is left out. `depth` is the
        place of the first in its prefix, from 1 on; 0: they aren't of one.
        """
        done = written = 0

        def go() -> None:
            nonlocal done, written
            with StoredHead(self.ns) as head:
                for position, key in enumerate(keys):
                    if key not in self.ns:
                        try:
                            with self.ns._reserve(key, nbytes, depth=depth and depth + position) as memory:
                                fill(position, memory)
                        except Withdrawn:
                            if holes:
                                continue
                            return
                        written += 1
                    head.add([key])
                    done += 1

        self._guarded(go, None)
        self._tally.add(stored_blocks=written, stored_bytes=written * nbytes, unstored_blocks=len(keys) - done)
        return done

    def unstored(self, blocks: int) -> None:
        """Count blocks that somebody gave up to store."""
        self._tally.add(unstored_blocks=blocks)

    def load(self, keys: Sequence[bytes], outs: Sequence[Buffer]) -> list[bool]:
        """Copy each block to its buffer, which must be of its length; False where that isn't possible."""

        def take(position: int, block: memoryview) -> bool:
            target = memoryview(outs[position]).cast("B")
            if target.nbytes != block.nbytes:
                return False
            target[:] = block
            return True

        return self.load_each(keys, take)

    def load_each(
        self, keys: Sequence[bytes], take: Take, held: Sequence[memoryview | None] | None = None,
        *, wanted: Callable[[], bool] | None = None,
    ) -> list[bool]:  # fmt: skip
        """Give each block that is there to `take(i, memory)`; returns which ones were there and taken.

        What has to be read first is given as it arrives, while the rest is being read. `take` is called by several
        threads at a time, in any order. `held` are blocks that the caller has pinned already, None for the others.
        `wanted` is asked before each piece of what isn't; once it says False the rest is left where it is.
        """
        taken = [-1] * len(keys)  # bytes of each that was

        def give(position: int, value: Pin | memoryview) -> None:
            if taken[position] < 0 and take(position, memoryview(value)):
                taken[position] = len(value)

        rest: Sequence[int] = range(len(keys))
        if held is not None:
            rest = [position for position, block in enumerate(held) if block is None]
            self._give_all([(position, block) for position, block in enumerate(held) if block is not None], give)

        def go() -> None:
            at_once = _AT_ONCE if wanted is None else PIECE
            for start in range(0, len(rest), at_once):
                if wanted is not None and not wanted():
                    return
                self._load_wave(keys, rest[start : start + at_once], give)

        self._guarded(go, None)
        got = [nbytes >= 0 for nbytes in taken]
        loaded = sum(got)
        loaded_bytes = sum(nbytes for nbytes in taken if nbytes > 0)
        self._tally.add(loaded_blocks=loaded, loaded_bytes=loaded_bytes, missed_blocks=len(keys) - loaded)
        return got

    def _give_all(self, blocks: Sequence[tuple[int, Pin | memoryview]], give: Give) -> None:
        self.copiers.share(lambda block: give(*block), blocks, sum(len(block) for _, block in blocks))

    def _load_wave(self, all_keys: Sequence[bytes], wanted: Sequence[int], give: Give) -> None:
        keys = [all_keys[position] for position in wanted]
        pins, below = self.ns._space.pin_many(keys)
        try:
            here = [(position, pin) for position, pin in zip(wanted, pins, strict=True) if pin is not None]
            self._give_all(here, give)
            if below:

                def arrived(number: int, value: Pin | memoryview) -> None:
                    give(wanted[below[number]], value)

                for number, pin in zip(below, self.ns._load([keys[i] for i in below], arrived), strict=True):
                    pins[number] = pin
            for number in sorted([*below, *self.ns._fetch_absent(keys, pins)]):
                if (pin := pins[number]) is not None:
                    give(wanted[number], pin)
        finally:
            release(pins)

    @contextmanager
    def pinned(self, keys: Sequence[bytes], *, here: bool = False) -> Iterator[Sequence[Pin | None]]:
        """Keep blocks in memory and give them, None where there is none; each exports its bytes as a buffer.

        With `here` only those that are in memory already.
        """
        pins = self._guarded(lambda: self.ns._space.pin_many(keys)[0], [None] * len(keys)) if here else self.pin(keys)
        try:
            sizes = [0 if pin is None else len(pin) for pin in pins]
            missed = sum(pin is None for pin in pins)
            self._tally.add(loaded_blocks=len(keys) - missed, loaded_bytes=sum(sizes), missed_blocks=missed)
            yield pins
        finally:
            release(pins)

    def pin(self, keys: Sequence[bytes]) -> list[Pin | None]:
        """Bring blocks into memory, which they don't leave before their pins are released; None where there is none."""
        nothing: list[Pin | None] = [None] * len(keys)
        return self._guarded(lambda: self.ns.pin_many(keys), nothing)

    def pin_here(self, keys: Sequence[bytes]) -> tuple[list[Pin | None], list[int]]:
        """Look blocks up, and pin those that lie in memory, without taking that for a use; loads nothing.

        Returns the pins, and of blocks that lie on disk only the bytes of their records, 0 for all others.
        """
        pins, sizes = self._pin_here(keys)
        found = sum(pin is not None or size > 0 for pin, size in zip(pins, sizes, strict=True))
        self._tally.add(lookups=1, looked_up_blocks=len(keys), found_blocks=found)
        return pins, sizes

    def _pin_here(self, keys: Sequence[bytes]) -> tuple[list[Pin | None], list[int]]:
        def go() -> tuple[list[Pin | None], list[int]]:
            pins: list[Pin | None]
            pins, below = self.ns._space.pin_many(keys, uses=False)
            sizes = [0] * len(keys)
            there = self.ns._cache.below.sizes(self.ns._space.id, [keys[i] for i in below])
            for i, size in zip(below, there, strict=True):
                sizes[i] = size
            return pins, sizes

        nothing: tuple[list[Pin | None], list[int]] = [None] * len(keys), [0] * len(keys)
        return self._guarded(go, nothing)

    def present_elsewhere(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each block whether a remote tier seems to have it."""
        remote, nowhere = self.ns._remote, [False] * len(keys)
        if remote is None or not keys:
            return nowhere
        return self._guarded(lambda: [place is not None for place in remote.places(keys)], nowhere)

    def absent(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each block whether it certainly isn't on this host."""
        return self._guarded(lambda: [not self.ns._space.contains(key) for key in keys], [False] * len(keys))

    def record_sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Return the bytes of each block's record, with its header and padding; 0 for what isn't on this host."""
        pins, sizes = self._pin_here(keys)
        try:
            return [
                size if pin is None else record_bytes(len(key), len(pin))
                for key, pin, size in zip(keys, pins, sizes, strict=True)
            ]
        finally:
            release(pins)

    def keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return the keys of all blocks that are there, in memory or on disk of this host and in no order."""
        return self._guarded(lambda: list(self.ns.keys(prefix)), [])

    def delete(self, keys: Sequence[bytes]) -> int:
        """Remove blocks; returns how many were there."""
        return self._guarded(lambda: self.ns.delete_many(keys), 0)

    def clear(self) -> None:
        """Remove all blocks of this fingerprint; raises TierUnavailable where that would not outlast a restart."""
        self.ns.clear()

    def stats(self) -> Stats:
        """Return this object's counters since it was made, and the state of its breaker."""
        return {**self._tally.snapshot(), **self._breaker.stats()}

    def _guarded(self, call: Callable[[], T], otherwise: T) -> T:
        """Make a call to the cache; what goes wrong is counted, and `otherwise` is returned."""
        if not self._breaker.allow():
            return otherwise
        try:
            result = call()
        except TierFull:  # no fault: what is pinned, or not on disk yet, takes all the room
            self._breaker.success()
            return otherwise
        except (KVStrataError, OSError) as error:
            self._tally.add(errors=1)
            self._breaker.failure(type(error).__name__, error)
            return otherwise
        self._breaker.success()
        return result
