"""The real model as a directory, written once for all runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["kept_model"]


def kept_model(config: pytest.Config, save: Callable[[str], object]) -> Path:
    """Return SmolLM2-135M-Instruct in fp32 as a directory, which `save` writes if nobody has; others may do so, too."""
    assert config.cache is not None
    place = Path(config.cache.mkdir("models"))
    kept = place / "smollm2-fp32"
    if not kept.exists():
        made = Path(tempfile.mkdtemp(dir=place))
        save(str(made))
        try:
            made.rename(kept)
        except OSError:
            if not kept.exists():
                raise
            shutil.rmtree(made)
    return kept
