"""A circuit breaker: what fails again and again isn't asked any more, except now and then to see whether it's back.

After Nygard, "Release It!" (2007). Closed: every call goes through. Open, after `threshold` failures in a row: none
does. Half-open, when the pause is over: one call goes through, the probe, while the others don't; if it succeeds the
breaker closes, if not it opens for twice as long.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Literal

from kvstrata.forking import after_fork
from kvstrata.tiers.base import Stats

__all__ = ["Breaker", "State"]

State = Literal["closed", "open", "half-open"]
log = logging.getLogger("kvstrata.breaker")


class Breaker:
    """Decides for `subject`, a name without secrets, whether a call may be made; for all threads.

    Whoever was told that he may call says how it went: `success`, `refusal` or `failure`. A pause lasts `pause_s` at
    first and `longest_s` at most, each up to a quarter shorter by chance, so that hosts don't all probe at once. A
    probe of which nothing is heard for `longest_s` counts as failed.
    """

    def __init__(
        self,
        subject: str,
        *,
        threshold: int = 3,
        pause_s: float = 0.5,
        longest_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._subject = subject
        self._threshold = threshold
        self._first_pause_s = pause_s
        self._longest_s = longest_s
        self._clock = clock
        self._state: State = "closed"
        self._failures = 0  # in a row
        self._pause_s = pause_s
        self._until = 0.0  # the next probe, or the end of waiting for this one
        self._opened = self._refused = 0
        self._last = ""
        self._lock = threading.Lock()
        after_fork(self)

    @property
    def state(self) -> State:
        """What it is in now."""
        return self._state

    @property
    def well(self) -> bool:
        """Whether nothing has failed since the last success."""
        return self._state == "closed" and not self._failures

    @property
    def openings(self) -> int:
        """How often it has opened."""
        return self._opened

    @property
    def due(self) -> bool:
        """Whether `allow` would let a call through."""
        return self._state == "closed" or self._clock() >= self._until

    def allow(self) -> bool:
        """Whether a call may be made. Where that makes it the probe, all others are refused until it is over."""
        if self._state == "closed":
            return True
        with self._lock:
            if self.state == "closed":  # meanwhile
                return True
            now = self._clock()
            if now < self._until:
                self._refused += 1
                return False
            self._to("half-open", "one call is let through to see")
            self._until = now + self._longest_s
            return True

    def hurry(self) -> None:
        """Let the next call through, even if it isn't time yet: there may be no later one."""
        with self._lock:
            if self._state == "open":
                self._until = self._clock()

    def success(self) -> None:
        """Say that a call did what it should."""
        if self.well:
            return
        with self._lock:
            self._failures = 0
            self._pause_s = self._first_pause_s
            if self._state != "closed":
                self._to("closed", "it answers again")

    def refusal(self, kind: str, message: object) -> None:
        """Say that a call was answered, if only with a refusal: that is a success, which `stats` tells of."""
        with self._lock:
            self._last = f"{kind}: {message}"
        self.success()

    def failure(self, kind: str, message: object) -> None:
        """Say that a call failed: `kind` in a word, and a message without secrets."""
        with self._lock:
            self._failures += 1
            self._last = f"{kind}: {message}"
            if self._state == "half-open":
                self._pause_s = min(2 * self._pause_s, self._longest_s)
            elif self._state == "open" or self._failures < self._threshold:
                return  # a call that began before it opened, or not often enough
            self._opened += 1
            self._until = self._clock() + self._pause_s * random.uniform(0.75, 1.0)
            self._to("open", self._last)

    def stats(self) -> Stats:
        """Return its state, how often it opened, how many calls it refused, and the last failure."""
        with self._lock:
            return {
                "breaker": self._state,
                "breaker_opened": self._opened,
                "breaker_refused": self._refused,
                "last_error": self._last or None,
            }

    def _to(self, state: State, why: str) -> None:
        if state != self._state:
            self._state = state
            log.log(logging.INFO if state == "closed" else logging.WARNING, "%s: %s: %s", self._subject, state, why)

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()
