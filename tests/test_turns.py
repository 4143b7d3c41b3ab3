"""The lock that threads are given in the order in which they asked for it."""

from __future__ import annotations

import threading
import time

from kvstrata.tiers.engines.turns import Turns

PATIENCE_S = 20.0


def waits(turns: Turns, count: int) -> None:
    """Return when that many wait for it."""
    until = time.monotonic() + PATIENCE_S
    while len(turns._waiting) < count:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_it_goes_to_who_has_waited_longest_and_not_to_who_gives_it_back() -> None:
    turns = Turns()
    assert turns.take(0)
    order: list[int] = []

    def take(me: int) -> None:
        assert turns.take(PATIENCE_S)
        order.append(me)
        turns.release()

    threads = []
    for me in range(4):
        threads.append(threading.Thread(target=take, args=(me,)))
        threads[-1].start()
        waits(turns, me + 1)
    turns.release()
    assert turns.take(PATIENCE_S)
    assert order == [0, 1, 2, 3]
    turns.release()
    for thread in threads:
        thread.join()


def test_who_gives_up_waiting_is_passed_over() -> None:
    turns = Turns()
    assert turns.take(0)
    assert not turns.take(0.01)
    assert not turns.take(0)
    turns.release()
    assert turns.take(0)
    turns.release()


def test_one_thread_at_a_time_has_it_whoever_gives_up_meanwhile() -> None:
    turns = Turns()
    inside = 0
    failures: list[int] = []
    taken = 0

    def work(patience_s: float) -> None:
        nonlocal inside, taken
        for _ in range(300):
            if not turns.take(patience_s):
                continue
            inside += 1
            if inside != 1:
                failures.append(inside)
            time.sleep(0)
            taken += 1
            inside -= 1
            turns.release()

    threads = [threading.Thread(target=work, args=(patience_s,)) for patience_s in (PATIENCE_S, PATIENCE_S, 1e-5, 1e-4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert taken >= 600
    assert turns.take(0)
