"""Valkey and Redis as stores of records: real servers, one or three, over each kind of connection."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenCache
from record_store_contract import PATIENCE_S, NativeExpiryContract, RecordStoreContract, pattern, record
from support.servers import Server, TLSFront, valkey_cluster, valkey_server
from support.stores import Host

from kvstrata.tiers.base import StoreFault
from kvstrata.tiers.valkey import ValkeyStore

pytest.importorskip("valkey")
valkey: Any = pytest.importorskip("valkey")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with valkey_server() as started:
        yield started


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Server]]:
    with valkey_cluster() as started:
        yield started


@contextlib.contextmanager
def opened(**options: Any) -> Iterator[ValkeyStore]:
    cluster = options.pop("cluster", False)
    store = ValkeyStore(
        "the store", {"host": "127.0.0.1"} | options if "path" not in options else options, cluster=cluster
    )
    try:
        yield store
    finally:
        store.close()


class TestTCP(RecordStoreContract, NativeExpiryContract):
    @pytest.fixture
    def store(self, server: Server) -> Iterator[ValkeyStore]:
        with valkey.Valkey(port=server.port) as client:
            client.flushall()
        with opened(port=server.port) as store:
            yield store

    def test_another_client_sees_the_records_as_they_are(self, server: Server, store: ValkeyStore) -> None:
        store.write([record(b"name", b"bytes", int(time.time() * 1000) + 60_000)], PATIENCE_S)
        with valkey.Valkey(port=server.port) as client:
            assert client.get(b"name") == b"bytes"
            assert 0 < client.pttl(b"name") <= 60_000

    def test_a_deleted_large_record_leaves_no_pieces(self, server: Server, store: ValkeyStore) -> None:
        store.write([record(b"large", bytes(20 << 20))], PATIENCE_S)
        with valkey.Valkey(port=server.port) as client:
            assert client.dbsize() == 4
            store.delete([b"large"], PATIENCE_S)
            assert client.dbsize() == 0

    @pytest.mark.parametrize("damage", ["lost", "cut"])
    def test_a_large_record_without_all_of_its_pieces_is_absent(
        self, server: Server, store: ValkeyStore, damage: str
    ) -> None:
        store.write([record(b"large", pattern(20 << 20)), record(b"other", b"x")], PATIENCE_S)
        with valkey.Valkey(port=server.port) as client:
            if damage == "lost":
                client.delete(b"large#1")
            else:
                client.set(b"large#1", b"short")
        assert store.read([b"large", b"other"], PATIENCE_S) == [None, b"x"]

    def test_a_batch_takes_one_connection_and_a_new_one_is_made_when_it_has_died(
        self, server: Server, store: ValkeyStore
    ) -> None:
        store.write([record(b"%d" % i, pattern(16384, i)) for i in range(64)], PATIENCE_S)
        assert store.stats()["connections"] == 1
        with valkey.Valkey(port=server.port) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert store.read([b"3"], PATIENCE_S) == [pattern(16384, 3)]
        assert store.stats()["connections"] == 2

    def test_what_is_no_string_there_is_a_fault_and_the_others_are_found(
        self, server: Server, store: ValkeyStore
    ) -> None:
        store.write([record(b"a", b"1"), record(b"c", b"3")], PATIENCE_S)
        with valkey.Valkey(port=server.port) as client:
            client.lpush(b"b", b"2")
        with pytest.raises(StoreFault) as raised:
            store.read([b"a", b"b", b"c"], PATIENCE_S)
        assert (raised.value.kind, raised.value.found) == ("WRONGTYPE", [b"1", None, b"3"])


class TestUnixSocket(RecordStoreContract):
    @pytest.fixture
    def store(self, server: Server) -> Iterator[ValkeyStore]:
        with valkey.Valkey(port=server.port) as client:
            client.flushall()
        with opened(path=str(server.directory / "socket")) as store:
            yield store


@pytest.fixture
def tls(server: Server, tmp_path: Path) -> Iterator[TLSFront]:
    """The server behind TLS; what proves who it is was signed by the authority in `ca.pem`, not by `another.pem`."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "another.pem"))
    with TLSFront(server.port, context) as front:
        yield front


class TestTLS(RecordStoreContract):
    @pytest.fixture
    def store(self, server: Server, tls: TLSFront, tmp_path: Path) -> Iterator[ValkeyStore]:
        with valkey.Valkey(port=server.port) as client:
            client.flushall()
        with opened(port=tls.port, ssl_ca_certs=str(tmp_path / "ca.pem"), ssl_check_hostname=True) as store:
            yield store


