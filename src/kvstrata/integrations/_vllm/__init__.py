"""The parts of the plug-ins for vLLM: `kvstrata.integrations.vllm` and `vllm_tier` are what users name."""
