"""The table: each figure beside its peer's from the same run, the ratio, the target, met or missed."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Sample

__all__ = ["Row", "machine", "show", "write_markdown"]

Unit = Literal["s", "B/s", "B", "tokens/s", "tokens"]

_COLUMNS = ("what", "kvstrata", "peer", "peer's figure", "ratio", "target", "")
_LEGEND = (
    "Medians, with half the interquartile range in brackets. Ratio: speed relative to the peer in the same "
    "run, more is better. A target that is missed stays in the table."
)


@dataclass(frozen=True)
class Row:
    """One line. `at_least` is a part of the peer's speed, `at_most` and `no_less` figures in the row's own unit.

    Of seconds, bytes and tokens less is better, of anything per second more.
    """

    section: str
    what: str
    ours: Sample
    unit: Unit = "s"
    peer: str = ""
    theirs: Sample | None = None
    at_least: float | None = None
    at_most: float | None = None
    no_less: float | None = None

    @property
    def ratio(self) -> float | None:
        """The speed relative to the peer's; the median over pairs where both were measured in turn."""
        if self.theirs is None:
            return None
        if len(self.ours.values) == len(self.theirs.values):
            pairs = zip(self.ours.values, self.theirs.values, strict=True)
            return Sample(tuple(self._speed(ours, theirs) for ours, theirs in pairs)).median
        return self._speed(self.ours.median, self.theirs.median)

    def _speed(self, ours: float, theirs: float) -> float:
        return ours / theirs if self.unit.endswith("/s") else theirs / ours

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None when there is none."""
        if self.at_least is not None:
            return self.ratio is not None and self.ratio >= self.at_least
        if self.at_most is not None:
            return self.ours.median <= self.at_most
        if self.no_less is not None:
            return self.ours.median >= self.no_less
        return None

    @property
    def target(self) -> str:
        """The target in words."""
        if self.at_least is not None:
            return f">= {_number(self.at_least)}x"
        if self.at_most is not None:
            return f"<= {_figure(self.at_most, self.unit)}"
        if self.no_less is not None:
            return f">= {_figure(self.no_less, self.unit)}"
        return ""

    def cells(self) -> tuple[str, ...]:
        """The texts of the columns."""
        verdict = {True: "met", False: "missed", None: ""}[self.met]
        ratio = "" if self.ratio is None else f"{_number(self.ratio)}x"
        theirs = "" if self.theirs is None else _sample(self.theirs, self.unit)
        return (self.what, _sample(self.ours, self.unit), self.peer, theirs, ratio, self.target, verdict)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _figure(value: float, unit: Unit) -> str:
    if unit == "s":
        steps: Sequence[tuple[float, str]] = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
    elif unit == "B/s":
        steps = ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"))
    else:
        steps = ((1.0, unit),)
    scale, name = next((step for step in steps if value >= step[0]), steps[-1])
    return f"{_number(value / scale)} {name}"


def _sample(sample: Sample, unit: Unit) -> str:
    spread = f" ({sample.spread:.0%})" if len(sample.values) >= 4 else ""
    return _figure(sample.median, unit) + spread


# ---- The machine ---------------------------------------------------------------------------------


def machine(directory: Path) -> dict[str, str]:
    """What the figures were taken on; `directory` is where the disk tier lay."""
    cpu = _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()
    memory = _field(Path("/proc/meminfo"), "MemTotal").removesuffix(" kB")
    return {
        "CPU": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory) / 2**20:.0f} GiB" if memory.isdigit() else "unknown",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "file system": _file_system(directory),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "load at the start": f"{os.getloadavg()[0]:.2f}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _field(path: Path, name: str) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _file_system(directory: Path) -> str:
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if directory.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


# ---- Output --------------------------------------------------------------------------------------


def show(rows: Iterable[Row], console: Console) -> None:
    """Print the rows, a table for each section."""
    colours = {True: "green", False: "red", None: ""}
    for section, members in groupby(rows, key=lambda row: row.section):
        table = Table(*_COLUMNS, title=section, title_justify="left", title_style="bold")
        for column in table.columns[3:5]:
            column.justify = "right"
        table.columns[1].justify = "right"
        for row in members:
            *cells, verdict = row.cells()
            colour = colours[row.met]
            table.add_row(*cells, f"[{colour}]{verdict}[/]" if colour else verdict)
        console.print(table)
    console.print(_LEGEND, style="dim")


def write_markdown(
    path: Path, rows: Sequence[Row], facts: dict[str, str], remarks: Sequence[str], *, title: str, target: str
) -> None:
    """Write the table as a document, with the machine that it was taken on; `target` of make is what writes it."""
    lines = [
        f"# {title}",
        "",
        f'`make {target} BENCH_ARGS="--markdown docs/{path.name}"` writes this file. Figures of one run',
        "on one machine, not promises; what carries over is the ratios.",
        "",
        _LEGEND,
        "",
        "| machine | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    for section, members in groupby(rows, key=lambda row: row.section):
        lines += [f"## {section}", "", _line(_COLUMNS), "| --- | ---: | --- | ---: | ---: | --- | --- |"]
        lines += [_line(row.cells()) for row in members]
        lines.append("")
    lines += [f"- {remark}" for remark in remarks]
    path.write_text("\n".join(lines).rstrip("\n") + "\n")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("<=", "≤").replace(">=", "≥")
