"""A vLLM engine whose KV goes to an LMCache server, in a process of its own."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.platforms import current_platform

import engines.vllm_engine  # noqa: F401 - says how vLLM is to run, before that is imported
from engines.vllm_control import KV_BYTES_PER_TOKEN
from kvstrata.demo.texts import handbook

# vLLM looks through all modules for Triton's kernels, and fails at llvmlite's, which LMCache brings: so before it does.
current_platform.register_triton_kernel_overrides()
type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


class Engine:
    """An engine with SmolLM2 in fp32, in which equal prompts mean equal tokens; without a port, LMCache isn't used."""

    def __init__(self, model: str, port: int | None = None) -> None:
        connector = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }
        options: dict[str, Any] = {} if port is None else {"kv_transfer_config": connector}
        self.llm = vllm.LLM(
            model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=2048, seed=0,
            kv_cache_memory_bytes=4096 * KV_BYTES_PER_TOKEN, disable_log_stats=False, **options,
        )  # fmt: skip

    def tokens(self, length: int, question: str = "What follows from this?") -> list[int]:
        """The greedy continuation of the first tokens of the demo's document, and a question about them."""
        tokenizer = self.llm.get_tokenizer()
        document = tokenizer.encode(handbook())
        prompt: Any = {
            "prompt_token_ids": [*document[:length], *tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:")]
        }
        parameters = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        (output,) = self.llm.generate([prompt], parameters, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    def loaded_tokens(self) -> int:
        """How many tokens of prompts came from the connector so far."""
        metrics = self.llm.get_metrics()
        return int(sum(item.value for item in metrics if item.name == "vllm:external_prefix_cache_hits"))  # type: ignore
