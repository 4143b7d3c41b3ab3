"""The command `kvstrata`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvstrata.errors import ConfigError, KVStrataError

if TYPE_CHECKING:
    from kvstrata.movement.warm import Warmed

__all__ = ["app"]

T = TypeVar("T")

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
    questions: Annotated[int | None, typer.Option(min=1, help="Ask the first so many only.")] = None,
    document: Annotated[
        Path | None,
        typer.Option(help="A text that the questions are about instead; with --question.", exists=True, dir_okay=False),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this instead; as often as there are questions.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Another model: a directory with its config.json, or a GGUF file.", exists=True)
    ] = None,
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

    from kvstrata.demo import report, runner, texts

    progress = Console(stderr=True, highlight=False)
    try:
        if document is not None and not question:
            raise ConfigError("--document needs a --question about it")
        outcome = runner.run(
            dtype=dtype.value, path=path, memory=memory, new_tokens=new_tokens,
            questions=(question or texts.QUESTIONS)[:questions],
            document=document.read_text("utf-8", errors="replace") if document else None,
            model=model,
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


@app.command()
def warm(
    path: Annotated[Path, typer.Argument(help="The cache's directory.")],
    *,
    hottest: Annotated[int | None, typer.Option(min=1, help="Load so many of the keys that were used last.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A file with one key a line, to be loaded in this order.")] = None,
    namespace: Annotated[str, typer.Option(help="The namespace of the keys in the file.")] = "default",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file with the tokens of a prompt a line, as JSON: [1, 2, 3]; with --layout."),
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="The layout of the prompts' KV: fields of KVLayout as JSON.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which it ends.")] = None,
    memory: Annotated[str | None, typer.Option(help="As the cache is opened elsewhere.")] = None,
    disk: Annotated[str | None, typer.Option(help="As the cache is opened elsewhere.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with all options of the cache.")] = None,
    hold: Annotated[bool, typer.Option("--hold", help="Keep it in memory until this command is interrupted.")] = False,
) -> None:
    """Bring records of a cache into memory: keys, the prefixes of prompts, or what was used last.

    They come from its disk; prompts, and keys of the namespace "default", also from elsewhere. What isn't given of the
    cache's options is taken from the environment, as always.

    They stay there as long as some process has the cache open: start this beside a server, or use --hold.
    """
    import signal

    from rich.console import Console

    from kvstrata import KVLayout, PrefixCache
    from kvstrata import open as open_cache

    console = Console(stderr=True, highlight=False)
    try:
        if (hottest, keys, prompts).count(None) != 2:
            raise ConfigError("give one of --hottest, --keys and --prompts")
        if (prompts is None) != (layout is None):
            raise ConfigError("--prompts and --layout belong together")
        with open_cache(path, memory=memory, disk=disk, config=config) as cache:
            with console.status("") as status:

                def progress(done: Warmed) -> None:
                    status.update(f"{done.present + done.loaded + done.absent:,} of {done.wanted:,} keys")

                if keys is not None and namespace == cache.name:
                    done = cache.warm(_lines(keys), time_limit=time_limit, progress=progress)
                elif keys is not None:
                    wanted = {namespace: _lines(keys)}
                    done = cache.warm_namespaces(wanted, time_limit=time_limit, progress=progress)
                elif prompts is not None and layout is not None:
                    prefixes = PrefixCache.open(cache, _decoded(layout.read_bytes(), KVLayout, layout))
                    tokens = [_decoded(line, list[int], prompts) for line in _lines(prompts)]
                    done = prefixes.warm(tokens, time_limit=time_limit, progress=progress)
                else:
                    done = cache.warm(hottest=hottest, time_limit=time_limit, progress=progress)
            typer.echo(
                f"{done.loaded:,} of {done.wanted:,} records loaded ({done.nbytes:,} bytes, {done.seconds:.2f} s), "
                f"{done.present:,} were in memory, {done.absent:,} are nowhere"
                + ("" if done.complete else "; it ended early")
            )
            if hold:
                signal.pause()
    except (KVStrataError, OSError) as error:
        console.print(f"kvstrata warm: {error}", style="red", soft_wrap=True)
        raise typer.Exit(2) from None


@app.command()
def serve(
    *,
    model: Annotated[str, typer.Option(help="A model's directory, or a GGUF file.")],
    name: Annotated[str, typer.Option(help="What clients call it; by default as its file or directory.")] = "",
    path: Annotated[str, typer.Option(help="The cache's directory; by default a temporary one.")] = "",
    memory: Annotated[str, typer.Option(help="Size of the memory tier.")] = "1GiB",
    disk: Annotated[str | None, typer.Option(help="Size of the disk tier; by default 8 GiB.")] = None,
    dtype: Annotated[DType, typer.Option(help="Precision that the model runs in.")] = DType.fp32,
    block_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens in a block of the cache.")] = 32,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with the model, all with one cache.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a worker; 0: cores divided by workers.")] = 0,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait in a worker before it says 429.")] = 16,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that requests have to finish at the end.")] = 30,
) -> None:
    """Serve a model as OpenAI's API does, with its prefixes kept in a cache that all workers share.

    /v1/chat/completions and /v1/completions, also as streams, /v1/models, /health and /metrics. SIGTERM lets running
    requests finish.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    try:
        from kvstrata.serve.run import serve as run
        from kvstrata.serve.settings import ServeSettings

        settings = ServeSettings(
            model=model, name=name, path=path, memory=memory, disk=disk,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype], block_tokens=block_tokens, host=host, port=port,
            workers=workers, threads=threads, queue=queue, grace=grace,
        )  # fmt: skip
        run(settings, lambda line: console.print(f"kvstrata serve: {line}", soft_wrap=True))
    except (KVStrataError, OSError) as error:
        console.print(f"kvstrata serve: {error}", style="red", soft_wrap=True)
        raise typer.Exit(2) from None


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines() if line]


def _decoded(text: bytes, kind: type[T], path: Path) -> T:
    """Read JSON; raises ConfigError that names the file."""
    import msgspec

    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from None


if __name__ == "__main__":
    app()
