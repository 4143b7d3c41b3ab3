"""Measure in inference engines, print the table, write it down.

python -m benchmarks.engines [NAMES...] [--quick] [--markdown FILE] [--directory DIR]
"""

from __future__ import annotations

from benchmarks.running import command

PARTS = {
    "transformers": "benchmarks.engines.transformers_first_token",
    "llama.cpp": "benchmarks.engines.llama_first_token",
    "vllm-ttft": "benchmarks.engines.vllm_first_token",
    "vllm-load": "benchmarks.engines.vllm_load",
    "vllm-codecs": "benchmarks.engines.vllm_codecs",
}

if __name__ == "__main__":
    command(PARTS, "Measure kvstrata in inference engines.", title="Benchmarks in engines", target="bench-engines")
