"""KVStrataConnector in an engine of several processes, each with a part of every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import Process

from engines.conftest import Start, need
from engines.vllm_control import BLOCK

need("vllm")

pytestmark = pytest.mark.timeout(600)


def test_each_tensor_parallel_rank_has_its_own_part_of_a_block(
    starting_vllm: Start, place: Path, with_vllm: Process
) -> None:
    tiny = make_model(place / "tiny", with_vllm)
    options = {"model": tiny, "skip_tokenizer_init": True, "kv_cache_memory_bytes": 4 << 20}
    pair, one = starting_vllm("ranks", tensor_parallel_size=2, **options), starting_vllm("ranks", **options)
    pair.process.finish()
    one.process.finish()
    prompt = list(range(10, 210))
    blocks = len(prompt) // BLOCK

    cold = pair.tokens(prompt)
    stored = pair.metrics("vllm:kvstrata_stored_blocks")["vllm:kvstrata_stored_blocks"]
    pair.forget()
    warm = pair.tokens(prompt)
    loaded = pair.metrics("vllm:kvstrata_loaded_blocks")["vllm:kvstrata_loaded_blocks"]
    alone, counted = one.counted(prompt)

    assert cold == warm == alone
    assert (stored, loaded) == (2 * blocks, 2 * blocks)
    assert counted["found_blocks"] == 0
    assert pair.process.exit() == 0
    assert one.process.exit() == 0


def make_model(path: Path, with_vllm: Process) -> str:
    """A model of random weights whose heads can be split."""
    with with_vllm.fork() as other:
        other.run(
            "import torch, transformers\ntorch.manual_seed(0)\n"
            "config = transformers.LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32,\n"
            "    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)\n"
            "transformers.LlamaForCausalLM(config).save_pretrained(path)",
            path=str(path),
        )
    return str(path)
