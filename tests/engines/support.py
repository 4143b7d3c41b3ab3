"""How tests of engines get at the engine's package."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

__all__ = ["engine"]


def engine(name: str) -> ModuleType:
    """Import an engine, or skip; with $KVSTRATA_ENGINES=required a missing one is a failure."""
    if os.environ.get("KVSTRATA_ENGINES") == "required":
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-engines")  # type: ignore[no-any-return]