def test_a_server_that_cannot_prove_who_it_is_gets_nothing(tls: TLSFront, tmp_path: Path) -> None:
    with (
        opened(port=tls.port, ssl_ca_certs=str(tmp_path / "another.pem")) as store,
        pytest.raises(StoreFault) as raised,
    ):
        store.read([b"name"], PATIENCE_S)
    assert raised.value.kind == "SSLCertVerificationError"


def test_hosts_share_records_over_tls_with_certificates_on_both_sides(
    server: Server, open_cache: OpenCache, tmp_path: Path
) -> None:
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    mine = authority.issue_cert("client.example")
    mine.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    mine.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    with TLSFront(server.port, context) as front:
        where = f"rediss://localhost:{front.port}?prefix=tls&lookup_timeout=20&tls_ca={tmp_path}/ca.pem"
        proof = f"&tls_cert={tmp_path}/cert.pem&tls_key={tmp_path}/key.pem"
        a, b = open_cache(tmp_path / "a", remote=where + proof), open_cache(tmp_path / "b", remote=where + proof)
        a.put("key", b"value")
        a.flush()
        assert b.get("key") == b"value"
        by_number = where.replace("localhost", "127.0.0.1") + proof  # which its certificate doesn't name
        for wrong in (where, by_number):
            cache = open_cache(tmp_path / "c", remote=wrong)
            assert cache.get("key") is None
            assert any(name.startswith("error") for name in cache.stats()["remote"][0])
            cache.close()
        trusting = open_cache(tmp_path / "d", remote=by_number + "&tls_verify=no")
        assert trusting.get("key") == b"value"


class TestCluster(RecordStoreContract):
    @pytest.fixture
    def store(self, cluster: list[Server]) -> Iterator[ValkeyStore]:
        for server in cluster:
            with valkey.Valkey(port=server.port) as client:
                client.flushall()
        with opened(port=cluster[0].port, cluster=True) as store:
            yield store

    def test_records_lie_on_all_servers(self, cluster: list[Server], store: ValkeyStore) -> None:
        store.write([record(b"%d" % i, b"x") for i in range(300)], PATIENCE_S)
        counts = []
        for server in cluster:
            with valkey.Valkey(port=server.port) as client:
                counts.append(client.dbsize())
        assert sum(counts) == 300
        assert min(counts) > 0

    def test_records_are_found_where_their_slot_has_moved_to(self, cluster: list[Server], store: ValkeyStore) -> None:
        store.write([record(b"%d" % i, b"x%d" % i) for i in range(100)], PATIENCE_S)
        with moving(cluster, b"7") as (_, rest):
            rest()
        assert store.read([b"%d" % i for i in range(100)], PATIENCE_S) == [b"x%d" % i for i in range(100)]

    def test_records_are_reached_while_their_slot_is_on_its_way(
        self, cluster: list[Server], store: ValkeyStore
    ) -> None:
        names = [b"%d" % i for i in range(50)] + [b"{7}here", b"{7}gone ahead", b"{7}new"]
        store.write([record(name, name) for name in names[:-1]], PATIENCE_S)
        with moving(cluster, b"7") as (move, rest):
            move(b"{7}gone ahead")
            assert store.read(names, PATIENCE_S) == [*names[:-1], None]
            store.write([record(name, name + b"!") for name in names], PATIENCE_S)
            assert store.read(names, PATIENCE_S) == [name + b"!" for name in names]
            assert store.contains(names, PATIENCE_S) == [True] * len(names)
            store.delete([b"{7}gone ahead", b"{7}here"], PATIENCE_S)
            assert store.read(names[-3:], PATIENCE_S) == [None, None, b"{7}new!"]
            rest()
        assert store.read(names[-3:], PATIENCE_S) == [None, None, b"{7}new!"]


@contextlib.contextmanager
def moving(cluster: list[Server], name: bytes) -> Iterator[tuple[Callable[..., None], Callable[[], None]]]:
    """Open the slot of a record for its move to another server: what moves records by name, and what moves the rest."""
    from valkey.crc import key_slot

    slot = key_slot(name)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(valkey.Valkey(port=server.port)) for server in cluster]
        owner = next(c for c in clients if c.execute_command("CLUSTER COUNTKEYSINSLOT", slot))
        other = next(c for c in clients if c is not owner)
        ids = {c: c.execute_command("CLUSTER MYID").decode() for c in (owner, other)}
        port = other.connection_pool.connection_kwargs["port"]
        other.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[owner])
        owner.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[other])

        def move(*names: bytes) -> None:
            for each in names:
                owner.execute_command("MIGRATE", "127.0.0.1", port, each, 0, 5000)

        def rest() -> None:
            move(*owner.execute_command("CLUSTER GETKEYSINSLOT", slot, 100))
            for client in (other, owner, *(c for c in clients if c not in (owner, other))):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[other])

        yield move, rest


