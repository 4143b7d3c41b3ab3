"""One model, one thread that generates with it, and a bounded number of requests that wait for it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from kvstrata.integrations.transformers import PrefixReuse, ReuseStats
from kvstrata.serve.problems import Problem
from kvstrata.serve.text import TextStream

__all__ = ["Answer", "Delta", "Engine", "Job"]

_LOG = logging.getLogger("kvstrata.serve")


@dataclass(frozen=True)
class Job:
    """What is to be generated. temperature 0 is greedy; a seed makes sampling repeatable."""

    tokens: list[int]
    most_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stops: list[str] = field(default_factory=list)
    session: str | None = None


@dataclass(frozen=True)
class Delta:
    """Some more text."""

    text: str


@dataclass(frozen=True)
class Answer:
    """The end of an answer. finish: "stop" or "length". reuse: what the cache did for it."""

    finish: str
    completion_tokens: int
    reuse: ReuseStats


_Event = Delta | Answer | Problem


class Engine:
    """Generates for one request at a time, in the order in which they came; `queue` more may wait."""

    def __init__(self, reuse: PrefixReuse, tokenizer: Any, queue: int) -> None:
        self.reuse = reuse
        self.tokenizer = tokenizer
        self._queue = queue
        self._pending = 0
        self._seconds = 1.0  # that a request takes, by the last ones
        self._thread = ThreadPoolExecutor(1, "kvstrata-generate")
        self._cancelled: set[threading.Event] = set()
        self.stopping = False
        torch.seed()  # else all workers draw the same

    @property
    def pending(self) -> int:
        """How many requests wait or are generated."""
        return self._pending

    async def run(self, job: Job) -> AsyncIterator[Delta | Answer]:
        """Give the answer in parts, its end last. Raises Problem; ending the iteration early cancels the request."""
        if self.stopping:
            raise Problem.stopping()
        if self._pending > self._queue:
            raise Problem.full(self._pending - 1, max(1, min(60, round(self._pending * self._seconds))))
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[_Event] = asyncio.Queue()
        cancelled = threading.Event()

        def tell(event: _Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._pending += 1  # until the thread is through with it, cancelled or not
        self._cancelled.add(cancelled)
        future = self._thread.submit(self._generate, job, cancelled, tell)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done, cancelled))
        try:
            while True:
                event = await events.get()
                if isinstance(event, Problem):
                    raise event
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            cancelled.set()
            future.cancel()  # where it has begun, it ends at the next token

    def close(self) -> None:
        """Cancel what is left, and wait for the thread."""
        self.stopping = True
        for cancelled in list(self._cancelled):
            cancelled.set()
        self._thread.shutdown(cancel_futures=True)

    def _done(self, cancelled: threading.Event) -> None:
        self._pending -= 1
        self._cancelled.discard(cancelled)

    def _generate(self, job: Job, cancelled: threading.Event, tell: Callable[[_Event], None]) -> None:
        """Generate, in the engine's thread."""
        if cancelled.is_set():
            tell(Problem.stopping())
            return
        began = time.perf_counter()
        try:
            tell(self._answer(job, cancelled, lambda text: tell(Delta(text))))
        except Exception:  # noqa: BLE001 - the thread has to go on for the others; it is logged
            _LOG.exception("a request failed")
            tell(Problem.internal())
        self._seconds += 0.2 * (time.perf_counter() - began - self._seconds)

    def _answer(self, job: Job, cancelled: threading.Event, say: Callable[[str], None]) -> Answer:
        text = TextStream(self.tokenizer, job.stops)
        watch = _Watch(text, cancelled, say)
        options: dict[str, Any] = {"do_sample": job.temperature > 0, "max_new_tokens": job.most_tokens}
        if job.temperature > 0:
            # The model's own defaults of these don't count: a request says what it wants.
            options |= {"temperature": job.temperature, "top_p": job.top_p, "top_k": job.top_k or 0}
        if job.seed is not None:
            torch.manual_seed(job.seed)
        prompt = torch.tensor([job.tokens])
        output = self.reuse.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            stopping_criteria=StoppingCriteriaList([watch]),
            session=job.session,
            **options,
        )
        reuse = self.reuse.last
        assert reuse is not None
        new = output.shape[1] - len(job.tokens)
        if rest := text.finish():
            say(rest)
        ended = text.stopped or int(output[0, -1]) in _ends(self.reuse.model)
        return Answer("stop" if ended or new < job.most_tokens else "length", new, reuse)


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Sees each token as soon as it is chosen: passes its text on, and stops where there is reason to."""

    def __init__(self, text: TextStream, cancelled: threading.Event, say: Callable[[str], None]) -> None:
        self._text = text
        self._cancelled = cancelled
        self._say = say

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return whether to stop, [1]."""
        new = self._text.push(int(input_ids[0, -1]))
        if new:
            self._say(new)
        return torch.tensor([self._text.stopped or self._cancelled.is_set()], device=input_ids.device)


def _ends(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}
