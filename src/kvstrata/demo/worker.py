"""A process of the demonstration: loads the model once, then does what its standard input says.

Each further line of input is a JSON list [verb, ...]; each gets one line of JSON on the original standard output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kvstrata
from kvstrata.demo import model as demo_model
from kvstrata.demo.texts import FIRST_QUESTION
from kvstrata.integrations.transformers import FirstTokenTimer, PrefixReuse

__all__ = ["Worker", "main"]


class Worker:
    """One loaded model; every verb returns what JSON can carry."""

    def __init__(
        self,
        dtype: str,
        model: str | None,
        cache_path: str,
        memory: str,
        new_tokens: int,
        questions: Sequence[str],
        document: str,
    ) -> None:
        self._model, self._tokenizer = demo_model.load(dtype, model)
        self._path = cache_path
        self._questions = questions
        self._document = document
        self._memory = memory
        self._options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
        self._cache: kvstrata.Cache | None = None
        # What torch sets up at first use belongs to no run.
        self._model.generate(torch.arange(1, 65).unsqueeze(0), max_new_tokens=4, do_sample=False)

    def save(self, directory: str) -> None:
        """Write the model for further workers."""
        demo_model.save(self._model, self._tokenizer, directory)

    def cold(self) -> list[dict[str, Any]]:
        """Answer the questions without kvstrata."""
        answers = []
        for question in self._questions:
            inputs = self._prompt(question)
            timer = FirstTokenTimer()
            output = self._model.generate(**inputs, streamer=timer, **self._options)
            answers.append(self._answer(question, inputs, output, timer.ttft_s))
        return answers

    def fill(self) -> list[str]:
        """Open the cache, answer the first question, store its prefix; returns shared memory's files."""
        reuse = PrefixReuse(self._model, self._open())
        reuse.generate(**self._prompt(FIRST_QUESTION), **self._options)
        if reuse.last is None or reuse.last.error:
            raise RuntimeError(f"the prefix was not stored: {reuse.last}")
        maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
        return sorted({line.split(maxsplit=5)[-1] for line in maps if "/kvstrata-" in line})

    def warm(self) -> list[dict[str, Any]]:
        """Answer the questions with the cache open, storing nothing, so that every run finds the same."""
        reuse = PrefixReuse(self._model, self._open(), store=False)
        return [self._ask(reuse, question) for question in self._questions]

    def from_disk(self) -> list[dict[str, Any]]:
        """Answer each question with a newly opened cache, whose memory therefore is empty."""
        answers = []
        for question in self._questions:
            answers.append(self._ask(PrefixReuse(self._model, self._open(), store=False), question))
            self.close()
        return answers

    def close(self) -> None:
        """Close the cache; what was stored is then on disk."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _open(self) -> kvstrata.Cache:
        if self._cache is None:
            self._cache = kvstrata.open(self._path, memory=self._memory)
        return self._cache

    def _prompt(self, question: str) -> dict[str, Any]:
        return demo_model.prompt(self._tokenizer, question, self._document)

    def _ask(self, reuse: PrefixReuse, question: str) -> dict[str, Any]:
        inputs = self._prompt(question)
        output = reuse.generate(**inputs, **self._options)
        assert reuse.last is not None
        answer = self._answer(question, inputs, output, reuse.last.ttft_s)
        answer.update(
            reused_tokens=reuse.last.reused_tokens,
            loaded_bytes=reuse.last.loaded_bytes,
            tier=reuse.last.tier,
            error=reuse.last.error,
        )
        return answer

    def _answer(self, question: str, inputs: dict[str, Any], output: Any, ttft_s: float) -> dict[str, Any]:
        start = inputs["input_ids"].shape[1]
        tokens = output[0, start:].tolist()
        return {
            "question": question,
            "text": self._tokenizer.decode(tokens, skip_special_tokens=True),
            "tokens": tokens,
            "prompt_tokens": start,
            "ttft_s": ttft_s,
            "reused_tokens": 0,
            "loaded_bytes": 0,
            "tier": "none",
            "error": "",
        }


def main() -> None:
    """Serve until the input ends. Its first line: the JSON object of Worker's parameters."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not get between the replies
    worker = Worker(**json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, verb)(*arguments)), file=replies, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
