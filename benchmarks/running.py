"""The command line of measurements: which parts, how thoroughly, where to."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.measure import Settings
from benchmarks.table import Row, machine, show, write_markdown

__all__ = ["command"]


def command(parts: Mapping[str, str], what: str, *, title: str, target: str) -> None:
    """Run the command line for `parts`, modules by name, in the order of the table.

    Each has `rows(Settings)` and may have REMARKS; it is imported when asked for. One that fails is told of in the
    table, and makes the command fail once the others are measured. The file is written after each part, so that an
    interruption costs what wasn't measured yet.
    """

    def main(
        names: Annotated[list[str] | None, typer.Argument(help="Parts to measure, by default all.")] = None,
        quick: Annotated[bool, typer.Option(help="Fewer repeats and less data.")] = False,
        markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
        directory: Annotated[Path, typer.Option(help="Measure the disk here; needs a few GB.")] = Path("build"),
    ) -> None:
        unknown = set(names or ()) - set(parts)
        if unknown:
            raise typer.BadParameter(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        console = Console()
        console = Console(width=max(console.width, 120))  # a table that wraps can't be read
        directory.mkdir(parents=True, exist_ok=True)
        facts = machine(directory)
        busy = os.getloadavg()[0]
        if busy > 0.5:
            console.print(f"the load is {busy:.1f}, so figures are less certain", style="yellow")
        rows: list[Row] = []
        remarks = ["Taken with `--quick`: less data and fewer repeats."] if quick else []
        failed: list[str] = []
        left = list(names or parts)
        while left:
            name = left.pop(0)
            console.print(f"measuring {name} ...", style="dim")
            place = Path(tempfile.mkdtemp(prefix="bench-", dir=directory))
            try:
                part = importlib.import_module(parts[name])
                found = part.rows(Settings(place, quick))
            except Exception as error:  # noqa: BLE001 - whatever it is, the others' figures count
                console.print_exception()
                failed.append(name)
                remarks.append(f"The part `{name}` failed: {type(error).__name__}.")
                continue
            finally:
                shutil.rmtree(place, ignore_errors=True)
            rows += found
            remarks += getattr(part, "REMARKS", [])
            show(found, console)
            if markdown is not None:
                unmeasured = [f"Interrupted before: {', '.join(left)}."] if left else []
                write_markdown(markdown, rows, facts, remarks + unmeasured, title=title, target=target)
        if markdown is not None:
            console.print(f"written to {markdown}")
        if failed:
            console.print(f"failed: {', '.join(failed)}", style="red")
            raise typer.Exit(1)

    main.__doc__ = f"{what} Parts: {', '.join(parts)}."
    typer.run(main)
