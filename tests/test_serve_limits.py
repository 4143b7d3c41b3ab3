"""The server at its limits: full queues, clients that go away, and its own end."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")

import httpx
import uvicorn
from support.openai_server import REQUEST_LIMIT_S, Served, chat
from support.processes import HANG_LIMIT_S

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(1500)]

LONG = {"model": "smol", "prompt": "ding dong " * 30, "temperature": 0, "max_tokens": 2000, "stream": True}
"""What the model goes on with for as long as it may."""


@pytest.fixture
def served(smollm_directory: Path) -> Iterator[Served]:
    """One worker, in which one request may wait."""
    server = Served(smollm_directory, "--queue", "1", "--grace", "60", "--memory", "256MiB")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def until_pending(served: Served, count: int) -> None:
    """Wait until so many requests wait or are generated."""
    deadline = time.monotonic() + REQUEST_LIMIT_S
    while served.get("/health").json()["pending"] != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def asking(served: Served, body: Any) -> Iterator[None]:
    """A request whose connection is closed at the end, whatever has come."""
    host, port = served.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + data)
        yield


def test_a_full_queue_says_when_to_come_again_and_a_client_that_went_makes_room(served: Served) -> None:
    url = f"{served.url}/v1/chat/completions"
    with httpx.Client(timeout=REQUEST_LIMIT_S) as client:
        with client.stream("POST", f"{served.url}/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()  # kept: httpx closes the connection when it goes
            next(lines)
            with asking(served, chat("Hello")):
                until_pending(served, 2)
                refused = httpx.post(url, json=chat("Hello"), timeout=REQUEST_LIMIT_S)
            # That one has gone while it waited; the first one goes while it is generated, hundreds of tokens early.
        until_pending(served, 0)

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert served.chat("Hello")["usage"]["completion_tokens"] > 0
    text = served.get("/metrics").text
    assert 'kvstrata_serve_requests_total{endpoint="/v1/chat/completions",status="429"} 1.0' in text
    generated = [line for line in text.splitlines() if 'kind="generated"' in line]
    assert float(generated[0].split()[-1]) <= 16


def test_a_server_that_is_stopped_finishes_what_it_has_begun(served: Served) -> None:
    body = {**chat("Count.", max_tokens=60), "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=REQUEST_LIMIT_S) as response:
        lines = response.iter_lines()
        got = [next(lines)]
        served.process.terminate()
        got += [line for line in lines if line]

    assert got[-1] == "data: [DONE]"
    assert json.loads(got[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    assert served.process.wait(REQUEST_LIMIT_S) == 0


def test_a_gguf_file_is_unpacked_for_several_workers_and_served(smollm: Any) -> None:
    from kvstrata.demo.model import model_file

    model, tokenizer, _ = smollm
    expected = model.generate(**tokenizer("The keepers", return_tensors="pt"), do_sample=False, max_new_tokens=8)[0]
    server = Served(model_file(), "--workers", "2", "--memory", "256MiB")
    try:
        server.wait_until_ready()
        body = {"model": "smol", "prompt": "The keepers", "temperature": 0, "max_tokens": 8}
        answer = server.post("/v1/completions", body).json()["choices"][0]["text"]
    finally:
        server.stop()

    assert "The keepers" + answer == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_start_that_is_told_to_stop_leaves_nothing_behind(smollm_directory: Path, tmp_path: Path) -> None:
    server = Served(smollm_directory, "--workers", "2", TMPDIR=str(tmp_path))
    server.wait_for_its_address()  # and not until a worker is ready
    server.stop()

    assert list(tmp_path.glob("kvstrata-*")) == []


def test_a_worker_that_is_dead_does_not_let_its_supervisor_wait_for_an_answer() -> None:
    from kvstrata.serve.run import _Worker

    class Silent(_Worker):
        def target(self, sockets: Any = None) -> None:
            signal.pause()

    worker = Silent(uvicorn.Config("none"), [])
    worker.start()
    worker.process.kill()

    assert worker.parent_conn.poll(HANG_LIMIT_S)  # it is at its end
    assert not worker.ping(REQUEST_LIMIT_S)
    worker.process.join()


def test_a_model_that_is_not_there_or_can_not_be_loaded_ends_it_with_one_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for model, says in ((tmp_path / "none", "no model"), (tmp_path, "could not be loaded")):
        server = Served(model)
        assert server.process.wait(REQUEST_LIMIT_S) == 2
        assert says in " ".join(server.log().split())
        server.stop()
