"""Warm-up: bringing what will be wanted into memory before it is, and remembering what was wanted last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvstrata.errors import InvalidValue, TierError
from kvstrata.tiers.base import Key, Tier

if TYPE_CHECKING:
    from kvstrata._core import Pin, Space, Store

__all__ = ["AT_ONCE", "HotSet", "Progress", "Warmed", "warm"]

_log = logging.getLogger("kvstrata")

AT_ONCE = 128
"""Keys of a batch."""
_FILE = "hottest"
_FORMAT = 1
_MOST_BYTES = 8 << 20
_PART_OF_DISK = 256  # the file takes at most the 256th part of the disk tier

Load = Callable[[list[Key]], "Sequence[Pin | memoryview | None]"]
"""Brings records of one namespace up from the tiers below."""


class Warmed(NamedTuple):
    """What a warm-up did.

    wanted: keys that were asked for; present: those that were in memory already; loaded: those that were brought
    there, `nbytes` together; absent: those that lay nowhere, or could not be read. `complete` is False when the time
    was over, or the memory full, before all had been looked at.
    """

    wanted: int
    present: int
    loaded: int
    absent: int
    nbytes: int
    seconds: float
    complete: bool


Progress = Callable[[Warmed], None]


def warm(
    store: Store,
    groups: Iterable[tuple[Space, Load, Sequence[Key]]],
    *,
    room: int,
    time_limit: float | None = None,
    progress: Progress | None = None,
    at_once: int = AT_ONCE,
) -> Warmed:
    """Load keys, in the order given, as long as they fit into `room` bytes, or until `time_limit` s are over.

    `progress` is called after each batch with what was done so far. Raises InvalidValue for a limit that isn't one.
    """
    if time_limit is not None and not time_limit > 0:
        raise InvalidValue(f"time_limit must be a positive number of seconds or None, not {time_limit!r}")
    started = time.monotonic()
    batches = [
        (space, load, list(keys[start : start + at_once]))
        for space, load, keys in groups
        for start in range(0, len(keys), at_once)
    ]
    wanted = sum(len(keys) for _, _, keys in batches)
    done = Warmed(wanted, 0, 0, 0, 0, 0.0, not batches)
    for number, (space, load, keys) in enumerate(batches, start=1):
        below = _below(space, keys)
        fitting = _fitting(store, space, below, room - done.nbytes)
        brought = _brought(load, fitting)
        done = Warmed(
            wanted,
            done.present + len(keys) - len(below),
            done.loaded + sum(size is not None for size in brought),
            done.absent + sum(size is None for size in brought),
            done.nbytes + sum(size or 0 for size in brought),
            time.monotonic() - started,
            number == len(batches) and len(fitting) == len(below),
        )
        if progress is not None:
            progress(done)
        if len(fitting) < len(below) or (time_limit is not None and done.seconds >= time_limit):
            break
    return done


def _below(space: Space, keys: list[Key]) -> list[Key]:
    """Return those that aren't in memory."""
    pins, _ = space.pin_many(keys)
    for pin in pins:
        if pin is not None:
            pin.release()
    return [key for key, pin in zip(keys, pins, strict=True) if pin is None]


def _fitting(store: Store, space: Space, keys: list[Key], room: int) -> list[Key]:
    """Return as many of the keys, from the first on, as have room."""
    for number, location in enumerate(store.find_on_disk(space.id, keys)):
        room -= location[4] if location else 0
        if room < 0:
            return keys[:number]
    return keys


def _brought(load: Load, keys: list[Key]) -> list[int | None]:
    """Load keys; returns the size of each, None for those that lie nowhere or can't be read."""
    try:
        values = load(keys) if keys else []
    except TierError as error:
        _log.debug("a warm-up could not load: %s", error)
        return [None] * len(keys)
    sizes = [None if value is None else len(value) for value in values]
    for value in values:
        if value is not None:
            value.release()
    return sizes


class _Saved(msgspec.Struct, array_like=True):
    """The file: of each namespace its name, its version, and the keys that were used last, youngest first."""

    format: int
    keys: list[tuple[str, int, bytes]]


class HotSet:
    """The keys that were used last, kept in a file beside the records."""

    def __init__(self, directory: Path, disk: int) -> None:
        self._path = directory / _FILE
        self._room = min(_MOST_BYTES, disk // _PART_OF_DISK)

    def save(self, tier: Tier, keys: Iterator[tuple[str, int, bytes]]) -> None:
        """Replace what is saved by `keys`, youngest first, as many as there is room for; a failure is only logged."""
        kept: list[tuple[str, int, bytes]] = []
        size = 64
        for name, version, key in keys:
            size += len(name.encode()) + len(key) + 16
            if size > self._room:
                break
            kept.append((name, version, key))
        try:
            tier.save(_FILE, msgspec.msgpack.encode(_Saved(_FORMAT, kept)))
        except (OSError, TierError) as error:
            _log.debug("the hottest keys are not saved: %s", error)

    def load(self, most: int) -> list[tuple[str, int, bytes]]:
        """Return the saved (namespace, version, key), youngest first, at most `most`; none if it can't be read."""
        try:
            saved = msgspec.msgpack.decode(self._path.read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError) as error:
            _log.debug("no hottest keys can be read: %s", error)
            return []
        return saved.keys[:most] if saved.format == _FORMAT else []
