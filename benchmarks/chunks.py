"""What reusing chunks that are no prefix costs a model: perplexity and next tokens, by the part computed again.

    python -m benchmarks.chunks [--quick] [--markdown FILE]

SmolLM2-135M-Instruct reads on in real text behind CHUNKS chunks of it, whose KV was computed by each chunk alone. The
text goes on from chunk to chunk, which is harder than with documents that have nothing to do with one another.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kvstrata
from benchmarks.quality import Result, texts

CHUNKS, CHUNK, REST, STEP, WINDOWS = 4, 256, 256, 1024, 32
PARTS = (0.0, 0.05, 0.15, 0.25, 0.5, 1.0)
MARK = "<!-- figures -->"
COLUMNS = ("computed again", "tokens computed", "perplexity", "change", "same next token", "divergence")


def main(
    quick: Annotated[bool, typer.Option(help="Three windows only.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the figures into this document.")] = None,
) -> None:
    """Measure what reusing chunks costs a model."""
    lines, windows = _measured(3 if quick else WINDOWS)
    console = Console()
    table = Table(*COLUMNS)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if markdown is not None:
        _write(markdown, lines, windows)


def _measured(most: int) -> tuple[list[tuple[str, ...]], int]:
    import torch

    from kvstrata.demo import model as demo_model
    from kvstrata.integrations._transformers_cache import CACHE_ARGUMENT, cache_over
    from kvstrata.integrations.transformers_chunks import ChunkReuse

    model, tokenizer = demo_model.load("float32")
    windows: list[Any] = []
    for text in texts():
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        size = CHUNKS * CHUNK + REST
        windows += [ids[start : start + size] for start in range(0, len(ids) - size + 1, STEP)]
    windows = windows[:: max(1, len(windows) // most)][:most]  # of all texts
    results = {part: Result() for part in PARTS}
    computed = dict.fromkeys(PARTS, 0)
    with kvstrata.open(memory="1GiB") as cache:
        chunks = ChunkReuse(model, cache)
        for ids in windows:
            parts = [*ids[: CHUNKS * CHUNK].split(CHUNK), ids[CHUNKS * CHUNK :][:1]]
            truth = ids[CHUNKS * CHUNK + 1 :]
            exact: Any = None
            chunks.prepare(parts)  # from now on all chunks are known
            for part in sorted(PARTS, reverse=True):
                chunks.recompute = part
                buffer, spent, _ = chunks.prepare(parts)
                held = {CACHE_ARGUMENT: cache_over(buffer, CHUNKS * CHUNK)}
                with torch.inference_mode():
                    logits = model(ids[None, CHUNKS * CHUNK :], **held).logits[0, :-1]
                logs = logits.double().log_softmax(-1)
                exact = logs if exact is None else exact  # with everything computed again it is
                computed[part] += spent
                results[part].note(logs, exact, truth)
    lines = []
    for part, result in results.items():
        change, error = result.change(results[1.0])
        same = (f"{change:+.1f} % ± {error:.1f}", f"{100 * sum(result.agreed) / len(windows):.1f} %",
                f"{sum(result.divergence) / len(windows):.3f}")  # fmt: skip
        share = computed[part] / (len(windows) * CHUNKS * CHUNK)
        lines.append((f"{part:.0%}", f"{share:.0%}", f"{result.perplexity:.3f}", *(same if part < 1 else ("",) * 3)))
    return lines, len(windows)


def _write(path: Path, lines: list[tuple[str, ...]], windows: int) -> None:
    """Put the figures in the place of those that stand there."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    figures = [
        f"Taken on {today}, {windows} windows.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
    before, mark, after = path.read_text("utf-8").partition(f"{MARK}\n")
    if not mark:
        raise typer.BadParameter(f"{path} has no line {MARK}")
    after = after[after.index("\n- ") :]
    path.write_text(before + mark + "\n" + "\n".join(figures) + "\n" + after, "utf-8")


if __name__ == "__main__":
    typer.run(main)
