"""How the outcome of the demonstration is shown."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from kvstrata.demo.runner import Outcome

__all__ = ["as_json", "show"]


def as_json(outcome: Outcome) -> str:
    """Return the rows as an indented JSON list."""
    return msgspec.json.format(msgspec.json.encode(outcome.rows), indent=2).decode()


def show(outcome: Outcome, console: Console) -> None:
    """Print the rows as a table, the answers, and a sentence on the result."""
    # All columns together take less than the 80 that a pipe and a small terminal have.
    table = Table(title="Time to the first token (TTFT)", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("run", no_wrap=True)
    for name in ("prompt", "reused", "loaded", "from", "TTFT", "speed-up", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in outcome.rows:
        table.add_row(
            row.run,
            f"{row.prompt_tokens:,}",
            f"{row.reused_tokens:,}",
            f"{row.loaded_bytes / 2**20:.1f} MiB" if row.loaded_bytes else "-",
            row.tier,
            f"{row.ttft_s * 1000:,.0f} ms",
            f"{row.speedup:.1f}x",
            "yes" if row.identical else "NO",
        )
    console.print(table)
    for question, answer in outcome.answers:
        console.print(f"\n[bold]{question}[/bold]\n{answer.strip()}")
    bad = [row.run for row in outcome.rows if not row.good]
    if bad:
        console.print(
            f"\nNot as it must be: {'; '.join(bad)} (other tokens than without the cache, or nothing reused)."
        )
    else:
        console.print("\nEvery answer is token for token the one without the cache.")
