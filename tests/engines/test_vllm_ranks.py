"""KVStrataConnector in an engine of several processes, each with a part of every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import Process

from engines.conftest import Start, make_random_model, need
from engines.vllm_control import BLOCK

need("vllm")

pytestmark = pytest.mark.timeout(600)


def test_each_tensor_parallel_rank_has_its_own_part_of_a_block(
    starting_vllm: Start, place: Path, with_vllm: Process
) -> None:
    # Whose heads can be split.
    tiny = make_random_model(with_vllm, place / "tiny", "LlamaForCausalLM", "LlamaConfig", num_hidden_layers=2)
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
