"""Work that a thread does when it is wanted."""

from __future__ import annotations

import threading

from kvstrata.tiers.background import OnDemand


def test_there_is_no_thread_until_work_is_wanted_nor_after_the_end() -> None:
    before = threading.active_count()
    done = threading.Event()

    def work() -> float:
        done.set()
        return 0.0

    worker = OnDemand("test", work)
    assert threading.active_count() == before
    worker.want()
    assert done.wait(30)
    worker.stop()
    assert threading.active_count() == before
    done.clear()
    worker.want()
    assert threading.active_count() == before
    assert not done.is_set()


def test_what_is_wanted_while_work_is_done_is_done_once_more() -> None:
    began, go_on, turns = threading.Semaphore(0), threading.Semaphore(0), []

    def work() -> float:
        turns.append(len(turns))
        began.release()
        assert go_on.acquire(timeout=30)
        return 0.0

    worker = OnDemand("test", work)
    worker.want()
    assert began.acquire(timeout=30)
    for _ in range(3):
        worker.want()
    go_on.release()
    assert began.acquire(timeout=30)
    go_on.release()
    worker.stop()
    assert turns == [0, 1]


def test_the_end_does_not_wait_for_a_pause_and_is_seen_by_the_work() -> None:
    paused, seen = threading.Event(), []

    def work() -> float:
        paused.set()
        seen.append(worker.stopped.is_set())
        return 3600.0

    worker = OnDemand("test", work)
    worker.want()
    assert paused.wait(30)
    worker.stop()
    assert seen == [False]
    assert worker.stopped.is_set()
