"""Starting the server: one process, or several workers under uvicorn's supervisor, which replaces those that die."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstrata.errors import ConfigError, MissingExtra
from kvstrata.serve.settings import ServeSettings

try:
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors import Multiprocess
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
        if settings.workers > 1 and Path(settings.model).suffix == ".gguf":
            settings = replace(settings, model=_unpacked(settings, str(Path(scratch, "model"))))
        config = uvicorn.Config(
            functools.partial(_create, settings, os.getpid()),
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
                supervisor = Multiprocess(config, sockets=[listener])
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


def _unpacked(settings: ServeSettings, directory: str) -> str:
    """Write the model of a GGUF file to a directory: workers load that in a second, and share its pages."""
    process = multiprocessing.get_context("spawn").Process(
        target=_unpack, args=(settings.model, settings.dtype, directory, os.getpid())
    )  # in a process of its own, so that the supervisor stays small
    process.start()
    process.join()
    if process.exitcode:
        raise ConfigError(f"the model {settings.model} could not be loaded; the log says why")
    return directory


def _unpack(file: str, dtype: str, directory: str, parent: int) -> None:
    _end_with(parent)
    from kvstrata.integrations._transformers_load import load_model, save_model

    save_model(*load_model(file, dtype), directory)


def _end_with(parent: int) -> None:
    """Let this process end when its parent does, however that ends: nobody else would stop it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)
