"""Of all who miss the same value at the same time, on this host, one gets it; the others wait for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from kvstrata import _core

if TYPE_CHECKING:
    from kvstrata._core import Pin, Space
    from kvstrata.tiers.base import Key

__all__ = ["compute_once", "fetch_once"]

T = TypeVar("T")

_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.02


def compute_once(space: Space, key: Key, look: Callable[[], T | None], compute: Callable[[], T], lease_ms: int) -> T:
    """Return what `look` finds, or else what `compute` makes, stores and returns.

    Whoever computes holds a lease of `lease_ms`. It ends early when the computing process dies or `compute` raises;
    then, and when it has run out, another one computes. So nobody waits for longer than that for a process that hangs.
    """
    pause = _FIRST_PAUSE_S
    while True:
        token = space.promise(key, lease_ms)
        if token is not None:
            try:
                found = look()  # it may have come between the last look and the promise
                return compute() if found is None else found
            finally:
                space.withdraw(key, token)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
        if space.contains(key):
            found = look()
            if found is not None:
                return found


def fetch_once(
    space: Space, keys: Sequence[Key], fetch: Callable[[list[int]], Sequence[Pin | None]], lease_ms: int
) -> tuple[list[Pin | None], int]:
    """Return pins of what `fetch` brings of keys, given by their positions, or what others bring meanwhile.

    What others are fetching is waited for, for `lease_ms` at most. If it isn't there then, it is fetched after all:
    they may have died, or had no room. Also returns how many keys others brought.
    """
    pins: list[Pin | None] = [None] * len(keys)
    mine: list[int] = []
    waiting: list[int] = []
    tokens: list[int] = []
    brought = 0
    try:
        for i, key in enumerate(keys):
            token = space.promise(key, lease_ms, True)
            if token is None:
                waiting.append(i)
            elif (pin := _pin_here(space, key)) is not None:  # it has come between the last look and the promise
                space.withdraw(key, token, True)
                pins[i] = pin
                brought += 1
            else:
                mine.append(i)
                tokens.append(token)
        if mine:
            for i, pin in zip(mine, fetch(mine), strict=True):
                pins[i] = pin
    finally:
        for i, token in zip(mine, tokens, strict=False):
            space.withdraw(keys[i], token, True)
    if not waiting:
        return pins, brought
    left = _wait(space, keys, waiting, pins, time.monotonic() + lease_ms / 1000)
    if left:
        for i, pin in zip(left, fetch(left), strict=True):
            pins[i] = pin
    return pins, brought + len(waiting) - len(left)


def _wait(space: Space, keys: Sequence[Key], waiting: list[int], pins: list[Pin | None], until: float) -> list[int]:
    """Pin what others bring of the keys at these positions; returns those that they don't."""
    given_up: list[int] = []
    pause = _FIRST_PAUSE_S
    while waiting:
        still: list[int] = []
        for i in waiting:
            token = space.promise(keys[i], 1, True)
            if token is not None:
                space.withdraw(keys[i], token, True)
            if (pin := _pin_here(space, keys[i])) is not None:
                pins[i] = pin
            elif token is not None or time.monotonic() >= until:
                given_up.append(i)
            else:
                still.append(i)
        waiting = still
        if waiting:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
    return given_up


def _pin_here(space: Space, key: Key) -> Pin | None:
    """Pin a record that is in memory; looking for one that isn't doesn't count as a miss."""
    pin: Pin | None = space.pin(key) if space.contains(key) else None
    return None if pin is _core.BELOW else pin
