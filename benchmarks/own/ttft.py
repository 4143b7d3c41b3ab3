"""Time to first token with SmolLM2-135M: cold, from the process's own tensors, from shared memory, from disk.

    python -m benchmarks ttft
    python -m benchmarks.own.ttft --blocks      compare block sizes

The prompt is a prefix, of 2,048 tokens unless others are asked for, and 16 more, which are always computed. One
process fills a cache and keeps it open; a second one runs, in turns, cold, with a DynamicCache over tensors that it
holds itself, and from shared memory. When both have gone a third one opens the cache anew for each load from disk,
with the page cache dropped, and reads as much from the raw device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measure import Sample, Settings
from benchmarks.own.device import drop_page_cache, read_bandwidth
from benchmarks.table import Row, show

PREFIX, TAIL = 2048, 16
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
MEMORY, DISK = "1GiB", "4GiB"
OWN = "KV in the process's own torch tensors"
REMARK = (
    f"TTFT in transformers: SmolLM2-135M-Instruct, a prefix and {TAIL} tokens more, from the call of generate "
    "to the first token. A ratio to cold is bounded by the cost of the pass over the last tokens alone: the "
    "line of the process's own tensors shows the bound."
)
REMARKS = [REMARK]


def rows(settings: Settings) -> list[Row]:
    """Measure all of it, in bf16 and, unless quick, in fp32."""
    dtypes = [dtype for dtype in DTYPES if dtype == "bf16" or not settings.quick]
    return [row for dtype in dtypes for row in prefix_rows(settings, dtype, PREFIX)]


def prefix_rows(settings: Settings, dtype: str, prefix: int) -> list[Row]:
    """Measure all of it for a prefix of so many tokens."""
    place = settings.directory / f"{dtype}-{prefix}"
    place.mkdir()
    given = {"dtype": dtype, "repeats": settings.repeats(16), "scratch": str(place), "prefix": prefix}
    with _child("fill", given) as fill:
        _hear(fill)
        with _child("memory", given) as child:
            memory = {name: Sample(tuple(values)) for name, values in _hear(child).items()}
    with _child("disk", given) as child:
        disk = _hear(child)
    raw = Sample(tuple(disk["raw"]))
    limit = memory["shared"].median + 1.25 * disk["bytes"] / raw.median
    section = f"transformers: time to first token, prefix of {prefix:,} tokens, {dtype}"
    shared = "shared memory, second process"
    ways = {"own": OWN, "by_hand": "KV in a safetensors file, page cache warm"}
    return [
        *(Row(section, ways[name], memory[name], peer="cold", theirs=memory["cold"]) for name in ways),
        Row(section, shared, memory["shared"], peer=OWN, theirs=memory["own"], at_least=1 / 1.1),
        Row(section, shared, memory["shared"], peer="cold", theirs=memory["cold"],
            at_least=20 if prefix == PREFIX else None),
        Row(section, f"disk, page cache dropped, {disk['bytes'] / 1e6:.0f} MB", Sample(tuple(disk["ttft"])),
            peer="cold", theirs=memory["cold"], at_most=limit),
        Row(section, "the device that this limit is from: raw O_DIRECT", raw, "B/s"),
    ]  # fmt: skip


def block_rows(dtype: str) -> list[Row]:
    """Measure, for several block sizes, the load alone and the TTFT where a prefix ends anywhere."""
    with tempfile.TemporaryDirectory(prefix="kvstrata-bench-") as scratch:
        settings = {"dtype": dtype, "repeats": 5, "scratch": scratch, "prefix": PREFIX}
        with _child("blocks", settings) as child:
            found = _hear(child)
    return [Row(f"Block sizes, {dtype}", what, Sample(tuple(values))) for what, values in found]


@contextmanager
def _child(role: str, settings: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process that plays `role`; ends when its input does."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.own.ttft",
        "--role",
        role,
        "--settings",
        json.dumps(settings),
    ]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        yield child
        child.communicate()
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(errors.read().decode(errors="replace")[-2000:])


def _hear(child: subprocess.Popen[str]) -> Any:
    assert child.stdout is not None
    line = child.stdout.readline()
    return json.loads(line) if line else {}


# ---- In the child processes


class _Bench:
    """The model, the prompt and the ways to its first token."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from kvstrata.demo import model as demo_model
        from kvstrata.demo.texts import FIRST_QUESTION, handbook

        self.torch = torch
        self.repeats = settings["repeats"]
        self.prefix = settings["prefix"]
        self.scratch = Path(settings["scratch"])
        saved = self.scratch / "model"
        self.model, tokenizer = demo_model.load(DTYPES[settings["dtype"]], str(saved) if saved.exists() else None)
        if not saved.exists():
            demo_model.save(self.model, tokenizer, str(saved))
        document = demo_model.prompt(tokenizer, FIRST_QUESTION, handbook())["input_ids"]
        repeated = document.repeat(1, -(-(self.prefix + TAIL) // document.shape[1]))
        self.prompt = repeated[:, : self.prefix + TAIL]
        for _ in range(2):
            self.ttft(self.model.generate, self.prompt[:, :64])

    def ttft(self, generate: Any, prompt: Any = None, **options: Any) -> float:
        """Seconds from the call to the first token, which is the only one."""
        prompt = self.prompt if prompt is None else prompt
        start = time.perf_counter()
        generate(prompt, max_new_tokens=1, do_sample=False, **options)
        return time.perf_counter() - start

    def reuse(self, cache: Any, **options: Any) -> Any:
        from kvstrata.integrations.transformers import PrefixReuse

        return PrefixReuse(self.model, cache, **options)

    def checked(self, reuse: Any, tier: str) -> float:
        """The TTFT with reuse, after making sure that the prefix came from `tier`."""
        seconds = self.ttft(reuse.generate)
        if (reuse.last.reused_tokens, reuse.last.tier) != (self.prefix, tier):
            raise RuntimeError(f"expected {self.prefix} tokens from {tier}: {reuse.last}")
        return seconds


def _fill(bench: _Bench) -> None:
    import kvstrata

    with kvstrata.open(bench.scratch / "cache", memory=MEMORY, disk=DISK) as cache:
        bench.ttft(bench.reuse(cache).generate)
        cache.flush()
        _reply("filled")
        sys.stdin.read()


def _memory(bench: _Bench) -> None:
    from safetensors.torch import load_file, save_file
    from transformers.cache_utils import DynamicCache

    import kvstrata
    from kvstrata.integrations._transformers_cache import CACHE_ARGUMENT

    first = DynamicCache()
    bench.ttft(bench.model.generate, **{CACHE_ARGUMENT: first})
    held = [(layer.keys[:, :, : bench.prefix].clone(), layer.values[:, :, : bench.prefix].clone())
            for layer in first.layers]  # fmt: skip
    file = bench.scratch / "by_hand.safetensors"
    save_file({f"{i}.{j}": tensor for i, pair in enumerate(held) for j, tensor in enumerate(pair)}, file)

    def by_hand() -> float:
        start = time.perf_counter()
        loaded = load_file(file)
        pairs = [(loaded[f"{i}.0"], loaded[f"{i}.1"]) for i in range(len(held))]
        ready = time.perf_counter() - start
        return ready + bench.ttft(bench.model.generate, **{CACHE_ARGUMENT: DynamicCache(pairs)})

    times: dict[str, list[float]] = {"cold": [], "own": [], "shared": [], "by_hand": []}
    with kvstrata.open(bench.scratch / "cache", memory=MEMORY, disk=DISK) as cache:
        reuse = bench.reuse(cache, store=False)
        bench.checked(reuse, "memory")
        for turn in range(bench.repeats):
            if turn % 5 == 0:
                times["cold"].append(bench.ttft(bench.model.generate))
            times["own"].append(bench.ttft(bench.model.generate, **{CACHE_ARGUMENT: DynamicCache(held)}))
            times["shared"].append(bench.checked(reuse, "memory"))
            times["by_hand"].append(by_hand())
    _reply(times)


def _disk(bench: _Bench) -> None:
    import kvstrata

    ttft, raw = [], []
    nbytes = 0
    for _ in range(max(3, bench.repeats // 2)):
        drop_page_cache(bench.scratch / "cache")
        with kvstrata.open(bench.scratch / "cache", memory=MEMORY, disk=DISK) as cache:
            reuse = bench.reuse(cache, store=False)
            ttft.append(bench.checked(reuse, "disk"))
            nbytes = reuse.last.loaded_bytes
        raw += read_bandwidth(bench.scratch, total=nbytes >> 20 << 20, repeats=1)
    _reply({"ttft": ttft, "raw": raw, "bytes": nbytes})


def _blocks(bench: _Bench) -> None:
    import kvstrata

    # Prefixes that end anywhere: the part block at the end is computed again.
    prompts = [bench.prompt.clone() for _ in range(8)]
    for index, prompt in enumerate(prompts):
        prompt[0, PREFIX - 1 - index * 17 :] += 1
    tokens = bench.prompt[0, :PREFIX].numpy()
    sizes = (16, 32, 64, 128, 256, 512)
    loads: dict[int, list[float]] = {size: [] for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    with kvstrata.open(memory=MEMORY) as cache:
        reuses = {size: bench.reuse(cache, block_tokens=size) for size in sizes}
        for reuse in reuses.values():
            bench.ttft(reuse.generate)
            reuse.store = False
        buffer = reuses[16]._pool.take(PREFIX)
        for turn in range(bench.repeats * len(prompts)):
            for size, reuse in reuses.items():
                start = time.perf_counter()
                reuse._prefixes.match(tokens).load(out=buffer.host[:, :, 0])
                loads[size].append(time.perf_counter() - start)
                times[size].append(bench.ttft(reuse.generate, prompts[turn % len(prompts)]))
    found = []
    for size, reuse in reuses.items():
        name = f"block of {size} tokens, {reuse.layout.block_bytes >> 10} KiB"
        found += [(f"{name}: match and load", loads[size]), (f"{name}: TTFT", times[size])]
    _reply(found)


def _reply(value: Any) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    """Compare block sizes, or do the part of a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", action="store_true", required="--role" not in sys.argv)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--role", choices=["fill", "memory", "disk", "blocks"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        roles = {"fill": _fill, "memory": _memory, "disk": _disk, "blocks": _blocks}
        roles[given.role](_Bench(given.settings))
    else:
        show(block_rows(given.dtype), Console())


if __name__ == "__main__":
    main()
