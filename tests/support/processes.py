"""Other processes, which run what a test tells them to, and die when it says so."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import pickle
import select
import signal
import socket
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
        child = subprocess.Popen(
            [sys.executable, "-m", "support.processes", str(core or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path(TESTS), "PYTHONFAULTHANDLER": "1", **environment},
        )
        assert child.stdin is not None
        assert child.stdout is not None
        self._become(child, child.stdin, child.stdout, patience)  # type: ignore[arg-type]

    def _become(
        self, child: subprocess.Popen[bytes] | _Forked, to: BinaryIO, source: BinaryIO, patience: float
    ) -> None:
        self._child = child
        self._to = to
        self._from = source
        self._patience = patience

    def fork(self, **environment: str) -> Process:
        """Return a process that begins as this one is now: with all that it has imported, and its variables.

        This one must have no threads, and wait for nothing. Forked processes end with the one they come from.
        """
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")
            listener.listen(3)
            _send(self._to, ("fork", listener.getsockname(), environment))
            self._answer()
            # Nobody else knows the address, and they come in this order.
            to, source, end = (listener.accept()[0] for _ in range(3))
        forked = Process.__new__(Process)
        with to, source:  # the files keep them open
            forked._become(_Forked(end), to.makefile("wb"), source.makefile("rb"), self._patience)
        return forked

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


class _Forked:
    """What subprocess.Popen is to a child, for the child of another process."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        (self.pid,) = struct.unpack("<q", end.recv(8))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"the forked process {self.pid}", timeout or 0)
            (self.returncode,) = struct.unpack("<q", self._end.recv(8))
            self._end.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _fork(address: bytes, environment: dict[str, str]) -> tuple[BinaryIO, BinaryIO] | None:
    """Fork a process that is talked to through sockets, which it gets; who forked gets None.

    Between both is one that waits for it, and tells how it ended.
    """
    if os.fork():
        return None
    die_with_parent()
    to, source, end = (socket.socket(socket.AF_UNIX) for _ in range(3))
    for one in (to, source, end):
        one.connect(address)
    if child := os.fork():
        to.close()
        source.close()
        end.sendall(struct.pack("<q", child))
        end.sendall(struct.pack("<q", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        os._exit(0)
    die_with_parent()
    end.close()
    os.environ.update(environment)
    with to, source:
        return to.makefile("rb"), source.makefile("wb")


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
    is_fork = False
    variables: dict[str, Any] = {"kvstrata": kvstrata, "os": os, "signal": signal}
    while (request := _receive(source)) is not None:
        how, code, given = request
        if how == "fork":
            forked = _fork(code, given)
            if forked:
                is_fork = True
                source, to = forked
            else:
                _send(to, ("ok", None))
            continue
        variables.update(given)
        try:
            answer = ("ok", eval(code, variables) if how == "eval" else exec(code, variables))
        except Exception as error:  # noqa: BLE001 - the test that asked gets it
            answer = (type(error).__name__, traceback.format_exc())
        _send(to, answer)
    if is_fork:  # what it shares with others it need not free
        atexit._run_exitfuncs()
        os._exit(0)


if __name__ == "__main__":
    serve()
