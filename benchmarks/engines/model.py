"""The model of all measurements, as a directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def saved_model(scratch: Path) -> Path:
    """SmolLM2-135M-Instruct as a directory of safetensors, written once for all parts of a run."""
    directory = scratch.parent / "smollm2-fp32"
    if not (directory / "complete").exists():
        directory.mkdir(parents=True, exist_ok=True)
        save = "import sys; from kvstrata.demo import model; model.save(*model.load('float32'), sys.argv[1])"
        subprocess.run([sys.executable, "-c", save, str(directory)], check=True)
        (directory / "complete").touch()
    return directory
