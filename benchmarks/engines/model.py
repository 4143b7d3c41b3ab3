"""The model of all measurements, and what it is given to read."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

VOCABULARY = (1000, 40_000)
LENGTHS = (512, 2048, 4096)
"""Of prefixes, in tokens."""
KV_BYTES = 23_040  # of a token, in 16 bits


def saved_model(scratch: Path) -> Path:
    """SmolLM2-135M-Instruct as a directory of safetensors, written once for all parts of a run."""
    directory = scratch.parent / "smollm2-fp32"
    if not (directory / "complete").exists():
        directory.mkdir(parents=True, exist_ok=True)
        save = "import sys; from kvstrata.demo import model; model.save(*model.load('float32'), sys.argv[1])"
        subprocess.run([sys.executable, "-c", save, str(directory)], check=True)
        (directory / "complete").touch()
    return directory


def tokens(seed: int, count: int) -> list[int]:
    """Tokens that nobody reads twice by chance."""
    chance = random.Random(seed)
    return [chance.randrange(*VOCABULARY) for _ in range(count)]
