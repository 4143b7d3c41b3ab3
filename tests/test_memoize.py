"""Memoized functions: what makes a key, who computes, and what is forgotten."""

from __future__ import annotations

import asyncio
import enum
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OpenCache
from support.processes import Process

import kvstrata
from kvstrata.errors import CacheClosed, ConfigError, InvalidKey, InvalidValue
from kvstrata.memoize import _form

PATIENCE_S = 30.0


@pytest.fixture
def cache(open_cache: OpenCache) -> kvstrata.Cache:
    return open_cache()


def counted(cache: kvstrata.Namespace, **options: Any) -> tuple[Any, list[Any]]:
    """A memoized function that gives back its arguments, and the list of its calls."""
    calls: list[Any] = []

    @cache.memoize(**{"name": "counted"} | options)
    def function(a: Any, b: Any = 2, *rest: Any, c: Any = 3, **more: Any) -> Any:
        calls.append((a, b, rest, c, more))
        return [a, b, list(rest), c, more]

    return function, calls


def test_a_call_is_computed_once_and_then_remembered(cache: kvstrata.Cache) -> None:
    function, calls = counted(cache)
    first = function(1)
    assert function(1) is first
    assert function(2) != first
    assert len(calls) == 2
    assert function.cache_info() == (1, 0, 2, 0, 0)
    assert function.__wrapped__(1) == first
    assert len(calls) == 3


def test_it_does_not_matter_how_arguments_are_passed(cache: kvstrata.Cache) -> None:
    function, calls = counted(cache)
    function(1)
    function(a=1)
    function(1, 2)
    function(b=2, a=1)
    function(1, c=3)
    assert len(calls) == 1
    function(1, 2, 3)
    function(1, x={"p": 1, "q": 2})
    function(1, x={"q": 2, "p": 1})
    assert len(calls) == 3


class Colour(enum.IntEnum):
    RED = 1


def test_different_arguments_have_different_forms_and_equal_ones_the_same() -> None:
    values = [
        None, True, False, 0, 1, -1, 2**70, -(2**70), 0.0, -0.0, 1.0, 1j, "", "1", "a", b"", b"a", (), [], {}, set(),
        (1,), [1], {1}, {1: 1}, ((1,),), (1, 1), ("ab", "c"), ("a", "bc"), ("a", ("b", "c")), ("a", "b", "c"), [None],
        "\ud800", np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.zeros((1, 2)), np.float64(0), np.int64(1),
        np.array([1, 0]), np.array([0, 1]),
    ]  # fmt: skip
    forms = [_form(value, "x") for value in values]
    assert len(set(forms)) == len(forms)
    assert _form({3, "x", 1}, "x") == _form({1, 3, "x"}, "x") == _form(frozenset([1, "x", 3]), "x")
    assert _form(np.arange(6).reshape(2, 3).T, "x") == _form(np.arange(6).reshape(2, 3).T.copy(), "x")


def test_types_that_are_only_bytes_to_numpy_have_different_forms() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    of_bytes = [np.array([1], np.uint8).view(kind) for kind in (ml_dtypes.int4, ml_dtypes.uint4, "V1")]
    within = [np.zeros(1, [("a", kind, 2)]) for kind in (ml_dtypes.int4, ml_dtypes.uint4)]
    assert len({_form(value, "x") for value in (*of_bytes, *within)}) == 5


@pytest.mark.parametrize("argument", [object(), Colour.RED, print, [object()], {"k": {1, object}}, np.array([None])])
def test_an_argument_without_a_canonical_form_is_a_clear_error(cache: kvstrata.Cache, argument: Any) -> None:
    function, calls = counted(cache)
    with pytest.raises(InvalidKey, match=r"the argument 'a' .*key="):
        function(argument)
    assert calls == []


def test_key_says_which_arguments_count(cache: kvstrata.Cache) -> None:
    function, calls = counted(cache, key=lambda a, **_: ("id", id(a)))
    thing = [object()]
    with pytest.raises(InvalidValue):  # from the result, which holds a lock
        function(threading.Lock())
    function(thing, c=1)
    function(thing, c=2)
    assert len(calls) == 2
    bad, _ = counted(cache, name="bad", key=lambda a: object())
    with pytest.raises(InvalidKey, match="what key= returned"):
        bad(1)


def test_names_and_versions_keep_functions_apart(cache: kvstrata.Cache) -> None:
    functions = [counted(cache), counted(cache, version=2), counted(cache, name="another")]
    for function, calls in functions:
        function(1)
        assert len(calls) == 1
    same, calls = counted(cache)
    same(1)
    assert calls == []


