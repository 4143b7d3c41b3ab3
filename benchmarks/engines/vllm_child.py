"""A vLLM engine in a process of its own."""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

import vllm

from benchmarks.engines.model import tokens
from benchmarks.engines.processes import serve


class Child:
    """One engine."""

    def __init__(self, model: str, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 8192,
            "max_num_batched_tokens": 8192, "seed": 0, "disable_log_stats": False,
        }  # fmt: skip
        self.llm = vllm.LLM(model, **defaults | options)

    def first_token(self, prefix: int, length: int, tail: int) -> dict[str, Any]:
        """From the call to the first token of a prompt: the prefix of that number, and 16 tokens more."""
        prompt = [*tokens(prefix, length), *tokens(-1 - tail, 16)]
        started = time.perf_counter()
        (output,) = self.llm.generate([{"prompt_token_ids": prompt}], _sampling(1), use_tqdm=False)
        return {"seconds": time.perf_counter() - started, "cached": output.num_cached_tokens}

    def answer(self, prompt: list[int], count: int) -> dict[str, Any]:
        """The greedy continuation of a prompt, after the seconds to its first token."""
        started = time.perf_counter()
        given: list[Any] = [{"prompt_token_ids": prompt}]
        self.llm.generate(given, _sampling(1), use_tqdm=False)
        seconds = time.perf_counter() - started
        (output,) = self.llm.generate(given, _sampling(count), use_tqdm=False)
        return {"seconds": seconds, "tokens": list(output.outputs[0].token_ids)}

    def forget(self) -> None:
        """Empty the engine's own prefix cache, once nothing is using it any more."""
        deadline = time.monotonic() + 30
        while not self.llm.reset_prefix_cache() and time.monotonic() < deadline:
            time.sleep(0.01)

    def unique(self, seed: int, requests: int, length: int, count: int) -> float:
        """Prompts that nobody has seen, all at once; returns the seconds for all."""
        prompts: list[Any] = [{"prompt_token_ids": tokens(seed * 1000 + i, length)} for i in range(requests)]
        started = time.perf_counter()
        self.llm.generate(prompts, _sampling(count), use_tqdm=False)
        return time.perf_counter() - started

    def turns(self, seed: int, users: int, turns: int, documents: int, length: int, at_once: int) -> dict[str, Any]:
        """Users who go on talking about documents, some of them at a time, in an order of chance."""
        chance = random.Random(seed)
        first_tokens = 100_000 * seed
        talks = [tokens(first_tokens + user % documents, length) for user in range(users)]
        first: list[float] = []
        recomputed = 0
        started = time.perf_counter()
        for turn in range(turns):
            order = chance.sample(range(users), users)
            for begin in range(0, users, at_once):
                some = order[begin : begin + at_once]
                for user in some:
                    talks[user] += tokens(first_tokens + 10_000 + turn * users + user, 48)
                given: list[Any] = [{"prompt_token_ids": list(talks[user])} for user in some]
                for user, output in zip(some, self.llm.generate(given, _sampling(32), use_tqdm=False), strict=True):
                    recomputed += len(talks[user]) - (output.num_cached_tokens or 0)
                    talks[user] += output.outputs[0].token_ids
                    assert output.metrics is not None
                    first.append(output.metrics.first_token_latency)
        return {"seconds": time.perf_counter() - started, "first": first, "recomputed": recomputed}


def _sampling(count: int) -> Any:
    return vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def main() -> None:
    """Be an engine until there is nothing more to do."""
    child = serve(Child)
    with contextlib.suppress(Exception):
        child.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
