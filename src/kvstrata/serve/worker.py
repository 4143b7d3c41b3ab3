"""What a worker process holds: the model, the cache, the engine and the metrics."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from kvstrata.integrations._transformers_load import load_model
from kvstrata.integrations.transformers import PrefixReuse
from kvstrata.opening import open as open_cache
from kvstrata.serve.engine import Engine
from kvstrata.serve.metrics import Metrics
from kvstrata.serve.problems import Problem
from kvstrata.serve.settings import ServeSettings

__all__ = ["Worker"]


class Worker:
    """Everything that lives as long as the process does."""

    def __init__(self, settings: ServeSettings) -> None:
        torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.workers))
        self.created = int(time.time())
        model, self.tokenizer = load_model(settings.model, settings.dtype)
        self._context: int = model.config.get_text_config(decoder=True).max_position_embeddings
        self._words: int = model.get_input_embeddings().num_embeddings
        self._cache = open_cache(settings.path, memory=settings.memory, disk=settings.disk)
        self.metrics = Metrics(self._cache)
        reuse = PrefixReuse(model, self._cache, block_tokens=settings.block_tokens)
        self.engine = Engine(reuse, self.tokenizer, settings.queue)

    def close(self) -> None:
        """Cancel what is generated, and close the cache, which brings what was stored to the disk."""
        self.engine.close()
        self._cache.close()

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Return a conversation as the model's chat template writes it; raises Problem where that isn't possible."""
        if not self.tokenizer.chat_template:
            raise Problem("this model has no chat template; use /v1/completions", code="no_chat_template")
        try:
            found: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # noqa: BLE001 - a template may raise anything about its messages
            raise Problem(f"the model's chat template refuses these messages: {error}", param="messages") from None
        return list(found["input_ids"])

    def prompt_tokens(self, prompt: str | list[int]) -> list[int]:
        """Return a prompt's tokens; raises Problem for tokens that the model doesn't have, and for none."""
        tokens = list(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        if not tokens:
            raise Problem("the prompt is empty", param="prompt")
        if max(tokens) >= self._words:
            raise Problem(f"the model has tokens from 0 to {self._words - 1}", param="prompt")
        return tokens

    def room_for(self, tokens: list[int]) -> int:
        """Return how many tokens fit behind a prompt; raises Problem where there is none."""
        room = self._context - len(tokens)
        if room < 1:
            raise Problem(
                f"the prompt has {len(tokens)} tokens, and the context {self._context}", code="context_length_exceeded"
            )
        return room