def module_function(x: int) -> int:
    return x


def test_a_function_that_has_no_name_of_its_own_needs_one(cache: kvstrata.Cache) -> None:
    captured = 1
    cache.memoize()(module_function)
    for function in (lambda x: x, lambda x: x + captured):
        with pytest.raises(ConfigError, match="name="):
            cache.memoize()(function)
        assert cache.memoize(name="named")(function)(1) is not None


def test_none_is_remembered_and_exceptions_are_not(cache: kvstrata.Cache) -> None:
    calls = []

    @cache.memoize(name="f")
    def function(x: int) -> None:
        calls.append(x)
        if len(calls) == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        function(1)
    assert function(1) is None
    assert function(1) is None
    assert calls == [1, 1]


def test_forget_and_cache_clear(cache: kvstrata.Cache) -> None:
    function, calls = counted(cache)
    other, other_calls = counted(cache, name="other")
    for each in (function, other):
        each(1)
        each(2)
    assert function.forget(a=1)
    assert not function.forget(1)
    function(1)
    assert len(calls) == 3
    function.cache_clear()
    function(2)
    assert len(calls) == 4
    other(1)
    assert len(other_calls) == 2


def test_a_result_lives_no_longer_than_its_ttl(cache: kvstrata.Cache) -> None:
    function, calls = counted(cache, ttl=0.05)
    wait = threading.Event()
    while len(calls) < 2:  # ends when the first result has expired, however long that takes here
        function(1)
        wait.wait(0.01)


def test_a_result_too_large_to_be_stored_is_returned_all_the_same(cache: kvstrata.Cache) -> None:
    function, calls = counted(cache)
    large = bytes(20 << 20)
    assert function(large)[0] == large
    assert function(large)[0] == large
    assert len(calls) == 2
    assert function.cache_info().not_stored == 2


def test_methods_can_be_memoized_by_a_key(cache: kvstrata.Cache) -> None:
    class Model:
        calls = 0

        def __init__(self, name: str) -> None:
            self.name = name

        @cache.memoize(key=lambda self, x: (self.name, x), name="Model.embed")
        def embed(self, x: int) -> str:
            Model.calls += 1
            return f"{self.name} {x}"

    assert Model("a").embed(1) == Model("a").embed(1) == "a 1"
    assert Model("b").embed(1) == "b 1"
    assert Model.calls == 2


def test_after_close_a_call_says_so(cache: kvstrata.Cache) -> None:
    function, _ = counted(cache)
    function(1)
    cache.close()
    with pytest.raises(CacheClosed):
        function(1)


PROGRAM = """
cache = kvstrata.open(directory, memory='8MiB', disk=0)
calls = []
@cache.memoize(name='counted')
def function(a, b=2, *rest, c=3, **more):
    calls.append(a)
    return 'theirs'
"""


def test_processes_share_results(cache: kvstrata.Cache, tmp_path: Path) -> None:
    function, calls = counted(cache)
    mine = function({"a", "b", "c"})
    with Process(PYTHONHASHSEED="7") as other:
        other.run(PROGRAM, directory=tmp_path / "cache")
        assert other.eval("function({'c', 'b', 'a'})") == mine
        assert other.eval("function(5)") == "theirs"
        assert function(5) == "theirs"
        other.run("function.cache_clear()")
        function(5)
    assert len(calls) == 2


# ---- One computation at a time -------------------------------------------------------------------


