"""Small models with fixed weights, and what they generate with and without reuse."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from kvstrata.integrations.transformers import PrefixReuse

TINY: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PROMPT = torch.arange(3, 103).unsqueeze(0)


def tiny(kind: str = "Llama", suffix: str = "ForCausalLM", **changes: Any) -> Any:
    """A small model with random but fixed weights."""
    torch.manual_seed(0)
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**{**TINY, **changes})
    model = getattr(transformers, kind + suffix)(config).eval()
    if suffix != "Model":
        model.generation_config.eos_token_id = None
    return model


def plain(model: Any, prompt: Any, **options: Any) -> list[int]:
    """What the model generates by itself."""
    return model.generate(prompt, do_sample=False, **options)[0].tolist()  # type: ignore[no-any-return]


def reusing(reuse: PrefixReuse, prompt: Any, **options: Any) -> list[int]:
    return reuse.generate(prompt, do_sample=False, **options)[0].tolist()  # type: ignore[no-any-return]


def make(model: Any, cache: Any, **options: Any) -> PrefixReuse:
    return PrefixReuse(model, cache, **{"block_tokens": 8, "buffer": "1MiB", **options})
