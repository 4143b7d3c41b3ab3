"""The real model as a directory, written once for all runs."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["kept_model"]


def kept_model(config: pytest.Config, save: Callable[[str], object]) -> Path:
    """Return SmolLM2-135M-Instruct in fp32 as a directory, which `save` writes if nobody has.

    That takes much of what there is of the processor, so the other test processes wait for the one that does it.
    """
    assert config.cache is not None
    place = Path(config.cache.mkdir("models"))
    kept = place / "smollm2-fp32"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            made = Path(tempfile.mkdtemp(dir=place))
            try:
                save(str(made))
                made.rename(kept)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return kept
