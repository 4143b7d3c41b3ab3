"""`kvstrata serve` as a process, and talking to one worker of it."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx

from support.processes import python_path

START_LIMIT_S = 600.0  # loading a model on a busy machine
REQUEST_LIMIT_S = 120.0
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else each client reads all the certificates of the world


class Served:
    """A running server."""

    def __init__(self, model: str | Path, *options: str, **environment: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [
            sys.executable, "-m", "kvstrata.cli", "serve", "--model", str(model), "--name", "smol", "--port", "0",
            "--threads", "1", *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log,
            env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        self.url = ""

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def wait_for_its_address(self) -> None:
        """Wait until it says where it will answer, which it does before its workers are there."""
        said = re.compile(r"at (http://[\d.]+:\d+)/v1")
        self._wait_until(lambda: said.search(self.log()) is not None)
        self.url = said.findall(self.log())[0]

    def wait_until_ready(self) -> None:
        self.wait_for_its_address()
        self._wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            return self.get("/health", timeout_s=5).status_code == 200
        except httpx.HTTPError:
            return False

    def _wait_until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not true():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"the server did not start: {self.log()}")
            time.sleep(0.2)

    def get(self, path: str, *, timeout_s: float = REQUEST_LIMIT_S) -> httpx.Response:
        with _client(timeout_s) as client:
            return client.get(f"{self.url}{path}")

    def post(self, path: str, body: Any, client: httpx.Client | None = None) -> httpx.Response:
        with nullcontext(client) if client else _client() as client:
            return client.post(f"{self.url}{path}", json=body)

    def chat(self, text: str, client: httpx.Client | None = None, **options: Any) -> dict[str, Any]:
        """The answer to a greedy chat."""
        response = self.post("/v1/chat/completions", chat(text, **options), client)
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    def workers(self, count: int) -> set[int]:
        """Ask until so many workers have answered; returns their process ids."""
        seen: set[int] = set()
        deadline = time.monotonic() + START_LIMIT_S
        while len(seen) < count:
            assert time.monotonic() < deadline, f"only workers {seen} answered: {self.log()}"
            seen |= self._burst()
            time.sleep(0.1)
        return seen

    @contextmanager
    def connected(self, worker: int) -> Iterator[httpx.Client]:
        """A connection to one worker: the kernel gives each new one to any of them."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            clients = [_client() for _ in range(8)]
            try:
                for client in clients:
                    if _worker(client.get(f"{self.url}/health")) == worker:
                        yield client
                        return
            finally:
                for client in clients:
                    client.close()
        raise AssertionError(f"worker {worker} took no connection")

    def _burst(self) -> set[int]:
        clients = [_client() for _ in range(8)]
        try:
            return {_worker(client.get(f"{self.url}/health")) for client in clients}
        except httpx.HTTPError:  # one was killed meanwhile
            return set()
        finally:
            for client in clients:
                client.close()

    def stop(self) -> int:
        """Tell it to stop; returns its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(REQUEST_LIMIT_S)
        finally:
            self.process.kill()
            self._log.close()


def chat(text: str, **options: Any) -> dict[str, Any]:
    """The body of a greedy chat."""
    return {
        "model": "smol",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 16,
        **options,
    }


def _client(timeout_s: float = REQUEST_LIMIT_S) -> httpx.Client:
    return httpx.Client(timeout=timeout_s, verify=_NO_TLS)


def _worker(response: httpx.Response) -> int:
    return int(response.headers["x-kvstrata-worker"])
