"""Models and calls whose cache can't be represented are refused with the reason, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import transformers
from support.tiny_models import PROMPT, make, tiny
from transformers.cache_utils import DynamicCache

import kvstrata
from kvstrata.errors import ConfigError, UnsupportedModel
from kvstrata.integrations import _transformers_request
from kvstrata.integrations._transformers_load import load_model
from kvstrata.integrations._transformers_request import _HARMLESS_OPTIONS, _OPTIONS
from kvstrata.integrations.transformers import PrefixReuse

pytestmark = pytest.mark.usefixtures("one_thread")

BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "is_encoder_decoder": False}
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.fixture
def model() -> Any:
    return tiny()


@pytest.mark.parametrize(
    ("kind", "suffix", "changes", "reason"),
    [
        ("Mistral", "ForCausalLM", {"sliding_window": 2}, "sliding window"),
        ("Lfm2", "ForCausalLM", {"layer_types": ["conv", "full_attention"]}, "conv"),
        ("Mamba", "ForCausalLM", {"num_hidden_layers": 2}, "linear_attention"),
        ("T5", "ForConditionalGeneration", {"d_model": 32, "num_layers": 1}, "encoder-decoder"),
        ("Llama", "ForCausalLM", {"rope_parameters": DYNAMIC_ROPE}, "dynamic"),
        ("Llama", "Model", {}, "generates"),
        ("Bart", "ForCausalLM", BART, "padding"),
        ("Roberta", "ForCausalLM", {"is_decoder": True}, "positions"),
        ("Blenderbot", "ForCausalLM", {"num_hidden_layers": 0, **BART, "decoder_layers": 0}, "no KV"),
    ],
    ids=[
        "tiny-window", "convolution", "recurrent", "encoder-decoder", "dynamic-rope", "headless", "padding-counts",
        "own-positions", "no-layers",
    ],
)  # fmt: skip
def test_models_whose_cache_can_not_be_represented_are_refused(
    cache: kvstrata.Cache, kind: str, suffix: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        make(tiny(kind, suffix, **changes), cache)


def test_a_file_that_can_not_be_read_leaves_what_reads_such_files_as_it_was(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "broken.gguf").write_bytes(b"no such file")
    with pytest.raises((ValueError, OSError)):
        load_model(tmp_path / "broken.gguf", "float32")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_model_in_training_mode_is_refused_also_later(model: Any, cache: kvstrata.Cache) -> None:
    reuse = make(model, cache)
    model.train()
    with pytest.raises(UnsupportedModel, match="training"):
        reuse.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(UnsupportedModel, match="training"):
        make(model, cache)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"inputs": PROMPT[0]}, "input_ids"),
        ({"inputs": PROMPT[:, :0]}, "empty"),
        ({"inputs": None, "inputs_embeds": torch.zeros(1, 4, 32)}, "input_ids"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ({"attention_mask": torch.tensor([[1] * 90 + [0] * 10])}, "pad on the left"),
        ({"attention_mask": torch.tensor([[1] * 50 + [0] + [1] * 49])}, "pad on the left"),
        ({"attention_mask": torch.tensor([[0] * 100])}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 99)}, "attention_mask"),
        ({"inputs": torch.tensor([[5, 6, 0, 7]])}, "attention_mask"),
        ({"pixel_values": torch.zeros(1)}, "pixel_values"),
        ({"num_beams": 2, "session": "one"}, "session"),
        ({"inputs": PROMPT.repeat(2, 1), "session": "one"}, "session"),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"use_mtp": True}, "use_mtp"),
        ({"is_assistant": True}, "is_assistant"),
        ({"output_attentions": True}, "output_attentions"),
        ({"generation_config": transformers.GenerationConfig(dola_layers="high")}, "dola_layers"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"cache": DynamicCache()}, "cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_that_can_not_be_represented_are_refused(
    model: Any, cache: kvstrata.Cache, options: dict[str, Any], reason: str
) -> None:
    reuse = make(model, cache)
    with pytest.raises(UnsupportedModel, match=reason):
        reuse.generate(**{"inputs": PROMPT, "max_new_tokens": 2, **options})
    assert reuse.stats()["requests"] == 0


def test_every_option_of_generation_is_known() -> None:
    options = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert options - _HARMLESS_OPTIONS - _OPTIONS.keys() == set()


def test_an_option_that_is_not_known_must_be_at_its_default(
    model: Any, cache: kvstrata.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reuse = make(model, cache)
    monkeypatch.setattr(_transformers_request, "_HARMLESS_OPTIONS", _HARMLESS_OPTIONS - {"top_k", "min_p"})
    reuse.generate(PROMPT, max_new_tokens=2, top_k=50)
    with pytest.raises(UnsupportedModel, match=r"min_p=0\.5: kvstrata doesn't know"):
        reuse.generate(PROMPT, max_new_tokens=2, min_p=0.5)


def test_what_is_no_cache_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="a path, a Cache or a Namespace"):
        PrefixReuse(model, 7)  # type: ignore[arg-type]
