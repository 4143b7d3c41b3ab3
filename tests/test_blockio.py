"""Running transfers on a few threads."""

from __future__ import annotations

import threading

from kvstrata.tiers.blockio import Workers

PATIENCE_S = 30.0


def test_who_has_nothing_left_to_do_does_not_wait_for_threads_that_are_busy_with_other_runs() -> None:
    workers = Workers(2)
    busy, go = threading.Barrier(5), threading.Event()

    def job() -> None:
        busy.wait(PATIENCE_S)
        assert go.wait(PATIENCE_S)

    others = [threading.Thread(target=workers.run, args=([job, job],)) for _ in range(2)]  # each takes a worker, too
    for thread in others:
        thread.start()
    busy.wait(PATIENCE_S)
    done: list[int] = []
    mine = threading.Thread(target=workers.run, args=([lambda: done.append(1), lambda: done.append(2)],))
    mine.start()
    mine.join(PATIENCE_S / 2)
    assert not mine.is_alive()
    assert done == [1, 2]
    go.set()
    for thread in others:
        thread.join(PATIENCE_S)
    workers.close()
