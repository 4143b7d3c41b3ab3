"""Starting the server: one process, or several workers under uvicorn's supervisor, which replaces those that die.

Workers are forks of the supervisor, which has imported what they need and runs none of it: threads of torch, which it
never starts, would be missing in them.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from kvstrata.errors import ConfigError, MissingExtra
from kvstrata.serve.settings import ServeSettings

try:
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors import multiprocess
except ImportError as error:
    raise MissingExtra("serve", error.name or "uvicorn") from error

__all__ = ["serve"]

_PR_SET_PDEATHSIG = 1
_HANGS_S = 120
"""A worker that doesn't answer its supervisor for so long is replaced: loading a model may hold the interpreter."""


def serve(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serve until the process is told to stop by SIGINT or SIGTERM; `say` is told the address.

    Raises ConfigError where the address can't be had or the model can't be loaded, and MissingExtra.
    """
    for package in ("torch", "transformers", "starlette", "prometheus_client"):  # workers would fail again and again
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("serve", package)
    with tempfile.TemporaryDirectory(prefix="kvstrata-serve-") as scratch:
        metrics = Path(scratch, "metrics")
        metrics.mkdir()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)  # before prometheus_client is imported anywhere
        settings = replace(settings, path=settings.path or str(Path(scratch, "cache")), name=settings.served_name)
        served = settings
        if settings.workers > 1 and Path(settings.model).suffix == ".gguf":
            unpacked = Path(scratch, "model")
            unpacked.mkdir()
            served = replace(settings, model=str(unpacked))
        config = uvicorn.Config(
            functools.partial(_create, served, os.getpid()),
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            log_level="warning",
            timeout_graceful_shutdown=settings.grace,
            timeout_worker_healthcheck=_HANGS_S,
        )
        try:
            listener = config.bind_socket()
        except SystemExit:  # uvicorn has said why
            raise ConfigError(f"can't listen at {settings.host}:{settings.port}; choose another --port") from None
        with listener:
            host, port = listener.getsockname()[:2]
            what = f"{settings.workers} worker(s), cache {settings.path}"
            say(f"{settings.served_name} at http://{host}:{port}/v1, {what}")
            if settings.workers > 1:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until the supervisor has its own
                _import_for_workers()
                if served.model != settings.model:
                    _unpack_apart(settings, served.model)
                multiprocess.Process = _Worker  # what the supervisor makes
                supervisor = multiprocess.Multiprocess(config, sockets=[listener])
                supervisor.run()
                if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
                    raise ConfigError("the model could not be loaded; the log says why")
                return
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it is through
            server = uvicorn.Server(config)
            try:
                server.run([listener])
            except SystemExit:
                raise ConfigError("the model could not be loaded; the log says why") from None


def _create(settings: ServeSettings, parent: int) -> Any:
    """Make the application of a worker, in its process."""
    if os.getpid() != parent:
        _end_with(parent)
    from kvstrata.serve.app import create_app

    return create_app(settings)


class _Fork(ForkProcess):
    """A fork of the supervisor, without its signal handlers."""

    def start(self) -> None:
        """Start it; a signal that comes before it has handlers of its own waits for them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, multiprocess.SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """Do what it was made for, in its process."""
        for number in multiprocess.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, multiprocess.SIGNALS)
        super().run()


class _Worker(multiprocess.Process):  # type: ignore[misc]  # uvicorn is an extra
    """A worker as its supervisor knows it."""

    def __init__(self, config: Any, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self.process = _Fork(target=self.target, args=(sockets,))

    def start(self) -> None:
        """Start it; when it ends, nobody else holds its end of the pipe, where it would be waited for."""
        super().start()
        self.child_conn.close()


def _import_for_workers() -> None:
    """Import what workers need."""
    importlib.import_module("kvstrata.serve.app")
    gc.collect()
    gc.freeze()  # what a worker's collector looks at would be copied for it


def _unpack_apart(settings: ServeSettings, directory: str) -> None:
    """Write the model of a GGUF file to a directory: workers load that in a second, and share its pages."""
    process = _Fork(target=_unpack, args=(settings.model, settings.dtype, directory, os.getpid()))
    process.start()
    try:
        process.join()
    finally:  # nor may it go on when this is interrupted
        process.kill()
        process.join()
    if process.exitcode:
        raise ConfigError(f"the model {settings.model} could not be loaded; the log says why")


def _unpack(file: str, dtype: str, directory: str, parent: int) -> None:
    _end_with(parent)
    from kvstrata.integrations._transformers_load import load_model, save_model

    save_model(*load_model(file, dtype), directory)


def _end_with(parent: int) -> None:
    """Let this process end when its parent does, however that ends: nobody else would stop it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)
