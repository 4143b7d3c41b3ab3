"""llama.cpp in a process of its own."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as native

from benchmarks.engines.model import tokens
from benchmarks.engines.processes import serve


class Child:
    """One context, with what `cache` names: a directory for kvstrata's, "ram" for llama_cpp's own, or nothing."""

    def __init__(self, model: str, *, cache: str = "", memory: str = "", disk: str = "") -> None:
        threads = len(os.sched_getaffinity(0))
        self._llm: Any = llama_cpp.Llama(
            model_path=model, n_ctx=8192, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, seed=1
        )
        self._states: Any = None
        self._cache: Any = None
        if cache == "ram":
            self._llm.set_cache(llama_cpp.LlamaRAMCache(8 << 30))
        elif cache:
            import kvstrata
            from kvstrata.integrations.llama_cpp import KVStrataCache

            self._cache = kvstrata.open(cache, memory=memory, disk=disk)
            self._states = KVStrataCache(self._llm, self._cache)
            self._llm.set_cache(self._states)

    def first_token(self, prefix: int, length: int, tail: int, *, forget: bool = True) -> dict[str, Any]:
        """From the call to the first token of a prompt: the prefix of that number, and 16 tokens more.

        With `forget` the context is empty before; else it has what the prompt before has left.
        """
        prompt = [*tokens(prefix, length), *tokens(-1 - tail, 16)]
        if forget:
            self._llm.reset()
        arrived: list[float] = []

        def note(input_ids: Any, scores: Any) -> Any:
            arrived.append(time.perf_counter())
            return scores

        noting = llama_cpp.LogitsProcessorList([note])
        started = time.perf_counter()
        self._llm.create_completion(prompt, max_tokens=1, temperature=0, logits_processor=noting)
        cached = self._states.reused_tokens if self._states is not None else -1
        return {"seconds": arrived[0] - started, "cached": cached}

    def set_state(self) -> float:
        """Have llama.cpp take the state that it has once more, from this process's own memory; returns the seconds."""
        context = self._llm._ctx.ctx
        size = native.llama_state_seq_get_size(context, 0)
        state = (ctypes.c_uint8 * size)()
        native.llama_state_seq_get_data(context, state, size, 0)
        started = time.perf_counter()
        if native.llama_state_seq_set_data(context, state, size, 0) != size:
            raise AssertionError("llama.cpp didn't take its own state")
        return time.perf_counter() - started

    def flush(self) -> None:
        """Wait until everything is on disk."""
        self._cache.flush()


if __name__ == "__main__":
    serve(Child)
