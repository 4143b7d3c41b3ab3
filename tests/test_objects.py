"""The object layer: what it gives back, and that it is never behind the shared tier."""

from __future__ import annotations

import datetime
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import OpenCache
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.processes import Process

import kvstrata
from kvstrata import _core
from kvstrata.errors import CacheClosed, ConfigError, InvalidKey, InvalidValue, MissingExtra, UnknownOption
from kvstrata.objects import ObjectCache

OPEN = "cache = kvstrata.open(directory, memory='8MiB', disk=0); ns = cache.namespace('o'); objects = ns.objects()"


@pytest.fixture
def objects(open_cache: OpenCache) -> ObjectCache:
    return open_cache().namespace("o").objects()


@pytest.fixture
def other(objects: ObjectCache, tmp_path: Any) -> Iterator[Process]:
    with Process() as process:
        process.run(OPEN, directory=tmp_path / "cache")
        yield process


def test_a_get_returns_the_very_object_that_was_put(objects: ObjectCache) -> None:
    value = {"weights": [1, 2, 3], "when": datetime.date(2026, 1, 1)}
    objects.put("a", value)
    assert objects.get("a") is value
    assert objects.get(key_of("a")) is value
    assert objects.info().hits == 2


def key_of(text: str) -> str:
    """An equal str that is another object."""
    return "".join(list(text))


def test_an_absent_key_gives_the_default(objects: ObjectCache) -> None:
    fallback = object()
    assert objects.get("a") is None
    assert objects.get("a", fallback) is fallback
    assert objects.get("a", default=fallback) is fallback
    assert objects.find("a", fallback) is fallback
    assert "a" not in objects


def test_none_and_false_values_are_values(objects: ObjectCache) -> None:
    for value in (None, 0, "", [], False):
        objects.put("a", value)
        assert objects.get("a", "absent") == value
        objects.drop()
        assert objects.get("a", "absent") == value


def test_an_object_that_was_let_go_is_made_from_its_bytes_and_kept_again(objects: ObjectCache) -> None:
    objects.put("a", (1, "x"))
    objects.drop(["a"])
    made = objects.get("a")
    assert made == (1, "x")
    assert objects.get("a") is made
    assert objects.info()[:3] == (1, 1, 0)


def test_no_more_objects_are_kept_than_asked_for_and_the_others_come_from_bytes(open_cache: OpenCache) -> None:
    objects = open_cache().objects(maxsize=10)
    objects.put_many({f"key {i}": [i] for i in range(50)})
    assert objects.info().kept == 10
    assert objects.get_many([f"key {i}" for i in range(50)]) == [[i] for i in range(50)]


def test_get_many_mixes_objects_bytes_and_absent_keys(objects: ObjectCache) -> None:
    objects.put_many({"a": [1], "b": [2]})
    a = objects.get("a")
    objects.drop(["b"])
    found = objects.get_many(["a", "x", "b"], default="none")
    assert found == [[1], "none", [2]]
    assert found[0] is a


def test_what_the_namespace_does_to_a_key_its_objects_follow(objects: ObjectCache) -> None:
    ns = objects._namespace
    objects.put("a", 1)
    ns.put("a", pickle.dumps(2))
    assert objects.get("a") == 2
    ns.delete("a")
    assert objects.get("a") is None
    objects.put("a", 3, tags=["t"])
    ns.delete_tag("t")
    assert objects.get("a") is None
    objects.put("a", 4)
    assert ns.delete_prefix("a") == 1
    assert objects.get("a") is None
    objects.put("a", 5)
    assert objects.delete("a")
    assert not objects.delete("a")
    assert objects.get("a") is None


def test_two_layers_over_one_namespace_see_each_others_changes(objects: ObjectCache) -> None:
    second = objects._namespace.objects()
    objects.put("a", 1)
    assert second.get("a") == 1
    second.put("a", 2)
    assert objects.get("a") == 2


def test_another_process_sees_what_was_put(objects: ObjectCache, other: Process) -> None:
    objects.put("a", {"n": 1})
    assert other.eval("objects.get('a')") == {"n": 1}
    other.run("objects.put('b', [1])")
    assert objects.get("b") == [1]


@pytest.mark.parametrize(
    ("change", "now"),
    [
        ("objects.put('a', 'theirs')", "theirs"),
        ("ns.put('a', b'no pickle')", "absent"),
        ("objects.delete('a')", "absent"),
        ("ns.delete_many(['a'])", "absent"),
        ("ns.clear()", "absent"),
        ("cache.namespace('o', version=2)", "absent"),
        ("objects.delete('a'); objects.put('a', 'again')", "again"),
    ],
)
def test_a_change_in_another_process_takes_the_object_from_this_one(
    objects: ObjectCache, other: Process, change: str, now: str
) -> None:
    objects.put("a", "mine")
    assert objects.get("a") == "mine"
    other.run(change)
    assert objects.get("a", "absent") == now


