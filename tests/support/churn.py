"""Processes that use one cache as hard as they can, are killed at any moment, and check all that they see.

Every writer has a namespace of its own and numbers what it does there. In a journal that outlives it (a shared
mapping of a file), it writes the number of an operation before it starts and again when it is done. So everybody who
reads a value, which tells its own number, knows whether it may still be there: it must not be older than what was
done before the reading, nor newer than what was started by then. Absence is always allowed.

Runs in a process of its own, which forks the others and has no cache open meanwhile.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import kvstrata
import kvstrata.policies
from kvstrata.errors import TierFull
from support.processes import HANG_LIMIT_S, die_with_parent
from support.values import SMALLEST, make_value, serial_of

KEYS = 40  # of each writer
SIZES = [SMALLEST, 100, 1000, 4000, 5000, 20_000, 70_000, 200_000]
_DELETES = 1 << 63  # in a number: it was a deletion

Options = dict[str, Any]


def namespace_of(cache: kvstrata.Cache, writer: int, seed: int) -> kvstrata.Namespace:
    """Open a writer's namespace; its policy differs with the seed, so that kills and repairs happen under each."""
    names = kvstrata.policies.names()
    write: Literal["behind", "back"] = "back" if (seed + writer) % 3 == 0 else "behind"
    return cache.namespace(f"of writer {writer}", policy=names[(2 * seed + writer + 1) % len(names)], write=write)


def key_name(writer: int, key: int) -> bytes:
    """A key; some lie in the entry of the index, some in a block of their own."""
    return b"%d/%d" % (writer, key) + (b"." * (20 * (key % 4)))


class Journal:
    """For each writer: a slot per key, and one for clear()."""

    def __init__(self, file: Path, writers: int) -> None:
        size = writers * (KEYS + 1) * 16
        if not file.exists():
            file.write_bytes(bytes(size))
        with file.open("r+b") as opened:
            # Numbers are stored whole: another process sees the old one or the new one.
            self._numbers = memoryview(mmap.mmap(opened.fileno(), size)).cast("Q")

    def _at(self, writer: int, key: int | None) -> int:
        return 2 * (writer * (KEYS + 1) + (KEYS if key is None else key))

    def started(self, writer: int, key: int | None) -> int:
        return self._numbers[self._at(writer, key)]

    def done(self, writer: int, key: int | None) -> int:
        return self._numbers[self._at(writer, key) + 1]

    def start(self, writer: int, key: int | None, number: int) -> None:
        self._numbers[self._at(writer, key)] = number

    def finish(self, writer: int, key: int | None, number: int) -> None:
        self._numbers[self._at(writer, key) + 1] = number

    def last(self, writer: int) -> int:
        """The highest number that the writer has used."""
        return max(self.started(writer, key) & ~_DELETES for key in [*range(KEYS), None])

    def check(self, writer: int, key: int, before: int, cleared: int, value: bytes | None) -> None:
        """Check what was read; `before` and `cleared` are what was done before the reading."""
        if value is None:
            return
        number = serial_of(key_name(writer, key), value)
        newest = self.started(writer, key)
        oldest = before & ~_DELETES
        told = f"key {writer}/{key}: has {number}, done {before:#x}, started {newest:#x}, cleared {cleared}"
        assert oldest <= number <= newest & ~_DELETES, told
        assert number != oldest or not before & _DELETES, told
        assert number > cleared, told


