"""Tokens to text while they come: whole characters only, and nothing that may be the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_HALF = "\ufffd"  # what the bytes of an unfinished character decode to


class TextStream:
    """The text of an answer. What is given out never has to be taken back."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._start = self._read = (
            0  # tokens before `_read` have been decoded; those from `_start` on say with what before
        )
        self._held = ""
        self.stopped = False
        """Whether a stop text came. Nothing comes after it."""

    def push(self, token: int) -> str:
        """Take a token and return what can be given out now."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or after.endswith(_HALF):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._give(after[len(before) :], last=False)

    def finish(self) -> str:
        """Return the rest."""
        before = self._decode(self._tokens[self._start : self._read])
        return self._give(self._decode(self._tokens[self._start :])[len(before) :], last=True)

    def _give(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
