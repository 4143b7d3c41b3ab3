"""Of all who miss the same value at the same time, on this host, one computes it; the others wait for that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from kvstrata._core import Space
    from kvstrata.tiers.base import Key

__all__ = ["compute_once"]

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
