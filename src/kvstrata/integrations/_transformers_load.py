"""Loading a model and its tokenizer from a directory or a GGUF file, offline."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kvstrata.errors import ConfigError, MissingExtra

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
    import transformers
except ImportError as error:
    raise MissingExtra("transformers", error.name or "transformers") from error

__all__ = ["load_model", "save_model"]


def load_model(path: str | os.PathLike[str], dtype: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) from a GGUF file or a directory, the model in evaluation mode.

    dtype: "float32" or "bfloat16". Raises ConfigError where there is neither.
    """
    place = Path(path)
    options: dict[str, Any] = {}
    if place.is_file() and place.suffix == ".gguf":
        options["gguf_file"] = place.name
        place = place.parent
    elif not (place / "config.json").is_file():
        raise ConfigError(f"{place} is neither a .gguf file nor a directory of a model (with a config.json)")
    quiet: Any = transformers.utils.logging
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()
    with _read_once() if "gguf_file" in options else nullcontext():
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), **options)
    return model.eval(), tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Keep what transformers asks the package gguf for again and again: two thirds of the time that a file takes."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:  # transformers says so
        yield
        return
    parts = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, part in parts.items():
            setattr(gguf, name, functools.cache(part))
        yield
    finally:
        for name, part in parts.items():
            setattr(gguf, name, part)


def save_model(model: Any, tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Write a model that was loaded from a GGUF file, for further processes to load in a second, not in fifteen."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
