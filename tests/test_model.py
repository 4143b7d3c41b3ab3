"""Random sequences of everything that a cache can do, compared with a dict after each step."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from support.processes import SOAK

import kvstrata
import kvstrata.policies
from kvstrata.errors import TierFull, VersionConflict

KEYS = [bytes([65 + i]) * length for i, length in enumerate((1, 2, 31, 32, 33, 200, 1023, 1024))] + [b"A\0"]
SIZES = [0, 1, 63, 64, 1000, 4095, 4096, 30_000, 65_535, 65_536, 65_537, 200_000]
NAMES = ["default", "another", "immutable"]

keys = st.sampled_from(KEYS)
sizes = st.sampled_from(SIZES)
names = st.sampled_from(NAMES)
handles = st.integers(0, 1)


class Variant(NamedTuple):
    """How the caches are opened, and what that lets them do."""

    options: dict[str, Any]
    openers: int = 1
    loses: bool = False  # it is too small for everything: a record may be gone, and stays gone then
    on_disk: bool = False

    @property
    def policies(self) -> dict[str, str]:
        """The policy of each namespace that can have one of its own: with all variants, every policy."""
        others = [name for name in kvstrata.policies.names() if name not in ("lru", "auto")]
        return {"another": others[list(VARIANTS.values()).index(self)], "immutable": "auto"}


VARIANTS = {
    "private": Variant({"memory": "32MiB"}),
    "private, too small": Variant({"memory": "1MiB"}, loses=True),
    "two openers": Variant({"memory": "32MiB", "disk": 0}, openers=2),
    "two openers, too small": Variant({"memory": "1MiB", "disk": 0}, openers=2, loses=True),
    "disk": Variant({"memory": "32MiB", "disk": "256MiB"}, on_disk=True),
    "disk, small memory": Variant({"memory": "2MiB", "disk": "256MiB"}, openers=2, on_disk=True),
    "small disk": Variant({"memory": "1MiB", "disk": "4MiB"}, openers=2, loses=True, on_disk=True),
}


class GaveUp(Exception):
    """What a caller raises inside a reservation."""


def give_up_now() -> None:
    raise GaveUp


class Machine(RuleBasedStateMachine):
    def __init__(self, variant: Variant, directory: Path | None) -> None:
        super().__init__()
        self.variant = variant
        self.directory = directory
        self.serial = itertools.count(1)
        self.versions = dict.fromkeys(NAMES, 1)
        # For each namespace: what a key may hold. Absence is always possible where the variant loses records.
        self.model: dict[str, dict[bytes, set[bytes]]] = {name: {} for name in NAMES}
        self.pins: list[tuple[ExitStack, memoryview, bytes]] = []
        self.open()

    def open(self) -> None:
        self.caches = [kvstrata.open(self.directory, **self.variant.options) for _ in range(self.variant.openers)]
        self.open_namespaces()

    def open_namespaces(self) -> None:
        self.namespaces = [
            {
                name: cache
                if name == "default"
                else cache.namespace(
                    name,
                    version=self.versions[name],
                    policy=self.variant.policies[name],
                    immutable=name == "immutable",
                )
                for name in NAMES
            }
            for cache in self.caches
        ]

    def ns(self, handle: int, name: str) -> kvstrata.Namespace:
        return self.namespaces[handle % len(self.namespaces)][name]

    def new_value(self, size: int) -> bytes:
        return np.random.default_rng(next(self.serial)).bytes(size)

    # ---- The model

    def stored(self, name: str, key: bytes, value: bytes) -> None:
        known = self.model[name]
        if name == "immutable" and key in known:
            if self.variant.loses:
                known[key] |= {value}  # the old one may have been gone
            return
        known[key] = {value}

    def check(self, name: str, key: bytes, got: bytes | None) -> None:
        allowed = self.model[name].get(key, set())
        if got is None:
            assert self.variant.loses or not allowed, f"{key[:8]!r} is gone"
            self.model[name].pop(key, None)
        else:
            assert got in allowed, f"{key[:8]!r} has a wrong value of {len(got)} bytes"
            self.model[name][key] = {got}

    # ---- Writing

    def may_be_full(self, error: TierFull) -> None:
        """Where everything in memory is pinned, a put may fail; it changes nothing then."""
        if not self.variant.loses:
            raise error

    @rule(handle=handles, name=names, key=keys, size=sizes)
    def put(self, handle: int, name: str, key: bytes, size: int) -> None:
        value = self.new_value(size)
        try:
            self.ns(handle, name).put(key, value)
        except TierFull as error:
            return self.may_be_full(error)
        return self.stored(name, key, value)

    @rule(handle=handles, name=names, chosen=st.lists(st.tuples(keys, sizes), max_size=6, unique_by=lambda x: x[0]))
    def put_many(self, handle: int, name: str, chosen: list[tuple[bytes, int]]) -> None:
        items = {key: self.new_value(size) for key, size in chosen}
        try:
            self.ns(handle, name).put_many(items)
        except TierFull as error:
            for key, value in items.items():
                self.model[name].setdefault(key, set()).add(value)  # or the one before
            return self.may_be_full(error)
        for key, value in items.items():
            self.stored(name, key, value)
        return None

    @rule(handle=handles, name=names, key=keys, size=sizes, inside=keys, give_up=st.booleans())
    def reserve(self, handle: int, name: str, key: bytes, size: int, inside: bytes, give_up: bool) -> None:
        value = self.new_value(size)
        try:
            with self.ns(handle, name).reserve(key, size) as view:
                view[:] = value
                self.get(handle + 1, name, inside)
                if give_up:
                    give_up_now()
        except GaveUp:
            return None
        except TierFull as error:
            return self.may_be_full(error)
        return self.stored(name, key, value)

    @rule(handle=handles, name=names, key=keys)
    def put_for_a_moment(self, handle: int, name: str, key: bytes) -> None:
        ns = self.ns(handle, name)
        before = ns.get(key)
        self.check(name, key, before)
        if name == "immutable" and before is not None:
            return
        try:
            ns.put(key, b"short-lived", ttl=0.001)
        except TierFull as error:
            self.may_be_full(error)
            return
        while ns.get(key) is not None:
            pass
        self.model[name].pop(key, None)

    @rule(handle=handles, name=names, key=keys)
    def delete(self, handle: int, name: str, key: bytes) -> None:
        was_there = self.ns(handle, name).delete(key)
        if not self.variant.loses:
            assert was_there == (key in self.model[name])
        else:
            assert not was_there or key in self.model[name]
        self.model[name].pop(key, None)

    @rule(handle=handles, name=names)
    def clear(self, handle: int, name: str) -> None:
        self.ns(handle, name).clear()
        self.model[name].clear()

    @rule(name=st.sampled_from(NAMES[1:]))
    def move_on_to_a_newer_version(self, name: str) -> None:
        old = [self.ns(handle, name) for handle in range(2)]
        self.versions[name] += 1
        self.open_namespaces()
        self.model[name].clear()
        for ns in old:
            assert ns.get(KEYS[0]) is None
            with pytest.raises(VersionConflict):
                ns.put(KEYS[0], b"late")

    # ---- Reading

    @rule(handle=handles, name=names, key=keys)
    def get(self, handle: int, name: str, key: bytes) -> None:
        self.check(name, key, self.ns(handle, name).get(key))

    @rule(handle=handles, name=names, key=keys)
    def get_into(self, handle: int, name: str, key: bytes) -> None:
        out = bytearray(b"\xee" * (SIZES[-1] + 1))
        got = self.ns(handle, name).get(key, out=out)
        self.check(name, key, None if got is None else bytes(got))
        assert out.endswith(b"\xee")

    @rule(handle=handles, name=names, chosen=st.lists(keys, max_size=12))
    def get_many(self, handle: int, name: str, chosen: list[bytes]) -> None:
        for key, got in zip(chosen, self.ns(handle, name).get_many(chosen), strict=True):
            self.check(name, key, got)

    @rule(handle=handles, name=names, chosen=st.lists(keys, max_size=12))
    def contains_prefix(self, handle: int, name: str, chosen: list[bytes]) -> None:
        ns = self.ns(handle, name)
        known = self.model[name]
        run = ns.contains_prefix(chosen)
        expected = len(list(itertools.takewhile(known.__contains__, chosen)))
        assert run == expected or (self.variant.loses and run < expected)
        assert [key in ns for key in chosen[: run + 1]] == ([True] * run + [False])[: len(chosen)]

    @rule(handle=handles, name=names, key=keys)
    def pin(self, handle: int, name: str, key: bytes) -> None:
        stack = ExitStack()
        try:
            view = stack.enter_context(self.ns(handle, name).pin(key))
        except KeyError:
            self.check(name, key, None)
        else:
            value = bytes(view)
            self.check(name, key, value)
            self.pins.append((stack, view, value))

    @precondition(lambda self: self.pins)
    @rule(which=st.integers(0))
    def unpin(self, which: int) -> None:
        stack, view, value = self.pins.pop(which % len(self.pins))
        assert view == value
        stack.close()

    # ---- Between the tiers

    @precondition(lambda self: self.variant.on_disk)
    @rule(handle=handles)
    def flush(self, handle: int) -> None:
        self.caches[handle % len(self.caches)].flush()

    @precondition(lambda self: self.variant.on_disk)
    @rule(handle=handles)
    def flush_and_demote(self, handle: int) -> None:
        for cache in self.caches:
            cache.flush()
        self.caches[handle % len(self.caches)].demote()

    @rule()
    def close_and_open_again(self) -> None:
        self.close()
        if not self.variant.on_disk:
            self.model = {name: {} for name in NAMES}
            self.versions = dict.fromkeys(NAMES, 1)
        self.open()

    def close(self) -> None:
        while self.pins:
            self.unpin(0)
        for cache in self.caches:
            cache.flush()
            stats = cache.stats()["memory"]
            assert (stats["pins"], stats["reservations"], stats["allocator_faults"]) == (0, 0, 0)
        for cache in self.caches:
            cache.close()

    def teardown(self) -> None:
        for handle, name, key in itertools.product(range(len(self.caches)), NAMES, KEYS):
            self.get(handle, name, key)
        self.close()


@pytest.mark.parametrize("name", VARIANTS)
def test_any_sequence_of_operations_behaves_like_a_dict(name: str, shm: Path, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    number = itertools.count()

    def machine() -> Machine:
        directory = None if name.startswith("private") else tmp_path / str(next(number))
        return Machine(variant, directory)

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=8 * SOAK,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