def test_a_key_of_a_new_version_has_another_object(open_cache: OpenCache) -> None:
    cache = open_cache()
    old = cache.namespace("o", version=1).objects()
    old.put("a", "old")
    new = cache.namespace("o", version=2).objects()
    new.put("a", "new")
    assert (old.get("a"), new.get("a")) == (None, "new")


def test_an_object_lives_no_longer_than_its_record(objects: ObjectCache) -> None:
    objects.put("a", "x", ttl=0.05)
    objects.put("b", "y")
    wait = threading.Event()
    while objects.get("a") is not None:  # ends when it has expired, however long that takes here
        wait.wait(0.01)
    assert objects.get("b") == "y"


def test_an_object_whose_record_was_evicted_is_a_miss(objects: ObjectCache) -> None:
    objects.put("a", "x")
    for i in range(12):
        objects._namespace.put(f"large {i}", bytes(1 << 20))
    assert "a" not in objects
    assert objects.get("a") is None


def test_a_used_object_keeps_its_record_from_being_evicted(objects: ObjectCache) -> None:
    objects.put("hot", "x")
    for i in range(200):
        objects._namespace.put(f"cold {i}", bytes(1 << 18))
        assert objects.get("hot") == "x"
    assert "cold 0" not in objects


def test_an_object_outlives_its_records_move_to_disk(open_cache: OpenCache) -> None:
    cache = open_cache(disk="32MiB")
    objects = cache.objects()
    value = [1, 2]
    objects.put("a", value)
    cache.flush()
    assert cache.demote() > 0
    assert objects.get("a") is value
    objects.drop()
    assert objects.get("a") == value  # loaded
    assert objects.get_many(["a"]) == [value]


def test_damaged_bytes_are_a_miss_and_counted(objects: ObjectCache) -> None:
    objects.put("a", list(range(1000)))
    data = objects._namespace.get("a")
    assert data is not None
    for bad in (data[:-10], b"", b"\x80\x05.", b"\xff" * 100):
        objects._namespace.put("a", bad)
        assert objects.get("a", "absent") == "absent"
    assert objects.info()[2:4] == (4, 4)


def test_msgpack_keeps_plain_data_and_never_runs_what_it_reads(open_cache: OpenCache) -> None:
    objects = open_cache().objects(serializer="msgpack")
    objects.put("a", {"n": [1, 2.5, None, "x", b"y"]})
    objects.drop()
    assert objects.get("a") == {"n": [1, 2.5, None, "x", b"y"]}
    objects._namespace.put("b", pickle.dumps(print, protocol=5))
    assert objects.get("b", "absent") == "absent"


def test_a_serializer_of_ones_own_gets_a_read_only_view(open_cache: OpenCache) -> None:
    seen = []

    def loads(view: memoryview) -> str:
        seen.append(view.readonly)
        return str(view, "utf-8")

    objects = open_cache().objects(serializer=(str.encode, loads))
    objects.put("a", "text")
    objects.drop()
    assert objects.get("a") == "text"
    assert seen == [True]


def test_what_cannot_be_serialized_is_refused_and_stores_nothing(objects: ObjectCache) -> None:
    objects.put("a", 1)
    with pytest.raises(InvalidValue, match="lock"):
        objects.put("a", threading.Lock())
    assert objects.get("a") == 1


@pytest.mark.parametrize("key", [1, None, [], "", b"x" * 1025, "\ud800"])
def test_a_bad_key_is_an_error_not_a_miss(objects: ObjectCache, key: Any) -> None:
    for call in (objects.get, lambda key: objects.put(key, 1), objects.delete, objects.__contains__):
        with pytest.raises(InvalidKey):
            call(key)
    with pytest.raises(InvalidKey):
        objects.get_many([key])


@pytest.mark.parametrize("maxsize", [0, -1, True, 1.5, "many"])
def test_a_maxsize_that_makes_no_sense_is_refused(objects: ObjectCache, maxsize: Any) -> None:
    with pytest.raises(ConfigError, match="maxsize"):
        objects._namespace.objects(maxsize)


def test_an_unknown_serializer_is_refused(objects: ObjectCache) -> None:
    with pytest.raises(UnknownOption, match="did you mean 'pickle'"):
        objects._namespace.objects(serializer="pikle")
    with pytest.raises(ConfigError, match="dumps, loads"):
        objects._namespace.objects(serializer=(1, 2))  # type: ignore[arg-type]


