"""A vLLM engine whose KV goes to an LMCache server, in a process of its own."""

from __future__ import annotations

from vllm.platforms import current_platform

from engines import vllm_engine

# vLLM looks through all modules for Triton's kernels, and fails at llvmlite's, which LMCache brings: so before it does.
current_platform.register_triton_kernel_overrides()
type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


class Engine(vllm_engine.Engine):
    """An engine with SmolLM2 in fp32 over the server at a port."""

    def __init__(self, model: str, port: int) -> None:
        connector = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }
        super().__init__(model, kv_tokens=4096, kv_transfer_config=connector)

    def settle(self) -> None:
        """Do nothing: what is stored the server tells."""

    def loaded_tokens(self) -> int:
        """How many tokens of prompts came from the connector so far."""
        metrics = self.llm.get_metrics()
        return int(sum(item.value for item in metrics if item.name == "vllm:external_prefix_cache_hits"))  # type: ignore
