"""Records in Valkey or Redis: one server or a cluster, over TCP, TLS or a Unix socket.

valkey-py connects, signs in and knows the cluster's slots; what moves values is `resp`. Measured over a Unix socket
with values of 1 MiB, put and get: valkey-py 0.23 and 1.7 ms, redis-py with hiredis 1.4 and 0.42 ms, this 0.18 and
0.24 ms. Of valkey-py and redis-py, which serve both servers alike, it is the one that the server's own project keeps.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstrata.errors import MissingExtra
from kvstrata.tiers.base import NamedRecord, Stats, StoreFault
from kvstrata.tiers.connections import Server, within
from kvstrata.tiers.resp import Deadline, ReplyError, Wire, command, fault_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ValkeyStore"]

_CHUNK = 8 << 20  # bytes of a record that go under one name
_MANIFEST = struct.Struct("<4sIQ")  # magic, pieces, bytes of all of them
_MAGIC = b"KVSC"
_MOVED = ("MOVED", "TRYAGAIN", "CLUSTERDOWN")
_LOOK_AGAIN_S = 1.0  # after which a slot that nobody had may have been given to somebody
_SERVES_NOBODY = ("LOADING", "BUSY", "MASTERDOWN", "NOAUTH")  # else a refusal says nothing of other commands
_HANDSHAKE_S = 5.0  # for one that goes on after its caller has given up


class ValkeyStore:
    """One server, or with `cluster` those that it names. `options` are those of valkey-py's connections.

    `label` is what it is called in logs and errors: it must hold no secrets. Nothing is connected before it is needed.
    Raises MissingExtra.
    """

    def __init__(self, label: str, options: dict[str, Any], *, cluster: bool = False) -> None:
        try:
            import valkey
        except ImportError:
            raise MissingExtra("valkey", "valkey") from None
        self.name = label
        self._library = valkey
        self._options = dict(options, lib_name=None, lib_version=None)
        self._cluster: Any = None  # the library's client, which knows who has which slot
        self._is_cluster = cluster
        self._servers: dict[str, Server] = {}
        self._stale = False  # what is known of the cluster
        self._looked_at = 0.0
        self._connections = 0
        self._lock = threading.Lock()
        self._closed = False

    # ---- The protocol

    def read(self, names: Sequence[bytes], timeout_s: float) -> list[Buffer | None]:
        """Return the records, None where there is none."""
        deadline = Deadline(timeout_s)
        found: list[Buffer | None] = [None] * len(names)
        try:
            self._run(names, [_get(name) for name in names], deadline, found)
            for position, value in enumerate(found):
                if value is not None and _is_manifest(value):
                    found[position] = None  # unless all of it is there
                    found[position] = self._assembled(names[position], value, deadline)
        except StoreFault as fault:
            fault.found = [None if value is not None and _is_manifest(value) else value for value in found]
            raise
        return found

    def contains(self, names: Sequence[bytes], timeout_s: float) -> list[bool]:
        """Say of which names there is a record."""
        replies: list[Any] = [0] * len(names)
        self._run(names, [command(b"EXISTS", name) for name in names], Deadline(timeout_s), replies)
        return [reply == 1 for reply in replies]

    def write(
        self, records: Sequence[NamedRecord], timeout_s: float, *, then_read: bytes | None = None
    ) -> Buffer | None:
        """Store records; one that is larger than 8 MiB in pieces, the first of all names last. Then read one."""
        deadline = Deadline(timeout_s)
        names: list[bytes] = []
        commands: list[list[Buffer]] = []
        for name, parts, expires, _ in records:
            length = sum([memoryview(part).nbytes for part in parts])
            if length > _CHUNK:
                self._write_pieces(name, parts, length, expires, deadline)
                parts = (_MANIFEST.pack(_MAGIC, -(-length // _CHUNK), length),)
                length = _MANIFEST.size
            names.append(name)
            commands.append(_set(name, parts, length, expires))
        replies: list[Any] = [None] * len(names)
        if then_read is None or self._is_cluster:  # whose servers answer for themselves
            self._run(names, commands, deadline, replies)
            return None if then_read is None else self.read([then_read], timeout_s)[0]
        self._run([*names, then_read], [*commands, command(b"GET", then_read)], deadline, replies := [*replies, None])
        return replies[-1]  # type: ignore[no-any-return]

    def delete(self, names: Sequence[bytes], timeout_s: float) -> None:
        """Forget records and their pieces."""
        deadline = Deadline(timeout_s)
        both = [name for name in names for _ in range(2)]
        commands = [
            words for name in names
            for words in (command(b"GETRANGE", name, b"0", b"%d" % (_MANIFEST.size - 1)), command(b"UNLINK", name))
        ]  # fmt: skip
        replies: list[Any] = [None] * len(both)
        self._run(both, commands, deadline, replies)
        pieces = [
            piece for name, start in zip(names, replies[::2], strict=True) if start is not None and _is_manifest(start)
            for piece in _piece_names(name, _MANIFEST.unpack(start)[1])
        ]  # fmt: skip
        if pieces:
            self._run(pieces, [command(b"UNLINK", piece) for piece in pieces], deadline, [None] * len(pieces))

    def stats(self) -> Stats:
        """Return how many connections were made and how many servers are known."""
        return {"connections": self._connections, "servers": len(self._servers)}

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            self._closed = True
            servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            server.close()
        if self._cluster is not None:
            self._cluster.close()

    # ---- Large records

    def _write_pieces(
        self, name: bytes, parts: Sequence[Buffer], length: int, expires: int, deadline: Deadline
    ) -> None:
        rest = [memoryview(part).cast("B") for part in parts]
        for piece_name in _piece_names(name, -(-length // _CHUNK)):  # one at a time: who takes none isn't sent the rest
            piece, room = [], _CHUNK
            while rest and room:
                piece.append(rest[0][:room])
                room -= piece[-1].nbytes
                rest[0] = rest[0][piece[-1].nbytes :]
                if not rest[0].nbytes:
                    del rest[0]
            self._run([piece_name], [_set(piece_name, piece, _CHUNK - room, expires)], deadline, [None])

    def _assembled(self, name: bytes, manifest: Buffer, deadline: Deadline) -> Buffer | None:
        _, count, length = _MANIFEST.unpack(manifest)
        if not 0 < length <= count * _CHUNK or length <= (count - 1) * _CHUNK:
            return None
        names = _piece_names(name, count)
        whole = bytearray(length)
        for start, piece_name in zip(range(0, length, _CHUNK), names, strict=True):
            piece: list[Any] = [None]
            self._run([piece_name], [command(b"GET", piece_name)], deadline, piece)
            if piece[0] is None or len(piece[0]) != min(_CHUNK, length - start):
                return None
            whole[start : start + len(piece[0])] = piece[0]
        return whole

    # ---- Commands and replies

    def _run(
        self, names: Sequence[bytes], commands: Sequence[list[Buffer]], deadline: Deadline, replies: list[Any]
    ) -> None:
        """Send a command for each name to whoever has it, all at once, and put the replies in their places."""
        left = list(range(len(names)))
        unserved: list[int] = []
        for attempt in range(4):
            moved: list[int] = []
            asked: dict[str, list[int]] = {}
            parts, nobodys = self._route([names[i] for i in left], deadline, refresh=attempt > 0)
            unserved += [left[i] for i in nobodys]
            for server, chosen in parts.items():
                self._exchange(server, [left[i] for i in chosen], commands, deadline, replies, moved, asked)
            for place, chosen in asked.items():  # what isn't there any more of a slot on its way elsewhere
                server = self._server_at(place)
                self._exchange(server, chosen, commands, deadline, replies, moved, asked, asking=True)
            left = moved
            if not left:
                break
        if left:
            raise StoreFault("moved", f"{self.name}: the servers keep sending each other's keys back and forth")
        if unserved:
            raise StoreFault(
                "unserved", f"{self.name}: no server of the cluster has the slots of {len(unserved)} names",
                sent=False, answered=True,
            )  # fmt: skip

    def _exchange(
        self, server: Server, chosen: list[int], commands: Sequence[list[Buffer]], deadline: Deadline,
        replies: list[Any], moved: list[int], asked: dict[str, list[int]], *, asking: bool = False,
    ) -> None:  # fmt: skip
        """Talk to a server. What others have is told in `moved`, or in `asked`, by where, if they have it this once."""
        asks = command(b"ASKING") if asking else []
        pieces = [piece for i in chosen for piece in (*asks, *commands[i])]

        def talk(wire: Wire) -> ReplyError | None:
            failed = None
            wire.send(pieces, deadline)
            for i in chosen:
                if asking:
                    wire.reply(deadline)
                reply = wire.reply(deadline)
                if type(reply) is not ReplyError:
                    replies[i] = reply
                elif reply.kind == "ASK" and self._is_cluster and not asking:
                    asked.setdefault(_place(reply, server.host), []).append(i)
                elif reply.kind == "ASK" or reply.kind in _MOVED:
                    moved.append(i)
                else:
                    failed = reply
            return failed

        try:
            failed = server.use(talk, deadline)
        except StoreFault as fault:
            self._stale = True
            # What was there before the fault counts for a read; a reply that didn't come is None already.
            if str(fault).startswith(self.name):
                raise
            raise StoreFault(fault.kind, f"{self.name}: {fault}", sent=fault.sent) from fault
        if failed is not None:
            answered = failed.kind not in _SERVES_NOBODY
            raise StoreFault(failed.kind, f"{self.name}: {failed}", sent=False, answered=answered)

    def _route(
        self, names: Sequence[bytes], deadline: Deadline, *, refresh: bool
    ) -> tuple[dict[Server, list[int]], list[int]]:
        """Return which of the names each server has, and which are nobody's."""
        if not self._is_cluster:
            return {self._server("", self._options): list(range(len(names)))}, []
        if self._cluster is None or refresh or self._stale:
            within(deadline, self._look_around)
        parts: dict[Server, list[int]] = {}
        unserved: list[int] = []
        for i, name in enumerate(names):
            try:
                node = self._cluster.nodes_manager.get_node_from_slot(self._cluster.keyslot(name))
            except self._library.exceptions.SlotNotCoveredError:
                unserved.append(i)
                continue
            parts.setdefault(self._server_at(node.name), []).append(i)
        if unserved and time.monotonic() - self._looked_at > _LOOK_AGAIN_S:
            self._stale = True  # for the next time
        return parts, unserved

    def _look_around(self) -> None:
        """Ask the cluster who has what."""
        try:
            if self._cluster is None:
                limits = {"socket_timeout": _HANDSHAKE_S, "socket_connect_timeout": _HANDSHAKE_S}
                self._cluster = self._library.ValkeyCluster(**(self._options | limits))
            else:
                self._cluster.nodes_manager.initialize()
        except Exception as error:  # noqa: BLE001 - whatever the library raises is a fault
            raise self._fault(error) from None
        self._stale, self._looked_at = False, time.monotonic()

    def _server_at(self, place: str) -> Server:
        """Return a server of the cluster by "host:port"."""
        host, _, port = place.rpartition(":")
        return self._server(place, self._options | {"host": host, "port": int(port)})

    def _server(self, key: str, options: dict[str, Any]) -> Server:
        with self._lock:
            if self._closed:
                raise StoreFault("closed", f"{self.name} is closed", sent=False)
            server = self._servers.get(key)
            if server is None:
                server = self._servers[key] = Server(lambda: self._connect(options), options.get("host", ""))
            return server

    def _connect(self, options: dict[str, Any]) -> Wire:
        kinds = self._library.connection
        if "path" in options:
            kind = kinds.UnixDomainSocketConnection
        elif any(name.startswith("ssl_") for name in options):
            kind = kinds.SSLConnection
        else:
            kind = kinds.Connection
        options = {name: value for name, value in options.items() if name != "ssl"}  # the cluster client's word for it
        limits = {"socket_timeout": _HANDSHAKE_S}
        if "path" not in options:
            limits |= {"socket_connect_timeout": _HANDSHAKE_S}
        connection = kind(**(options | limits))
        try:
            connection.connect()
            self._connections += 1
            return Wire(connection)
        except Exception as error:  # noqa: BLE001 - whatever the library raises is a fault
            connection.disconnect()
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> StoreFault:
        """What the library raises, as a fault: its kind, and of its text only what names no secret."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, self._library.AuthenticationError):
            return StoreFault("auth", f"{self.name}: the server refuses this user or password", sent=False)
        if isinstance(cause, OSError):
            fault = fault_of(cause)
            return StoreFault(fault.kind, f"{self.name}: {fault}", sent=False)
        return StoreFault(type(error).__name__, f"{self.name}: can't be connected to", sent=False)


def _place(ask: ReplyError, host: str) -> str:
    """Where "ASK slot host:port" points to; without a host, the one that says so means itself."""
    place = str(ask).split()[-1]
    return host + place if place.startswith(":") and place.count(":") == 1 else place


def _get(name: bytes) -> list[Buffer]:
    """The command that reads a value: `command`, for what is called most."""
    return [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)]


def _set(name: bytes, parts: Sequence[Buffer], length: int, expires: int) -> list[Buffer]:
    """The command that stores a value of several parts, of which the small ones are joined."""
    joined: list[Buffer] = [
        b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (5 if expires else 3, len(name), name, length)
    ]
    pieces: list[Buffer] = []
    for part in parts:
        if memoryview(part).nbytes <= 4096:
            joined.append(part)
        else:
            pieces += (b"".join(joined), part)
            joined = []
    if expires:
        when = b"%d" % max(1, expires)
        joined.append(b"\r\n$4\r\nPXAT\r\n$%d\r\n%b\r\n" % (len(when), when))
    else:
        joined.append(b"\r\n")
    pieces.append(b"".join(joined))
    return pieces


def _is_manifest(value: Buffer) -> bool:
    return len(value) == _MANIFEST.size and bytes(value[:4]) == _MAGIC  # type: ignore[arg-type,index]


def _piece_names(name: bytes, count: int) -> list[bytes]:
    return [b"%b#%d" % (name, i) for i in range(count)]
