"""Connections to servers: kept between uses, and made within a time limit whatever they wait for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from kvstrata.threads import new_thread
from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.resp import Deadline, Wire

__all__ = ["Server", "within"]

T = TypeVar("T")
_IDLE_WIRES = 8  # of each server


class Server:
    """Connections to one server, at `host` unless that is a socket."""

    def __init__(self, connect: Callable[[], Wire], host: str) -> None:
        self.host = host
        self._connect = connect
        self._idle: deque[Wire] = deque()

    def use(self, talk: Callable[[Wire], T], deadline: Deadline) -> T:
        """Let somebody talk over a connection. One that was idle may be dead: then once more over a new one."""
        while True:
            try:
                wire, fresh = self._idle.pop(), False
            except IndexError:
                wire, fresh = within(deadline, self._connect, self._keep), True
            try:
                result = talk(wire)
            except StoreFault as fault:
                wire.close()
                if fresh or fault.kind in ("timeout", "protocol"):
                    raise
                self.close()  # those that have been idle for longer are no better
            except BaseException:
                wire.close()
                raise
            else:
                self._keep(wire)
                return result

    def _keep(self, wire: Wire) -> None:
        if len(self._idle) < _IDLE_WIRES:
            self._idle.append(wire)
        else:
            wire.close()

    def close(self) -> None:
        """End those that nobody uses now."""
        while self._idle:
            self._idle.pop().close()


def within(deadline: Deadline, call: Callable[[], T], late: Callable[[T], object] = lambda _: None) -> T:
    """Call in another thread, which may take longer than the caller has; `late` is given what comes too late.

    Names that don't resolve, and handshakes, can't be bounded otherwise.
    """
    done: deque[T | BaseException] = deque()
    finished = threading.Event()
    state = threading.Lock()
    abandoned = False

    def run() -> None:
        try:
            result: T | BaseException = call()
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller
            result = error
        with state:
            if not abandoned:
                done.append(result)
            elif not isinstance(result, BaseException):
                late(result)
        finished.set()

    new_thread(run, "kvstrata-connect").start()
    finished.wait(deadline.left())
    with state:
        if not done:
            abandoned = True
            raise StoreFault("timeout", "no connection within the time limit", sent=False)
    answer = done.pop()
    if isinstance(answer, BaseException):
        try:
            raise answer
        finally:
            del answer  # else the exception and this frame would keep each other, and the callers' frames
    return answer
