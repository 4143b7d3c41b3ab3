"""The circuit breaker, with a clock of its own."""

from __future__ import annotations

import logging

import pytest

from kvstrata.tiers.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("the store", threshold=3, pause_s=1.0, longest_s=8.0, clock=clock)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.failure("timeout", "too slow")


def test_it_opens_after_failures_in_a_row_only(breaker: Breaker) -> None:
    fail(breaker, 2)
    breaker.success()
    fail(breaker, 2)
    assert breaker.allow()
    fail(breaker, 1)
    assert not breaker.allow()
    assert breaker.stats() == {
        "breaker": "open", "breaker_opened": 1, "breaker_refused": 1, "last_error": "timeout: too slow",
    }  # fmt: skip


def test_one_probe_is_let_through_when_the_pause_is_over(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 0.7
    assert not breaker.allow()
    clock.now += 0.3
    assert [breaker.allow() for _ in range(3)] == [True, False, False]
    assert breaker.state == "half-open"
    breaker.success()
    assert [breaker.allow() for _ in range(3)] == [True] * 3


def test_pauses_get_longer_up_to_a_bound_and_start_again_after_a_success(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    for pause in (1, 2, 4, 8, 8, 8):
        clock.now += 0.74 * pause
        assert not breaker.allow()
        clock.now += 0.26 * pause
        assert breaker.allow()
        fail(breaker, 1)
    clock.now += 8
    assert breaker.allow()
    breaker.success()
    fail(breaker, 3)
    clock.now += 1
    assert breaker.allow()


def test_a_probe_of_which_nothing_is_heard_does_not_keep_it_half_open(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 1
    assert breaker.allow()
    assert not breaker.allow()
    clock.now += 8
    assert breaker.allow()


def test_a_refusal_is_an_answer_that_the_figures_tell_of(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 2)
    breaker.refusal("OOM", "full")
    fail(breaker, 2)
    assert breaker.allow()
    breaker.refusal("OOM", "full")
    assert breaker.stats()["last_error"] == "OOM: full"
    fail(breaker, 3)
    clock.now += 1
    assert breaker.allow()
    breaker.refusal("OOM", "full")
    assert breaker.state == "closed"


def test_a_late_failure_of_an_earlier_call_changes_nothing(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 0.5
    fail(breaker, 5)
    clock.now += 0.5
    assert breaker.allow()


def test_each_change_of_state_is_one_line_in_the_log(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstrata.breaker")
    fail(breaker, 10)
    clock.now += 1
    for _ in range(5):
        breaker.allow()
    breaker.success()
    breaker.success()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "the store: open: timeout: too slow",
        "the store: half-open: one call is let through to see",
        "the store: closed: it answers again",
    ]
