"""The command `kvstrata`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from kvstrata.errors import KVStrataError

__all__ = ["app"]

app = typer.Typer(
    help="kvstrata: the embedded, tiered KV-cache for model inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(enum.StrEnum):
    """Precisions that the demonstration runs in."""

    fp32 = "fp32"
    bf16 = "bf16"


@app.callback()
def root() -> None:
    """kvstrata: the embedded, tiered KV-cache for model inference."""


@app.command()
def demo(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print only a JSON list of rows.")] = False,
    dtype: Annotated[DType, typer.Option(help="Precision; in bf16 a near tie may turn out otherwise.")] = DType.fp32,
    path: Annotated[str | None, typer.Option(help="The cache's directory; by default a temporary one.")] = None,
    memory: Annotated[str, typer.Option(help="Size of the memory tier.")] = "1GiB",
    new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens to generate for an answer.")] = 24,
) -> None:
    """Let SmolLM2 answer questions about one long document, and skip its prefill.

    One row for each run: cold (no cache at all); warm in the same process; warm in a second process, through
    shared memory, while the first is alive; and warm from disk, in a process started when all others have
    exited, with the cache opened anew for each question.

    TTFT is the median over the questions of the time from the call until the first new token is there;
    matching and loading are in it, loading the model isn't. Token counts and bytes are for one question.

    The exit status is 1 if any generated token differs from those without the cache, or if a warm run
    reused nothing; 2 if the demonstration could not run.
    """
    from rich.console import Console

    from kvstrata.demo import report, runner

    progress = Console(stderr=True, highlight=False)
    try:
        outcome = runner.run(
            dtype=dtype.value, path=path, memory=memory, new_tokens=new_tokens,
            say=lambda line: progress.print(f"==> {line}", soft_wrap=True),
        )  # fmt: skip
    except KVStrataError as error:
        progress.print(f"kvstrata demo: {error}", style="red", soft_wrap=True)
        raise typer.Exit(2) from None
    if json:
        typer.echo(report.as_json(outcome))
    else:
        report.show(outcome, Console(highlight=False))
    if not outcome.good:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
