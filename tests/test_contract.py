"""The contract of a namespace, for every way of opening a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from cache_contract import NamespaceContract
from conftest import OpenCache
from support.stores import MemoryStore

from kvstrata import Cache, Namespace
from kvstrata.remote_url import RemoteURL
from kvstrata.tiers.keyed import KeyedTier


class FromDisk:
    """A namespace whose records leave memory after every put, so that each get has to load from the disk."""

    def __init__(self, cache: Cache, ns: Namespace) -> None:
        self._cache = cache
        self._ns = ns

    def _demote(self) -> None:
        self._cache.flush()
        self._cache.demote()

    def put(self, key: Any, value: Any, **options: Any) -> None:
        self._ns.put(key, value, **options)
        self._demote()

    def put_many(self, items: Mapping[Any, Any], **options: Any) -> None:
        try:
            self._ns.put_many(items, **options)
        finally:
            self._demote()

    @contextmanager
    def reserve(self, key: Any, nbytes: int, **options: Any) -> Iterator[memoryview]:
        with self._ns.reserve(key, nbytes, **options) as view:
            yield view
        self._demote()

    def __contains__(self, key: Any) -> bool:
        return key in self._ns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ns, name)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "private": {"path": None},
    "shared": {},
    "exclusive": {"shared": False},
    "shared with disk": {"disk": "64MiB"},
    "exclusive with disk": {"disk": "64MiB", "shared": False},
    "from disk": {"disk": "64MiB"},
    "lsm": {"disk": "64MiB", "disk_engine": "lsm"},
    "btree": {"disk": "64MiB", "disk_engine": "btree"},
    "with a remote tier": {"remote": "redis://in.memory"},
    "with disk and a remote tier": {"disk": "64MiB", "remote": "redis://in.memory"},
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
class TestNamespace(NamespaceContract):
    @pytest.fixture(autouse=True)
    def remote_in_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RemoteURL, "open", lambda url: KeyedTier(MemoryStore(), lookup_s=30.0))

    @pytest.fixture
    def cache(self, configuration: str, open_cache: OpenCache) -> Cache:
        return open_cache(**CONFIGURATIONS[configuration])

    @pytest.fixture
    def namespace(self, configuration: str, cache: Cache) -> Any:
        def namespace(name: str, **options: Any) -> Any:
            ns = cache.namespace(name, **options)
            return FromDisk(cache, ns) if configuration == "from disk" else ns

        return namespace

    @pytest.fixture
    def ns(self, namespace: Any) -> Any:
        return namespace("tests")