class Worker:
    """What one forked process does, until it is killed or told to stop."""

    def __init__(self, number: int, writers: int, directory: Path, options: Options, policies: int, seed: int) -> None:
        self.number = number  # that of a writer, or higher: a reader
        self.writers = writers
        self.random = random.Random(seed)
        self.stopped = False
        signal.signal(signal.SIGTERM, self.stop)
        self.journal = Journal(directory / "journal", writers)
        self.cache = kvstrata.open(directory / "cache", **options)
        self.namespaces = [namespace_of(self.cache, i, policies) for i in range(writers)]
        self.pins: list[tuple[Any, memoryview, bytes]] = []
        self.count = self.journal.last(number) if number < writers else 0

    def stop(self, *_: object) -> None:
        self.stopped = True

    def run(self) -> None:
        while not self.stopped:
            signal.alarm(int(HANG_LIMIT_S / 2))  # no call may hang, whoever dies inside
            if self.number < self.writers and self.random.random() < 0.6:
                self.write()
            else:
                self.read()
        while self.pins:
            self.unpin()
        self.cache.close()

    def write(self) -> None:
        ns = self.namespaces[self.number]
        chosen = self.random.random()
        key: int | None = None if chosen < 0.01 else self.random.randrange(KEYS)
        self.count += 1
        deletes = 0.01 <= chosen < 0.25
        number = self.count | (_DELETES if deletes else 0)
        self.journal.start(self.number, key, number)
        try:
            if key is None:
                self.random.choice([ns.clear, lambda: ns.delete_tag("all")])()
            elif deletes:
                name = key_name(self.number, key)
                # A prefix takes other keys, too, and absence is always allowed.
                self.random.choice([ns.delete, lambda name: ns.delete_many([name]), ns.delete_prefix])(name)
            else:
                self.put(ns, key_name(self.number, key), chosen)
        except TierFull:
            return  # all that could leave is pinned, or waits for the disk: it was not stored
        self.journal.finish(self.number, key, number)

    def put(self, ns: kvstrata.Namespace, key: bytes, chosen: float) -> None:
        value = make_value(key, self.count, self.random.choice(SIZES))
        ttl = self.random.choice([None, None, None, 0.05, 5])
        if chosen < 0.5:
            with ns.reserve(key, len(value), ttl=ttl, tags=["all"]) as view:
                view[:] = value
        elif chosen < 0.75:
            ns.put_many({key: value}, ttl=ttl, tags=["all"])
        else:
            ns.put(key, value, ttl=ttl, tags=["all"])

    def read(self) -> None:
        writer = self.random.randrange(self.writers)
        keys = [self.random.randrange(KEYS) for _ in range(self.random.choice([1, 1, 5]))]
        before = [self.journal.done(writer, key) for key in keys]
        cleared = self.journal.done(writer, None)
        names = [key_name(writer, key) for key in keys]
        ns = self.namespaces[writer]
        if len(keys) > 1:
            values = ns.get_many(names)
        elif self.random.random() < 0.5:
            values = [ns.get(names[0])]
        else:
            values = [self.pin(ns, names[0])]
        for key, done, value in zip(keys, before, values, strict=True):
            self.journal.check(writer, key, done, cleared, value)

    def pin(self, ns: kvstrata.Namespace, name: bytes) -> bytes | None:
        if len(self.pins) >= 4:
            self.unpin()
        try:
            pin = ns.pin(name)
        except KeyError:
            return None
        view = pin.__enter__()
        self.pins.append((pin, view, bytes(view)))
        return self.pins[-1][2]

    def unpin(self) -> None:
        pin, view, value = self.pins.pop(self.random.randrange(len(self.pins)))
        assert view == value, "a pinned value has changed"
        pin.__exit__(None, None, None)


class Boss:
    """Forks workers, kills and replaces them, and notices when one fails."""

    def __init__(self, directory: Path, options: Options, writers: int, readers: int, seed: int) -> None:
        self.directory = directory
        self.options = options
        self.writers = writers
        self.seed = seed
        self.random = random.Random(seed)
        self.workers: dict[int, int] = {}  # number of the worker -> pid
        directory.mkdir(exist_ok=True)
        self.journal = Journal(directory / "journal", writers)
        for number in range(writers + readers):
            self.hire(number)

    def hire(self, number: int, failpoint: str = "") -> None:
        """Fork a worker; one with a failpoint, "name:countdown", dies when it comes there often enough."""
        seed = self.random.getrandbits(32)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it can handle it
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            self.workers[number] = pid
            return
        status = 3
        try:
            die_with_parent()
            worker = Worker(number, self.writers, self.directory, self.options, self.seed, seed)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            if failpoint:
                os.environ["KVSTRATA_FAILPOINT"] = failpoint
            worker.run()
            status = 0
        except BaseException:  # noqa: BLE001 - it is the last thing that this process does
            (self.directory / f"failed-{os.getpid()}").write_text(traceback.format_exc())
        finally:
            os._exit(status)

    def end(self, number: int, sign: int, expected: int) -> None:
        os.kill(self.workers[number], sign)
        self.await_end(number, expected)

    def await_end(self, number: int, expected: int) -> None:
        pid = self.workers.pop(number)
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        self.complain()
        assert ended == expected, f"worker {number} ended with status {ended}"

    def complain(self) -> None:
        for report in self.directory.glob("failed-*"):
            raise AssertionError(report.read_text())

    def kill_some(self, kills: int, longest: float = 0.15) -> None:
        """Kill workers at random moments, at most `longest` seconds apart, and hire others in their place."""
        for _ in range(kills):
            time.sleep(self.random.random() * longest)
            number = self.random.choice(list(self.workers))
            self.end(number, signal.SIGKILL, -signal.SIGKILL)
            self.hire(number)

    def kill_all(self) -> None:
        for number in list(self.workers):
            self.end(number, signal.SIGKILL, -signal.SIGKILL)

    def dismiss_all(self) -> None:
        for number in list(self.workers):
            self.end(number, signal.SIGTERM, 0)

    def check_all(self) -> int:
        """Check everything that the cache has now; returns how many values that were."""
        found = 0
        with kvstrata.open(self.directory / "cache", **self.options) as cache:
            for writer in range(self.writers):
                ns = namespace_of(cache, writer, self.seed)
                cleared = self.journal.done(writer, None)
                for key in range(KEYS):
                    value = ns.get(key_name(writer, key))
                    found += value is not None
                    self.journal.check(writer, key, self.journal.done(writer, key), cleared, value)
        return found

    def __enter__(self) -> Boss:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
