"""What lossy codecs cost a model: perplexity and next tokens after a prefix whose KV went through each of them.

    python -m benchmarks.quality [SPECS...] [--quick] [--markdown FILE]

SmolLM2-135M-Instruct reads real text: the documents of this project. The KV of each prefix is cut into blocks of
bfloat16, as a prefix cache stores them, and comes back raw or through a codec. Then the model, which computes in
float32, reads on from there. All codecs see the same prefixes and the same text after them.
"""

from __future__ import annotations

import datetime
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvstrata.codecs import AXES, TensorInfo, codec

ROOT = Path(__file__).parents[1]
TEXTS = ("docs/*.md", "README.md", "CONTRIBUTING.md", "LICENSE", "src/kvstrata/demo/document.md")
WRITTEN = {
    f"docs/{name}.md" for name in ("benchmarks", "chunks", "engines", "quality")
}  # tables of figures, which change
PREFIX, REST, BLOCK, STEP = 1024, 256, 32, 768
MOST = {"int8": 0.5}
"""Percent by which the perplexity may rise at most."""

SPECS = (
    "fp8-e4m3",
    "int8",
    "int4",
    "int4:32",
    "int4:hadamard=v",
    "int4:scales=f8",
    "int4:scales=f16",
    "int4:hadamard=kv",
    "int4:scales=f8,hadamard=kv",
    "int4:scales=f16,hadamard=kv",
    "int4:keys=token",
    "int4:keys=token,hadamard=kv",
)


@dataclass
class Result:
    """What was found for one codec, by window where it is a list."""

    nats: list[float] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    ratio: float = 0.0
    keys_rms: float = 0.0
    values_rms: float = 0.0

    def note(self, logs: Any, exact: Any, truth: Any) -> None:
        """Take note of a window: log-probabilities [tokens, vocabulary], those without loss, and what stands there."""
        self.nats.append(-float(logs.gather(1, truth[:, None]).mean()))
        self.agreed.append(float((logs.argmax(-1) == exact.argmax(-1)).double().mean()))
        self.divergence.append(float((exact.exp() * (exact - logs)).sum(-1).mean()))

    @property
    def perplexity(self) -> float:
        """Of all windows, which are equally long."""
        return math.exp(float(np.mean(self.nats)))

    def change(self, reference: Result) -> tuple[float, float]:
        """Percent by which the perplexity is higher than the reference's, and the standard error of that."""
        off = np.array(self.nats) - np.array(reference.nats)
        error = float(off.std(ddof=1) / math.sqrt(off.size)) if off.size > 1 else math.nan
        return 100 * math.expm1(float(off.mean())), 100 * error


def texts() -> Iterator[str]:
    """What is read: the documents of this project."""
    for pattern in TEXTS:
        for file in sorted(ROOT.glob(pattern)):
            if str(file.relative_to(ROOT)) not in WRITTEN:
                yield file.read_text("utf-8")


