"""Other processes, which run what a test tells them to, and die when it says so."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

TESTS = Path(__file__).parents[1]
HANG_LIMIT_S = 60.0  # nothing here takes seconds; a process that needs this long is stuck
SOAK = int(os.environ.get("KVSTRATA_SOAK", "1"))  # multiplies the length of random runs


def die_with_parent() -> None:
    """Let this forked process be killed when its parent ends, so that a test that fails leaves nobody behind."""
    prctl_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(prctl_set_pdeathsig, signal.SIGKILL)


def python_path(*first: Path) -> str:
    """PYTHONPATH for another process that is to see the same kvstrata as this one."""
    import kvstrata  # here: the other process chooses its native module first

    package = Path(kvstrata.__file__).parents[1]
    return os.pathsep.join([*map(str, first), str(package), os.environ.get("PYTHONPATH", "")])


class RemoteError(AssertionError):
    """Something failed in the other process; `kind` is the name of the exception's class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"in the other process: {text}")
        self.kind = kind


class Hang(AssertionError):
    """The other process gave no answer for HANG_LIMIT_S."""


class Process:
    """A Python process that executes what it is given. It has `kvstrata`, and keeps its variables.

    `core` names another native module for it than the installed one. A process that needs longer than `patience`
    seconds for anything is stuck.
    """

    def __init__(self, *, core: Path | None = None, patience: float = HANG_LIMIT_S, **environment: str) -> None:
        self._patience = patience
        self._child = subprocess.Popen(
            [sys.executable, "-m", "support.processes", str(core or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path(TESTS), "PYTHONFAULTHANDLER": "1", **environment},
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._to: BinaryIO = self._child.stdin  # type: ignore[assignment]
        self._from: BinaryIO = self._child.stdout  # type: ignore[assignment]

    @property
    def pid(self) -> int:
        return self._child.pid

    # ---- Talking to it

    def start(self, statements: str, **variables: Any) -> None:
        """Let it execute statements, without waiting for the end."""
        _send(self._to, ("exec", statements, variables))

    def finish(self) -> None:
        """Wait for the end of what was started."""
        self._answer()

    def run(self, statements: str, **variables: Any) -> None:
        """Let it execute statements, and wait for their end."""
        self.start(statements, **variables)
        self.finish()

    def eval(self, expression: str, **variables: Any) -> Any:
        """Let it evaluate an expression."""
        _send(self._to, ("eval", expression, variables))
        return self._answer()

    def _answer(self) -> Any:
        if not select.select([self._from], [], [], self._patience)[0]:
            self.kill()
            raise Hang(f"no answer for {self._patience:g} s")
        answer = _receive(self._from)
        if answer is None:
            raise RemoteError("died", f"it died with status {self._child.wait(self._patience)}")
        kind, result = answer
        if kind != "ok":
            raise RemoteError(kind, result)
        return result

    # ---- Its end

    def kill(self) -> None:
        """End it by SIGKILL, and wait until it is gone."""
        self._child.kill()
        self._end()

    def exit(self) -> int:
        """Let it exit as a program does at its end; returns the status."""
        self._to.close()
        return self._end()

    def wait(self) -> int:
        """Wait until it has ended by itself; returns the status, -9 for SIGKILL."""
        return self._end()

    def _end(self) -> int:
        try:
            return self._child.wait(self._patience)
        except subprocess.TimeoutExpired:
            self._child.send_signal(signal.SIGABRT)  # with a traceback, by faulthandler
            self._child.wait()
            raise Hang(f"still there after {self._patience:g} s") from None
        finally:
            if not self._to.closed:
                with contextlib.suppress(BrokenPipeError):
                    self._to.close()
            self._from.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            self.exit()
        else:
            self._end()


def _send(to: BinaryIO, message: object) -> None:
    data = pickle.dumps(message)
    to.write(struct.pack("<Q", len(data)) + data)
    to.flush()


def _receive(source: BinaryIO) -> Any:
    head = source.read(8)
    if len(head) < 8:
        return None
    return pickle.loads(source.read(struct.unpack("<Q", head)[0]))


def use_core(file: str) -> None:
    """Make another file the native module; before anything imports kvstrata."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("kvstrata._core", file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["kvstrata._core"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["kvstrata._core"])


def serve() -> None:
    """What the other process does."""
    if sys.argv[1]:
        use_core(sys.argv[1])
    import kvstrata

    source, to = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the statements print
    variables: dict[str, Any] = {"kvstrata": kvstrata, "os": os, "signal": signal}
    while (request := _receive(source)) is not None:
        how, code, given = request
        variables.update(given)
        try:
            answer = ("ok", eval(code, variables) if how == "eval" else exec(code, variables))
        except Exception as error:  # noqa: BLE001 - the test that asked gets it
            answer = (type(error).__name__, traceback.format_exc())
        _send(to, answer)


if __name__ == "__main__":
    serve()
