"""What the KV in vLLM's blocks depends on besides a request: weights, settings, and how a backend lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blake3

from kvstrata.cache import Cache
from kvstrata.errors import ConfigError

__all__ = ["LAYOUT_VERSION", "model_facts", "settings_of", "weights_identity", "weights_of"]

LAYOUT_VERSION = 1
"""Raised whenever the bytes of a block change meaning."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SETTINGS = ("config.json", "params.json")
_CONFIG_WITHOUT_EFFECT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


def model_facts(vllm_config: Any, weights: str) -> dict[str, object]:
    """Return what the KV of all layers depends on; `weights` identifies these."""
    import vllm

    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in _CONFIG_WITHOUT_EFFECT}
    speculative = vllm_config.speculative_config
    fitted = model.original_max_model_len == -1  # to the memory, once the model was made for its greatest length
    return {
        "layout version": LAYOUT_VERSION,
        "vllm": vllm.__version__,  # may lay out, or compute, in another way
        "weights": weights,
        "config": json.dumps(config, sort_keys=True, default=str),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "max model len": "auto" if fitted else model.max_model_len,  # LongRoPE's factors and others' scales hang on it
        "kv dtype": cache.cache_dtype,
        "draft": speculative and speculative.model,
        "tp size": parallel.tensor_parallel_size,
        "pp size": parallel.pipeline_parallel_size,
        "dcp size": parallel.decode_context_parallel_size,
        "pcp size": parallel.prefill_context_parallel_size,
    }


def weights_identity(cache: Cache, vllm_config: Any) -> str:
    """Return a digest of the files of a model's weights; raises ConfigError where there are none."""
    model = vllm_config.model_config
    if vllm_config.load_config.load_format == "dummy":
        return f"dummy {model.seed}"
    return weights_of(cache, model.model, model.revision)


def weights_of(cache: Cache, name: str, revision: str | None = None) -> str:
    """Return a digest of the files of the weights in a directory, or of that name on the hub: of their content alone.

    Files that say how weights are quantized are among them. The cache remembers it by the files' sizes and times, so
    that they are read once. Raises ConfigError where it isn't certain which files they are.
    """
    files = _weight_files(name, revision)
    return blake3.blake3("".join(_file_digest(cache, file) for file in files).encode()).hexdigest()


def settings_of(name: str) -> str:
    """Return a digest of a model's configuration in a directory, or of that name on the hub; "" where there is none."""
    try:
        files = [file for file in _directory(name, None).iterdir() if file.name in _SETTINGS]
    except ConfigError:
        return ""
    return blake3.blake3(b"".join(file.read_bytes() for file in sorted(files))).hexdigest() if files else ""


def _weight_files(name: str, revision: str | None) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    found = sorted(_directory(name, revision).iterdir(), key=lambda file: file.name)
    if not any(file.suffix in _WEIGHTS for file in found):
        raise _nameless(name)
    return [file for file in found if file.suffix in _WEIGHTS or _tells_quantization(file)]


def _tells_quantization(file: Path) -> bool:
    """Whether a method may read its settings there: quantize_config.json, hf_quant_config.json and so on."""
    return file.suffix == ".json" and "quant" in file.name


def _directory(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    return path if path.is_dir() else _downloaded(name, revision)


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        raise _nameless(name) from None


def _nameless(model: str) -> ConfigError:
    return ConfigError(
        f"it isn't certain which files hold the weights of {model!r}, so its KV can't be told from another model's; "
        'give them a name that changes with them, among the options of kvstrata: "weights": "NAME"'
    )


def _file_digest(cache: Cache, file: Path) -> str:
    state = file.stat()
    ns = cache.namespace("vllm-weights", remote=False)
    key = blake3.blake3(f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ino}".encode()).digest()

    def digest() -> bytes:
        return blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(file).digest()

    return ns.get_or_compute(key, digest).hex()
