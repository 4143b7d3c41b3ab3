"""The native module with its failpoints compiled in, built for tests that kill a process at a given place."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    {
        name
        for source in (ROOT / "core").rglob("*.[ch]pp")
        for name in re.findall(r'KVSTRATA_COMMIT\("([a-z._]+)"\)', source.read_text())
    }
)


def build() -> Path:
    """Build the module, or what has changed of it, and return its file; skips where the tools for that are missing."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None or ninja is None or importlib.util.find_spec("nanobind") is None:
        pytest.skip("building the core takes cmake, ninja and nanobind: pip install --group build")
    tools = subprocess.run(
        [ROOT / "scripts" / "preflight"], capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}
    )
    if tools.returncode:
        pytest.skip(tools.stderr.strip())
    environment = os.environ | {"PATH": path, "CXX": tools.stdout.strip().split("\t")[-1]}
    directory = ROOT / "build" / "plain"  # where scripts/test-core has compiled the core with the same options
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in (
            [
                "-S",
                ROOT,
                "-B",
                directory,
                "-G",
                "Ninja",
                "-DKVSTRATA_PYTHON=ON",
                "-DKVSTRATA_FAILPOINTS=ON",
                f"-DPython_EXECUTABLE={sys.executable}",
            ],
            ["--build", directory, "--target", "_core"],
        ):
            done = subprocess.run([cmake, *step], capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, done.stdout + done.stderr
    return directory / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