def test_without_cachebox_the_error_names_the_extra(objects: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cachebox", None)
    with pytest.raises(MissingExtra, match=r"kvstrata\[objects\]"):
        objects._namespace.objects()


def test_after_close_every_verb_says_so(open_cache: OpenCache) -> None:
    cache = open_cache()
    objects = cache.objects()
    objects.put("a", 1)
    cache.close()
    calls: list[Callable[[], Any]] = [
        lambda: objects.get("a"), lambda: objects.get("b"), lambda: objects.get_many(["a"]),
        lambda: objects.put("a", 1), lambda: objects.delete("a"), lambda: "a" in objects,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(CacheClosed):
            call()


def test_an_immutable_namespace_keeps_the_first_object(open_cache: OpenCache) -> None:
    objects = open_cache().namespace("i", immutable=True).objects()
    objects.put("a", "first")
    objects.put("a", "second")
    assert objects.get("a") == "first"


def test_a_forked_child_and_its_parent_stay_true_to_each_other(objects: ObjectCache) -> None:
    objects.put("a", "parent's")
    objects.put("b", "kept")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            kept = objects.get("b")
            before = objects.info().hits
            same = objects.get("b") is kept and objects.info().hits == before + 1
            if kept == "kept" and same and objects.get("a") == "parent's":
                objects.put("a", "child's")
                code = 0 if objects.get("a") == "child's" else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert objects.get("a") == "child's"
    assert objects.get("b") == "kept"


def test_a_forked_child_keeps_no_object_of_a_mapping_that_is_gone(open_cache: OpenCache) -> None:
    cache = open_cache()
    objects = cache.objects()
    objects.put("a", "old")
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.read(told, 1)
            code = 0 if objects.get("a") == "new" else 2
        finally:
            os._exit(code)
    cache.close()
    again = open_cache()  # everything there has the numbers that it had before
    again.objects().put("a", "new")
    os.write(tell, b".")
    assert os.waitpid(child, 0)[1] == 0


def test_a_private_cache_is_shared_with_children(open_cache: OpenCache) -> None:
    objects = open_cache(None).objects()
    objects.put("a", 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if objects.get("a") == 1 and objects.delete("a") else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert objects.get("a") is None


def test_threads_never_see_an_object_that_was_overwritten_before_they_asked(objects: ObjectCache) -> None:
    newest = [0] * 8  # the lowest number that a get may still return
    wrong: list[tuple[int, int]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for key in range(8):
                least = newest[key]
                found = objects.get(f"key {key}")
                if found is not None and found[0] < least:
                    wrong.append((found[0], least))

    for key in range(8):
        objects.put(f"key {key}", (0,))
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 1500):
        key = number % 8
        objects.put(f"key {key}", (number,))
        newest[key] = number
        if number % 5 == 0:
            objects.drop([f"key {key}"])
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert objects.info().hits > 0


def test_an_object_that_holds_its_own_cache_can_be_collected(open_cache: OpenCache) -> None:
    import gc
    import weakref

    class Holder:
        def __reduce__(self) -> tuple[type[Holder], tuple[()]]:
            return Holder, ()

    objects = open_cache().objects(serializer=(lambda _: b"", lambda _: None))
    held: Any = Holder()
    held.objects = objects
    objects.put("a", held)
    gone = weakref.ref(objects)
    del held, objects
    gc.collect()
    assert gone() is None


def test_the_native_layer_refuses_what_it_cannot_work_with(objects: ObjectCache) -> None:
    layer: Any = objects
    for call in (
        lambda: layer.get(), lambda: layer.get("a", 1, 2), lambda: layer.get("a", other=1), lambda: layer.find("a"),
        lambda: layer.keep("a", 1), lambda: layer.keep("a", 1, object()), lambda: layer.bind(object()),
        lambda: _core.ObjectLayer({}, object()),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            call()


class Model(RuleBasedStateMachine):
    """Two layers and the namespace itself, one dict."""

    keys = st.sampled_from(["a", "b", b"c", "d"])
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
    layers = st.integers(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.cache = kvstrata.open(memory="8MiB")
        self.layers_of_it = [self.cache.objects(2), self.cache.objects(100)]
        self.model: dict[Any, Any] = {}

    @rule(layer=layers, key=keys, value=values)
    def put(self, layer: int, key: Any, value: Any) -> None:
        self.layers_of_it[layer].put(key, value)
        self.model[key] = value

    @rule(key=keys, value=values)
    def put_bytes(self, key: Any, value: Any) -> None:
        self.cache.put(key, pickle.dumps(value))
        self.model[key] = value

    @rule(layer=layers, key=keys)
    def get(self, layer: int, key: Any) -> None:
        assert self.layers_of_it[layer].get(key, "absent") == self.model.get(key, "absent")

    @rule(layer=layers, key=keys)
    def delete(self, layer: int, key: Any) -> None:
        assert self.layers_of_it[layer].delete(key) == (self.model.pop(key, self) is not self)

    @rule(key=keys)
    def delete_below(self, key: Any) -> None:
        assert self.cache.delete(key) == (self.model.pop(key, self) is not self)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.clear()

    @rule(layer=layers)
    def drop(self, layer: int) -> None:
        self.layers_of_it[layer].drop()

    @invariant()
    def all_is_there(self) -> None:
        keys = ["a", "b", b"c", "d"]
        for layer in self.layers_of_it:
            assert layer.get_many(keys, "absent") == [self.model.get(key, "absent") for key in keys]
            assert [key in layer for key in keys] == [key in self.model for key in keys]

    def teardown(self) -> None:
        self.cache.close()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
