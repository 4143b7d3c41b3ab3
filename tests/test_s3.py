"""Object storage as a store of records: a real server with the interface of S3."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenCache
from record_store_contract import PATIENCE_S, RecordStoreContract, pattern, record
from support.servers import FlakyFront, Server, free_ports, s3_server

from kvstrata.tiers.base import StoreFault

obstore: Any = pytest.importorskip("obstore")
from kvstrata.tiers.s3 import S3Store  # noqa: E402

ACCESS, SECRET = "tester", "hunter2secret"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def options(port: int, secret: str = SECRET) -> dict[str, Any]:
    return {
        "endpoint": f"http://127.0.0.1:{port}", "access_key_id": ACCESS, "secret_access_key": secret,
        "region": "us-east-1", "virtual_hosted_style_request": False,
    }  # fmt: skip


def make_bucket(port: int, name: str) -> None:
    """Wait for the server to be ready for it."""
    store = S3Store("making", name, "", options(port))
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(StoreFault):
                store.write([record(b"ready", b"x")], 5.0)
                return
            assert time.monotonic() < deadline, "the server takes nothing"
            time.sleep(0.1)
    finally:
        store.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server(ACCESS, SECRET) as started:
        make_bucket(started.port, "tests")
        yield started


class TestS3(RecordStoreContract):
    @pytest.fixture
    def store(self, server: Server) -> Iterator[S3Store]:
        store = S3Store("the store", "tests", f"at/{secrets.token_hex(4)}", options(server.port))
        yield store
        store.close()


def test_a_wrong_secret_is_a_fault_that_tells_none(server: Server) -> None:
    store = S3Store("the store", "tests", "x", options(server.port, "wrong-secret"))
    try:
        with pytest.raises(StoreFault) as raised:
            store.read([b"name"], PATIENCE_S)
    finally:
        store.close()
    assert "secret" not in f"{raised.value} {store.stats()} {store!r}"


def test_a_server_that_is_not_there_is_a_fault_within_the_time_limit() -> None:
    (port,) = free_ports(1)
    store = S3Store("the store", "tests", "x", options(port))
    try:
        with pytest.raises(StoreFault) as raised:
            store.read([b"a", b"b"], 0.2)
        assert raised.value.found == [None, None]
    finally:
        store.close()


@pytest.mark.parametrize("how", ["503", "closed"])
def test_what_fails_for_a_moment_is_tried_again_within_the_time_limit(server: Server, how: str) -> None:
    with FlakyFront(server.port, how) as front:
        store = S3Store("the store", "tests", f"at/{secrets.token_hex(4)}", options(front.port))
        try:
            front.refuse = 3
            store.write([record(b"name", b"bytes")], PATIENCE_S)
            assert front.seen == 4
            assert store.read([b"name"], PATIENCE_S) == [b"bytes"]
        finally:
            store.close()


def test_what_goes_on_failing_is_a_fault_at_the_time_limit(server: Server) -> None:
    with FlakyFront(server.port, "503") as front:
        front.refuse = 1 << 30
        store = S3Store("the store", "tests", "x", options(front.port))
        try:
            with pytest.raises(StoreFault) as raised:
                store.read([b"name"], 0.2)
            assert raised.value.found == [None]
            assert front.seen > 1
        finally:
            store.close()


def test_a_server_that_stands_still_is_a_timeout_and_answers_later(server: Server) -> None:
    store = S3Store("the store", "tests", "x", options(server.port))
    try:
        store.write([record(b"name", b"bytes")], PATIENCE_S)
        server.pause()
        try:
            with pytest.raises(StoreFault) as raised:
                store.read([b"name"], 0.2)
        finally:
            server.resume()
        assert raised.value.kind == "timeout"
        assert store.read([b"name"], PATIENCE_S) == [b"bytes"]
    finally:
        store.close()


def test_who_waits_for_an_answer_while_another_closes_the_store_gets_a_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = S3Store("the store", "tests", "x", options(silent.getsockname()[1]))
        faults: list[StoreFault] = []

        def read() -> None:
            try:
                store.read([b"a", b"b"], 3600.0)
            except StoreFault as fault:
                faults.append(fault)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        with silent.accept()[0]:
            store.close()
            reader.join(PATIENCE_S)
    assert [fault.kind for fault in faults] == ["closed"]
    with pytest.raises(StoreFault, match="closed"):
        store.read([b"a"], PATIENCE_S)


def test_hosts_share_records_through_a_bucket(server: Server, open_cache: OpenCache, tmp_path: Path) -> None:
    query = f"endpoint=http://127.0.0.1:{server.port}&region=us-east-1&lookup_timeout=20&change_timeout=20"
    url = f"s3://{ACCESS}:{SECRET}@tests/{secrets.token_hex(4)}?{query}"
    a, b = open_cache(tmp_path / "a", remote=url), open_cache(tmp_path / "b", remote=url)
    values = {f"{size}": pattern(size) for size in (0, 5000, 1_000_000)}
    a.put_many(values)
    a.put("short", b"x", ttl=0.001)
    a.flush()
    assert b.get_many([*values, "absent"]) == [*values.values(), None]
    wait_for(lambda: b.stats()["remote"][0]["filter_off"] is None)  # there is one by default
    requests = b.stats()["remote"][0]["requests"]
    assert [b.get(f"absent {i}") for i in range(100)] == [None] * 100
    assert b.stats()["remote"][0]["requests"] - requests < 20
    a.delete("5000")
    b.clear()
    c = open_cache(tmp_path / "c", remote=url)
    assert c.get_many([*values, "short"]) == [None] * 4
    assert SECRET not in f"{a!r} {a.stats()}"
