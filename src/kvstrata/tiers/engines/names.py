"""Going through all names of a store, a turn at a time, so that others come to theirs."""

from __future__ import annotations

import time
from collections.abc import Iterable

__all__ = ["SCAN_S", "some_of"]

SCAN_S = 2.0  # that a turn may be waited for
_AT_ONCE = 1000
_TURN_S = 0.005  # where values are large a step reads much, and each lets the GIL go and may wait long to have it back


def some_of(names: Iterable[bytes]) -> list[bytes]:
    """Return the first of them: as many as a turn is for."""
    found: list[bytes] = []
    until = time.monotonic() + _TURN_S
    for name in names:
        found.append(name)
        if len(found) == _AT_ONCE or time.monotonic() > until:
            break
    return found