def at_once(count: int, call: Callable[[], Any], all_wait: Callable[[], bool], go: threading.Event) -> list[Any]:
    """Call from so many threads; `go` is set once `all_wait`."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except ZeroDivisionError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    tick = threading.Event()
    while not all_wait():
        tick.wait(0.001)
    go.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    return results


@pytest.mark.parametrize("fails", [False, True])
def test_threads_that_ask_for_one_key_compute_once_and_share_the_outcome(cache: kvstrata.Cache, fails: bool) -> None:
    go = threading.Event()
    calls: list[int] = []

    @cache.memoize(name="f")
    def function(x: int) -> list[int]:
        calls.append(x)
        assert go.wait(PATIENCE_S)
        if fails:
            raise ZeroDivisionError
        return [x]

    results = at_once(5, lambda: function(1), lambda: function.cache_info().joined == 4, go)
    assert calls == [1]
    assert len(results) == 5
    assert all(result is results[0] for result in results)
    assert isinstance(results[0], ZeroDivisionError) is fails


@pytest.mark.parametrize("forget", [lambda function: function.forget(1), lambda function: function.cache_clear()])
def test_who_asks_after_a_result_was_forgotten_is_not_given_one_that_was_begun_before(
    cache: kvstrata.Cache, forget: Callable[[Any], object]
) -> None:
    data, begun, go = ["old"], threading.Event(), threading.Event()

    @cache.memoize(name="f")
    def function(x: int) -> str:
        read = data[0]
        if read == "old":
            begun.set()
            assert go.wait(PATIENCE_S)
        return read

    first: list[str] = []
    thread = threading.Thread(target=lambda: first.append(function(1)))
    thread.start()
    assert begun.wait(PATIENCE_S)
    data[0] = "new"
    forget(function)
    assert function(1) == "new"
    function.forget(1)  # so that only the first could have left something
    go.set()
    thread.join(PATIENCE_S)
    assert first == ["old"]
    assert function(1) == "new"


def test_tasks_are_not_given_a_result_that_was_begun_before_it_was_forgotten(cache: kvstrata.Cache) -> None:
    data = ["old"]

    async def main() -> None:
        go = asyncio.Event()

        @cache.memoize(name="f")
        async def function(x: int) -> str:
            read = data[0]
            if read == "old":
                await go.wait()
            return read

        first = asyncio.create_task(function(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        data[0] = "new"
        function.forget(1)
        assert await function(1) == "new"
        function.forget(1)
        go.set()
        assert await first == "old"
        assert await function(1) == "new"

    asyncio.run(main())


def test_different_keys_are_computed_at_the_same_time(cache: kvstrata.Cache) -> None:
    both = threading.Barrier(2)

    @cache.memoize(name="f")
    def function(x: int) -> int:
        both.wait(PATIENCE_S)  # breaks unless the other one comes, too
        return x

    results: list[int] = []
    threads = [threading.Thread(target=lambda x=x: results.append(function(x))) for x in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(results) == [1, 2]


def test_a_function_may_call_itself(cache: kvstrata.Cache) -> None:
    depth = []

    @cache.memoize(name="fibonacci")
    def fibonacci(n: int) -> int:
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    @cache.memoize(name="own")
    def own(n: int) -> int:
        depth.append(n)
        return n if len(depth) == 2 else own(n)

    assert fibonacci(60) == 1548008755920
    assert fibonacci.cache_info().computed == 61
    assert own(7) == 7


def test_a_child_forked_during_a_computation_does_not_wait_for_its_parent(cache: kvstrata.Cache) -> None:
    started, go = threading.Event(), threading.Event()
    parent = os.getpid()

    @cache.memoize(name="f")
    def function(x: int) -> str:
        if os.getpid() == parent:
            started.set()
            assert go.wait(PATIENCE_S)
        return "done"

    thread = threading.Thread(target=function, args=(1,))
    thread.start()
    assert started.wait(PATIENCE_S)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if function(1) == "done" else 1
        finally:
            os._exit(code)
    go.set()
    thread.join(PATIENCE_S)
    assert os.waitpid(child, 0)[1] == 0


# ---- async def -----------------------------------------------------------------------------------


def test_tasks_that_ask_for_one_key_compute_once(cache: kvstrata.Cache) -> None:
    calls: list[int] = []

    @cache.memoize(name="f")
    async def function(x: int) -> list[int]:
        calls.append(x)
        await asyncio.sleep(0)
        if x < 0:
            raise ZeroDivisionError
        return [x]

    async def main() -> None:
        results = await asyncio.gather(*(function(1) for _ in range(4)))
        assert all(result is results[0] for result in results)
        assert await function(1) is results[0]
        failed = await asyncio.gather(*(function(-1) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in failed] == [ZeroDivisionError] * 3

    asyncio.run(main())
    assert calls == [1, -1]
    assert asyncio.run(function(1)) == [1]  # in another loop
    assert function.cache_info().joined == 5


def test_a_coroutine_function_may_ask_for_its_own_result(cache: kvstrata.Cache) -> None:
    depth = []

    @cache.memoize(name="own")
    async def own(n: int) -> int:
        depth.append(n)
        return n if len(depth) == 2 else await own(n)

    assert asyncio.run(own(7)) == 7


def test_who_is_cancelled_does_not_take_the_result_from_the_others(cache: kvstrata.Cache) -> None:
    async def main() -> None:
        go = asyncio.Event()

        @cache.memoize(name="f")
        async def function(x: int) -> int:
            await go.wait()
            return x

        first, second = asyncio.create_task(function(1)), asyncio.create_task(function(1))
        while function.cache_info().joined == 0:
            await asyncio.sleep(0)
        first.cancel()
        go.set()
        assert await second == 1
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(main())
