"""Answers in the form of OpenAI's API."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from kvstrata.serve.engine import Answer

__all__ = ["Shape"]


@dataclass(frozen=True)
class Shape:
    """What one answer looks like: a chat's or a completion's, whole or in chunks."""

    chat: bool
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {
            "index": 0,
            **(said if self.chat else {"text": text}),
            "logprobs": None,
            "finish_reason": answer.finish,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}

    def first(self) -> dict[str, Any] | None:
        """The chunk that comes before any text."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.chat else None

    def part(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk({"content": text} if self.chat else text, None)

    def last(self, answer: Answer) -> dict[str, Any]:
        """The chunk that says why the text ended."""
        return self._chunk({} if self.chat else "", answer.finish)

    def account(self, answer: Answer) -> dict[str, Any]:
        """The chunk with the usage, where it was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)}

    def _chunk(self, delta: Any, finish: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}", "object": kind if self.chat else "text_completion", "created": self.created,
            "model": self.model,
        }  # fmt: skip


def usage(answer: Answer) -> dict[str, Any]:
    """Tokens of prompt and answer; cached_tokens are those of the prompt that came from the cache."""
    prompt = answer.reuse.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": prompt + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.reuse.reused_tokens},
    }
