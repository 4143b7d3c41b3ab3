"""Copying is shared by threads, which run on all cores of the process, whatever the caller is bound to."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvstrata.copying import Copiers
from kvstrata.threads import cores, new_thread, thread_pool

ENOUGH = 64 << 20  # bytes that are worth waking a thread

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@contextmanager
def a_caller_bound_to_one_core() -> Iterator[None]:
    """Leave the other cores to another thread, as engines that compute on the CPU do."""
    whole, done = os.sched_getaffinity(0), threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        os.sched_setaffinity(0, {min(whole)})
        yield
    finally:
        os.sched_setaffinity(0, whole)
        done.set()
        other.join()


def test_each_item_is_copied_once_and_several_threads_do_it() -> None:
    together = threading.Barrier(2, timeout=60)  # which one thread alone would never pass
    given: list[int] = []

    def copy(item: int) -> None:
        if item in (0, 99):
            together.wait()
        given.append(item)

    Copiers(2).share(copy, range(100), ENOUGH)
    assert sorted(given) == list(range(100))


@pytest.mark.parametrize(("items", "nbytes"), [(100, 1 << 10), (10_000, ENOUGH)], ids=["little", "small items"])
def test_what_is_not_worth_waking_a_thread_is_copied_by_the_caller(items: int, nbytes: int) -> None:
    calls: list[tuple[int, int]] = []
    Copiers(2).share(lambda item: calls.append((item, threading.get_ident())), range(items), nbytes)
    assert calls == [(item, threading.get_ident()) for item in range(items)]


@pytest.mark.parametrize("bad", [0, 99])
def test_what_a_copy_raises_is_raised_when_nobody_is_copying_any_more(bad: int) -> None:
    ended: list[int] = []

    def copy(item: int) -> None:
        if item == bad:
            raise ValueError(bad)
        ended.append(item)

    with pytest.raises(ValueError, match=str(bad)):
        Copiers(2).share(copy, range(100), ENOUGH)
    then = len(ended)
    Copiers(2).share(lambda item: None, range(100), ENOUGH)
    assert len(ended) == then


def test_without_another_thread_the_caller_copies_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    given: list[int] = []
    Copiers(2).share(given.append, range(100), ENOUGH)
    assert sorted(given) == list(range(100))


def test_a_first_copy_of_few_items_does_not_limit_the_next_ones() -> None:
    together = threading.Barrier(3, timeout=60)
    copiers = Copiers(3)
    copiers.share(lambda item: None, range(2), ENOUGH)
    copiers.share(lambda item: together.wait(), range(3), ENOUGH)


def test_a_child_process_copies_with_threads_of_its_own() -> None:
    copiers = Copiers(2)
    copiers.share(lambda item: None, range(100), ENOUGH)
    child = os.fork()
    if child == 0:
        given: list[int] = []
        copiers.share(given.append, range(100), ENOUGH)
        os._exit(0 if sorted(given) == list(range(100)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_two_cores
def test_threads_run_on_all_cores_of_the_process_though_who_starts_them_is_bound_to_one() -> None:
    whole = os.sched_getaffinity(0)
    found: list[set[int]] = []
    with a_caller_bound_to_one_core():
        assert len(os.sched_getaffinity(0)) == 1
        assert cores() == whole
        started = new_thread(lambda: found.append(os.sched_getaffinity(0)), "kvstrata-test")
        started.start()
        started.join()
        with thread_pool(1, "kvstrata-test") as pool:
            found.append(pool.submit(os.sched_getaffinity, 0).result())
    assert found == [whole, whole]


@needs_two_cores
def test_a_process_that_is_bound_to_one_core_as_a_whole_stays_there() -> None:
    child = os.fork()
    if child == 0:
        one = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, one)
        with thread_pool(1, "kvstrata-test") as pool:
            stayed = pool.submit(os.sched_getaffinity, 0).result() == one
        os._exit(0 if stayed and cores() == one else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
