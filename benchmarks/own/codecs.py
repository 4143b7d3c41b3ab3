"""What the codecs make of the KV of a real model, and how fast: on one core, beside numpy and torch.

SmolLM2-135M reads this project's licence and architecture in bfloat16; its KV is cut into blocks as a prefix cache
stores them. Decoding goes into buffers that exist. Speeds are of decoded bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Sample, Settings, Work, interleaved
from benchmarks.table import Row
from kvstrata.codecs import AXES, TensorInfo, codec
from kvstrata.codecs.encryption import Keyring, Sealer

ROOT = Path(__file__).parents[2]
BLOCK = 32
REMARKS = [
    "Codecs: KV of SmolLM2-135M in bfloat16, blocks of 32 tokens (720 KiB), one thread; bytes per second are of "
    "decoded bytes. numpy.copyto moves the same blocks; torch computes the same numbers from codes, scales and minima.",
]

# Name, the least ratio of sizes to bfloat16, and the least bytes per second of decoding.
CODECS: list[tuple[str, float | None, float | None]] = [
    ("lz4", None, None),
    ("zstd:3", None, None),
    ("planes", 1.25, 1e9),
    ("int8", None, 3e9),
    ("int4", 3.4, None),
    ("int4:hadamard=kv", 3.4, None),
    ("fp8-e4m3", None, None),
]


def rows(settings: Settings) -> list[Row]:
    """Measure each codec on the same blocks."""
    try:
        blocks = _blocks(settings.size(1024))
    except ImportError as error:
        REMARKS.append(f"Codecs: not measured, since something is missing: {error}.")
        return []
    tensor = TensorInfo("bfloat16", blocks.shape[1:], AXES)
    found = []
    for spec, least_ratio, least_decoding in CODECS:
        found += _rows_of(spec, blocks, tensor, settings, least_ratio, least_decoding)
    return found + _sealed(blocks, settings) + _large(blocks, settings)


def _rows_of(
    spec: str, blocks: Any, tensor: TensorInfo, settings: Settings, least_ratio: float | None, least: float | None
) -> list[Row]:
    made = codec(spec, threads=1)
    payloads = [made.encode(block, tensor) for block in blocks]
    outs = [np.empty_like(block) for block in blocks]

    def encode() -> None:
        for block in blocks:
            made.encode(block, tensor)

    def decode() -> None:
        for payload, out in zip(payloads, outs, strict=True):
            made.decode_into(payload, out)

    peer, run = _peer(spec, blocks, outs)
    encoded, decoded, theirs = _speeds(blocks.nbytes, settings, encode, decode, run)
    section = "Codecs on KV of a real model, one core"
    stored = Sample.of(sum(len(memoryview(payload)) for payload in payloads) / len(blocks))
    raw = Sample.of(blocks.nbytes / len(blocks))
    return [
        Row(section, f"{spec}: bytes of a block", stored, "B", "bfloat16", raw, at_least=least_ratio),
        Row(section, f"{spec}: encode", encoded, "B/s"),
        Row(section, f"{spec}: decode", decoded, "B/s", peer, theirs, no_less=least),
    ]


def _sealed(blocks: Any, settings: Settings) -> list[Row]:
    """Encryption of the same blocks."""
    sealer = Sealer(Keyring([bytes(32)]))
    payloads = [sealer.seal(0, block, b"identity") for block in blocks]
    outs = [np.empty_like(block) for block in blocks]

    def seal() -> None:
        for block in blocks:
            sealer.seal(0, block, b"identity")

    def open_all() -> None:
        for payload in payloads:
            sealer.open(payload, b"identity")

    peer, run = _peer("raw", blocks, outs)
    sealed, opened, theirs = _speeds(blocks.nbytes, settings, seal, open_all, run)
    section = "Encryption of the same blocks, one core"
    return [
        Row(section, "AES-256-GCM: seal", sealed, "B/s"),
        Row(section, "AES-256-GCM: open", opened, "B/s", peer, theirs),
    ]


def _large(blocks: Any, settings: Settings) -> list[Row]:
    """One value of 64 MiB, by all processors and by one."""
    size = settings.size(64 << 20)
    value = np.resize(blocks.reshape(-1), size // 2)
    out = np.empty_like(value)
    section = "A value of 64 MiB, decoded by all cores"
    found = []
    for spec in ("zstd:3", "planes"):
        one, many = codec(spec, threads=1), codec(spec)
        payload = one.encode(value)
        runs = [lambda c=c, p=payload: c.decode_into(p, out) for c in (many, one)]
        ours, theirs = _speeds(value.nbytes, settings, *runs)
        found.append(Row(section, spec, ours, "B/s", "by one core", theirs))
    return found


def _speeds(nbytes: int, settings: Settings, *runs: Callable[[], object]) -> list[Sample]:
    samples = interleaved(*(Work(run, nbytes) for run in runs), repeats=settings.repeats(12))
    return [sample.map(lambda seconds: 1 / seconds) for sample in samples]


def _peer(spec: str, blocks: Any, outs: list[Any]) -> tuple[str, Callable[[], object]]:
    """What the same blocks cost otherwise."""
    import torch

    if not codec(spec).lossy:
        return "numpy.copyto", lambda: [np.copyto(out, block) for block, out in zip(blocks, outs, strict=True)]
    exact = [torch.from_numpy(block.view(np.int16)).view(torch.bfloat16) for block in blocks]
    targets = [torch.empty_like(block) for block in exact]
    if spec == "fp8-e4m3":
        eights = [block.to(torch.float8_e4m3fn) for block in exact]
        return "torch, a cast", lambda: [to.copy_(block) for to, block in zip(targets, eights, strict=True)]
    levels = 255 if spec.startswith("int8") else 15
    coded = [_by_token(torch, block, levels) for block in exact]

    def run() -> None:
        for to, (codes, scale, low) in zip(targets, coded, strict=True):
            if levels == 15:
                codes = torch.cat((codes & 15, codes >> 4), -1)
            to.copy_(codes.float().mul_(scale).add_(low))

    return "torch, groups by token", run


def _by_token(torch: Any, block: Any, levels: int) -> tuple[Any, Any, Any]:
    """Codes, scales and minima of groups that are whole rows; int4 with two codes in a byte, as ours."""
    floats = block.float()
    low, high = floats.amin(-1, keepdim=True), floats.amax(-1, keepdim=True)
    scale = ((high - low) / levels).clamp_min(1e-30)
    codes = ((floats - low) / scale).round().to(torch.uint8)
    if levels == 15:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | codes[..., half:] << 4
    return codes, scale, low


def _blocks(tokens: int) -> Any:
    """The KV of real text as words of bfloat16: [blocks, layers, 2, heads, BLOCK, channels]."""
    import torch

    from kvstrata.demo import model as demo_model

    model, tokenizer = demo_model.load("bfloat16")
    text = "\n".join((ROOT / name).read_text("utf-8") for name in ("LICENSE", "docs/architecture.md"))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : tokens // BLOCK * BLOCK]
    with torch.inference_mode():
        layers = model(ids, use_cache=True).past_key_values.layers
        kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
        count, two, heads, length, channels = kv.shape
        kv = kv.reshape(count, two, heads, length // BLOCK, BLOCK, channels).permute(3, 0, 1, 2, 4, 5)
        torch.set_num_threads(1)
        return kv.contiguous().view(torch.int16).numpy().view(np.uint16)