class Reader:
    """The model and the windows of text."""

    def __init__(self, windows: int | None) -> None:
        import torch
        from transformers import DynamicCache

        from kvstrata.demo import model as demo_model

        self.torch = torch
        self.new_cache: Any = DynamicCache
        self.model, self.tokenizer = demo_model.load("float32")
        names = inspect.signature(self.model.forward).parameters
        self.argument = "cache" if "cache" in names else "past_key_values"
        self.windows = list(self._windows())[:windows]

    def _windows(self) -> Iterator[Any]:
        """Token ids [1, PREFIX + REST], none over the border of two texts; a token is in one rest at most."""
        for text in texts():
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            for start in range(0, ids.shape[1] - PREFIX - REST + 1, STEP):
                yield ids[:, start : start + PREFIX + REST]

    def blocks(self, window: Any) -> Any:
        """The KV of a window's prefix as blocks of bfloat16 words: [blocks, layers, 2, heads, BLOCK, channels]."""
        with self.torch.inference_mode():
            layers = self.model(window[:, :PREFIX], use_cache=True).past_key_values.layers
            kv = self.torch.stack([self.torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
            count, two, heads, tokens, channels = kv.shape
            kv = kv.to(self.torch.bfloat16).reshape(count, two, heads, tokens // BLOCK, BLOCK, channels)
            words = kv.permute(3, 0, 1, 2, 4, 5).contiguous().view(self.torch.int16)
            return words.numpy().view(np.uint16)

    def read_on(self, window: Any, blocks: Any) -> Any:
        """The log-probabilities of what comes after each token of the rest but the last: [REST - 1, vocabulary]."""
        torch = self.torch
        with torch.inference_mode():
            kv = torch.from_numpy(blocks.view(np.int16)).view(torch.bfloat16).float()
            kv = kv.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
            cache = self.new_cache()
            for number, (keys, values) in enumerate(kv):
                cache.update(keys[None].contiguous(), values[None].contiguous(), number)
            logits = self.model(window[:, PREFIX:], **{self.argument: cache}, use_cache=True).logits[0, :-1]
            return logits.double().log_softmax(-1)


def evaluate(reader: Reader, specs: tuple[str, ...], console: Console) -> dict[str, Result]:
    """Let the model read every window through every codec; "raw" is what the others are compared with."""
    results = {spec: Result() for spec in ("raw", *specs)}
    for number, window in enumerate(reader.windows):
        console.print(f"window {number + 1} of {len(reader.windows)}", style="dim")
        blocks = reader.blocks(window)
        tensor = TensorInfo("bfloat16", blocks.shape[1:], AXES)
        truth = window[0, PREFIX + 1 :]
        exact: Any = None
        for spec, result in results.items():
            made = codec(spec)
            found = np.empty_like(blocks)
            stored = 0
            for block, out in zip(blocks, found, strict=True):
                payload = made.encode(block, tensor)
                stored += len(memoryview(payload).cast("B"))
                made.decode_into(payload, out)
            logs = reader.read_on(window, found)
            exact = logs if exact is None else exact
            result.note(logs, exact, truth)
            result.ratio += blocks.nbytes / stored / len(reader.windows)
            if made.lossy:
                stats = made.error(blocks[len(blocks) // 2], tensor)  # type: ignore[attr-defined]
                result.keys_rms += stats.keys.rms_relative / len(reader.windows)
                result.values_rms += stats.values.rms_relative / len(reader.windows)
    return results


COLUMNS = ("codec", "smaller", "perplexity", "change", "target", "", "same next token", "divergence", "keys", "values")


def cells(spec: str, result: Result, reference: Result) -> tuple[str, ...]:
    """The texts of a line."""
    change, error = result.change(reference)
    most = MOST.get(spec)
    verdict = "" if most is None else "met" if change <= most else "missed"
    head = (f"`{spec}`", f"{result.ratio:.2f}x", f"{result.perplexity:.3f}")
    if result is reference:
        return head + ("",) * (len(COLUMNS) - len(head))
    return (
        *head, f"{change:+.2f} % ± {error:.2f}", "" if most is None else f"≤ {most} %", verdict,
        f"{100 * np.mean(result.agreed):.1f} %", f"{np.mean(result.divergence):.5f}",
        f"{100 * result.keys_rms:.2f} %", f"{100 * result.values_rms:.2f} %",
    )  # fmt: skip


def show(results: dict[str, Result], console: Console) -> None:
    """Print the table."""
    table = Table(*COLUMNS)
    for spec, result in results.items():
        table.add_row(*(text.strip("`") for text in cells(spec, result, results["raw"])))
    console.print(table)


def write_markdown(path: Path, results: dict[str, Result], windows: int) -> None:
    """Write the table as a document."""
    reference = results["raw"]
    fours = [spec for spec in results if spec.startswith("int4")]
    lines = [
        "# What lossy codecs cost",
        "",
        "`make quality` writes this file. SmolLM2-135M-Instruct, computing in float32, reads the documents of this",
        f"project: {windows} windows of {PREFIX + REST:,} tokens. The KV of the first {PREFIX:,} is stored as blocks",
        f"of {BLOCK} tokens in bfloat16 and loaded back, raw or through a codec; perplexity is that of the {REST - 1}",
        "tokens that the model reads after it.",
        "",
        "Change: of the perplexity, beside raw, with its standard error over the windows. Same next token: how often",
        "the likeliest token is the one that it is with raw. Divergence: Kullback and Leibler's, in nats a token.",
        "Keys, values: root mean square of the error over that of the elements.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |",
        *(f"| {' | '.join(cells(spec, result, reference))} |" for spec, result in results.items()),
        "",
    ]
    if fours:
        best = min(fours, key=lambda spec: float(np.mean(results[spec].divergence)))
        small = [spec for spec in fours if results[spec].ratio >= 3.4]
        lines.append(f"- Of the settings of int4, `{best}` diverges least.")
        if small:
            best = min(small, key=lambda spec: float(np.mean(results[spec].divergence)))
            lines.append(f"- Of those that are at least 3.4 times smaller than bfloat16, `{best}`.")
    lines += [
        "- One small model and one kind of text: a small model with 3 heads of KV has less to spare than larger ones.",
        f"- Taken on {datetime.datetime.now(datetime.UTC).date().isoformat()}.",
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def main(
    specs: Annotated[list[str] | None, typer.Argument(help="Codecs; all of interest if none is given.")] = None,
    quick: Annotated[bool, typer.Option(help="Three windows only.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Measure what lossy codecs cost a model."""
    console = Console()
    console = Console(width=max(console.width, 140))
    try:
        reader = Reader(3 if quick else None)
    except ImportError as error:
        console.print(f"not measured: {error}", style="yellow")
        raise typer.Exit(1) from None
    results = evaluate(reader, tuple(specs) if specs else SPECS, console)
    show(results, console)
    if markdown is not None:
        write_markdown(markdown, results, len(reader.windows))
        console.print(f"written to {markdown}")


if __name__ == "__main__":
    typer.run(main)
