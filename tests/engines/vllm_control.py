"""Speaking to a vLLM engine in another process. The counterpart is `engines.vllm_engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.processes import Process

BLOCK = 32
KV_BYTES_PER_TOKEN = 46_080  # of SmolLM2 in fp32


class Engine:
    """Speaks to an `engines.vllm_engine.Engine` in another process."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return self.process.eval(f"engine.{name}(*args, **options)", args=args, options=options)

        return call

    def counted(self, *prompts: list[int], **options: Any) -> tuple[list[list[int]], dict[str, int]]:
        """The continuations of prompts, and what the connector counted for them."""
        before = self.counts()
        tokens = self.tokens(*prompts, **options)
        after = self.counts()
        return tokens, {name: after[name] - before.get(name, 0) for name in after}