def test_a_slot_that_no_server_has_costs_its_own_records_only() -> None:
    from valkey.crc import key_slot

    items = {b"%d" % i: b"x%d" % i for i in range(50)}
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(valkey_cluster())
        known, new = (stack.enter_context(opened(port=servers[0].port, cluster=True)) for _ in range(2))
        host = Host(known)
        host.write(items)
        slots = [key_slot(name) for name in host.space.names(list(items), host.space.generation or 0)]
        lost = next(slot for slot in slots if slot != key_slot(host.space.generation_name))
        clients = [stack.enter_context(valkey.Valkey(port=server.port)) for server in servers]
        for client in clients:
            client.config_set("cluster-require-full-coverage", "no")
        deadline = time.monotonic() + PATIENCE_S
        while any(int(client.cluster("INFO")["cluster_slots_assigned"]) == 16384 for client in clients):
            assert time.monotonic() < deadline
            for client in clients:
                with contextlib.suppress(valkey.ResponseError):  # it knows already
                    client.execute_command("CLUSTER DELSLOTS", lost)
        expected = [None if slot == lost else value for slot, value in zip(slots, items.values(), strict=True)]
        for some in (host, Host(new)):
            assert [some.load(list(items)) for _ in range(5)] == [expected] * 5
            assert some.tier.stats()["breaker_opened"] == 0
            with pytest.raises(StoreFault, match="no server of the cluster has the slots"):
                some.write(items)
        with pytest.raises(StoreFault, match="no server of the cluster has the slots"):
            host.tier.delete(host.space, list(items))


def test_a_user_with_a_password_may_and_one_without_gets_a_fault_that_tells_no_secret() -> None:
    users = ("--user", "default", "off", "--user", *["tester", "on", ">hunter2secret", "~kvstrata*", "+@all"])
    with valkey_server(*users) as server:
        with opened(port=server.port, username="tester", password="hunter2secret") as store:
            store.write([record(b"kvstrata:1", b"x")], PATIENCE_S)
            assert store.read([b"kvstrata:1"], PATIENCE_S) == [b"x"]
            with pytest.raises(StoreFault) as refused:
                store.read([b"elsewhere"], PATIENCE_S)
            assert refused.value.kind == "NOPERM"
        for options in ({}, {"username": "tester", "password": "wrong-secret"}):
            with opened(port=server.port, **options) as store, pytest.raises(StoreFault) as raised:
                store.read([b"kvstrata:1"], PATIENCE_S)
            assert raised.value.kind in ("auth", "NOAUTH")
            assert "secret" not in f"{raised.value} {store.stats()} {store!r} {raised.value.__cause__!r}"


def test_hosts_share_records_through_a_cluster(cluster: list[Server], open_cache: OpenCache, tmp_path: Path) -> None:
    url = f"redis+cluster://127.0.0.1:{cluster[1].port}?prefix=shared&lookup_timeout=20"
    a, b = open_cache(tmp_path / "a", remote=url), open_cache(tmp_path / "b", remote=url)
    values = {f"{i}": pattern(100 * i) for i in range(100)}
    a.put_many(values)
    a.flush()
    assert b.contains_prefix([*values, "absent"]) == 100
    assert b.get_many([*values, "absent"]) == [*values.values(), None]
    a.clear()
    assert open_cache(tmp_path / "c", remote=url).get_many(list(values)) == [None] * 100


def test_a_server_that_is_not_there_is_a_fault_at_once() -> None:
    with valkey_server() as server:
        port = server.port
    for options in ({"port": port}, {"path": "/nonexistent/socket"}, {"port": port, "cluster": True}):
        with opened(**options) as store, pytest.raises(StoreFault) as raised:
            store.read([b"name"], PATIENCE_S)
        assert raised.value.kind in ("ECONNREFUSED", "ENOENT")
        assert str(raised.value) in ("the store: Connection refused", "the store: No such file or directory")


def test_a_server_that_stands_still_is_a_timeout_and_its_late_answers_are_nobody_elses() -> None:
    with valkey_server() as server, opened(port=server.port) as store:
        store.write([record(b"%d" % i, b"value %d" % i) for i in range(10)], PATIENCE_S)
        server.pause()
        with pytest.raises(StoreFault) as raised:
            store.read([b"1"], 0.05)
        assert raised.value.kind == "timeout"
        server.resume()
        assert store.read([b"2", b"3"], PATIENCE_S) == [b"value 2", b"value 3"]


def test_threads_wait_for_nobody_elses_answer() -> None:
    with valkey_server() as server, opened(port=server.port) as store:
        store.write([record(b"a", pattern(1 << 20))], PATIENCE_S)
        results: list[Any] = []
        threads = [threading.Thread(target=lambda: results.append(store.read([b"a"], PATIENCE_S))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[pattern(1 << 20)]] * 20
