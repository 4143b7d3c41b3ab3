"""The wire of Valkey and Redis (RESP): commands of many pieces out, replies straight into their own memory.

Client libraries copy each value two or three times on its way. Here pieces leave as they lie (`sendmsg`), and a
value is received into the buffer that is handed out. Connecting, TLS and signing in stay with the library.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.counters import errno_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Deadline", "ReplyError", "Wire", "command", "fault_of"]

_RATE = 32 << 20  # bytes a second, at which a transfer may go on
_PIECES = 512  # of one sendmsg; Linux takes 1024
_ROOM = 64 << 10  # bytes of replies that are read ahead
_TIMEVAL = struct.Struct("@ll")
_JOINED = 8192  # bytes up to which a piece is copied rather than sent by itself


class ReplyError(Exception):
    """An error that the server replied with; `kind` is its first word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.kind = text.split(" ", 1)[0] or "error"


class Deadline:
    """`timeout_s` from now, and longer by what the bytes that were moved take at 32 MiB/s."""

    def __init__(self, timeout_s: float) -> None:
        self._until = time.monotonic() + timeout_s

    def moved(self, nbytes: int) -> None:
        """Tell of bytes that were sent or have arrived."""
        self._until += nbytes / _RATE

    def left(self) -> float:
        """Seconds that are left; raises StoreFault when there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise StoreFault("timeout", "no answer within the time limit")
        return left


def command(*words: Buffer) -> list[Buffer]:
    """Return a command as pieces to be sent: small words joined, large ones as they are."""
    pieces: list[Buffer] = []
    joined = bytearray(b"*%d\r\n" % len(words))
    for word in words:
        size = len(word) if isinstance(word, bytes) else memoryview(word).nbytes
        joined += b"$%d\r\n" % size
        if size <= _JOINED:
            joined += word
        else:
            pieces += (joined, word)
            joined = bytearray()
        joined += b"\r\n"
    pieces.append(joined)
    return pieces


class Wire:
    """One connection. Raises StoreFault; after that it is of no use any more."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection  # of the client library, connected; it owns the socket
        self._socket: socket.socket = connection._sock  # its one use of what isn't public there
        self._room = bytearray(_ROOM)
        self._view = memoryview(self._room)
        self._start = self._end = 0  # of what was read ahead
        self._tls = isinstance(self._socket, ssl.SSLSocket)  # which has to copy, and knows no limits of the kernel's
        self._limit_s = 0.0
        if not self._tls:
            self._socket.settimeout(None)

    def close(self) -> None:
        """End the connection."""
        self._view.release()
        self._connection.disconnect()

    def send(self, pieces: Sequence[Buffer], deadline: Deadline) -> None:
        """Send commands, as made by `command`, one after the other."""
        self._arm(deadline)
        views = [memoryview(piece) for piece in _joined(pieces, 1 << 62 if self._tls else _JOINED)]
        first = 0
        try:
            while first < len(views):
                part = views[first : first + _PIECES]
                sent = self._socket.send(part[0]) if self._tls else self._socket.sendmsg(part)
                if sent < part[0].nbytes:
                    deadline.left()
                deadline.moved(sent)
                while first < len(views) and sent >= views[first].nbytes:
                    sent -= views[first].nbytes
                    first += 1
                if sent:
                    views[first] = views[first][sent:]
        except OSError as error:
            raise fault_of(error) from error

    def _arm(self, deadline: Deadline) -> None:
        """Let a transfer that stands still end about when the time is over.

        By the kernel's own limits where that can be: with Python's, each transfer costs two more system calls.
        """
        left = deadline.left()
        if abs(left - self._limit_s) < left / 8:
            return
        self._limit_s = left
        if self._tls:
            self._socket.settimeout(left)
            return
        limit = _TIMEVAL.pack(int(left), int(left % 1 * 1e6) or 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def reply(self, deadline: Deadline) -> Any:
        """Return the next reply: bytes of a simple string, an int, a buffer, None, or a ReplyError (not raised)."""
        end = self._room.find(b"\r\n", self._start, self._end)
        line = self._room[self._start : end] if end >= 0 else self._line(deadline)
        if end >= 0:
            self._start = end + 2
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            size = int(rest)
            if 0 <= size <= self._end - self._start - 2:
                value = bytes(self._view[self._start : self._start + size])
                self._start += size + 2
                return value
            return None if size < 0 else self._bulk(size, deadline)
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return bytes(rest)
        if kind == b"-":
            return ReplyError(rest.decode("utf-8", "replace"))
        if kind == b"_" or line == b"*-1":
            return None
        raise StoreFault("protocol", "the server's reply isn't one of those that were expected")

    def _line(self, deadline: Deadline) -> bytes | bytearray:
        while True:
            end = self._room.find(b"\r\n", self._start, self._end)
            if end >= 0:
                line = bytes(self._view[self._start : end])
                self._start = end + 2
                return line
            if self._end - self._start > 4096:
                raise StoreFault("protocol", "the server's reply isn't one of those that were expected")
            if self._start:
                left = self._end - self._start
                self._view[:left] = bytes(self._view[self._start : self._end])
                self._start, self._end = 0, left
            self._end += self._receive(self._view[self._end :], deadline)

    def _bulk(self, size: int, deadline: Deadline) -> Buffer:
        ahead = self._end - self._start
        into = memoryview(np.empty(size + 2, np.uint8).data)  # numpy doesn't clear it first
        into[:ahead] = self._view[self._start : self._end]
        self._start = self._end = 0
        while ahead < size + 2:
            ahead += self._receive(into[ahead:], deadline)
        return into[:size]

    def _receive(self, into: memoryview, deadline: Deadline) -> int:
        try:
            received = self._socket.recv_into(into)
        except OSError as error:
            raise fault_of(error) from error
        deadline.left()
        if not received:
            raise StoreFault("ECONNRESET", "the server closed the connection")
        deadline.moved(received)
        return received


def _joined(pieces: Sequence[Buffer], longest: int) -> list[Buffer]:
    """Pieces, the small ones among them joined with what stands beside them."""
    found: list[Buffer] = []
    small: list[Buffer] = []
    for piece in pieces:
        nbytes = len(piece) if type(piece) is bytes else memoryview(piece).nbytes
        if nbytes > longest:
            found += (b"".join(small), piece) if small else (piece,)
            small = []
        else:
            small.append(piece)
    if small:
        found.append(b"".join(small))
    return found


def fault_of(error: OSError) -> StoreFault:
    """Turn an error of a socket into a fault, without its text: that may name what shouldn't be told."""
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return StoreFault("timeout", "no answer within the time limit")
    number = None if isinstance(error, ssl.SSLError) else error.errno  # which has numbers of its own
    if number is not None and number in errno.errorcode:
        return StoreFault(errno_name(number), os.strerror(number))
    return StoreFault(type(error).__name__, "the connection failed")
