"""Measure, print the table, write it down.

python -m benchmarks [NAMES...] [--quick] [--markdown FILE] [--directory DIR]
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.measure import Settings
from benchmarks.table import Row, machine, show, write_markdown

# In the order of the table. Imported when asked for: codecs and ttft need torch and transformers.
PARTS = {
    "memory": "benchmarks.own.memory",
    "policies": "benchmarks.own.policies",
    "objects": "benchmarks.own.objects",
    "codecs": "benchmarks.own.codecs",
    "scaling": "benchmarks.own.scaling",
    "peers": "benchmarks.own.peers",
    "disk": "benchmarks.own.disk",
    "tiered": "benchmarks.own.tiered",
    "disk-peers": "benchmarks.own.disk_peers",
    "remote": "benchmarks.own.remote",
    "pipeline": "benchmarks.own.pipeline",
    "ttft": "benchmarks.own.ttft",
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Parts to measure: {', '.join(PARTS)}.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer repeats and less data.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    directory: Annotated[Path, typer.Option(help="Measure the disk here; needs a few GB.")] = Path("build"),
) -> None:
    """Measure kvstrata beside raw memory, the raw device and its peers."""
    unknown = set(names or ()) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console()
    console = Console(width=max(console.width, 120))  # a table that wraps can't be read
    directory.mkdir(parents=True, exist_ok=True)
    facts = machine(directory)
    busy = os.getloadavg()[0]
    if busy > 0.5:
        console.print(f"the load is {busy:.1f}, so figures are less certain", style="yellow")
    rows: list[Row] = []
    remarks: list[str] = []
    for name in names or PARTS:
        console.print(f"measuring {name} ...", style="dim")
        place = Path(tempfile.mkdtemp(prefix="bench-", dir=directory))
        try:
            part = importlib.import_module(PARTS[name])
            found = part.rows(Settings(place, quick))
        finally:
            shutil.rmtree(place, ignore_errors=True)
        rows += found
        remarks += getattr(part, "REMARKS", [])
        show(found, console)
    if markdown is not None:
        if quick:
            remarks.append("Taken with `--quick`: less data and fewer repeats.")
        write_markdown(markdown, rows, facts, remarks)
        console.print(f"written to {markdown}")


if __name__ == "__main__":
    typer.run(main)
