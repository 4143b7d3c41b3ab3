"""What a transformers model's KV depends on, and which models can't be represented."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import blake3
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvstrata.errors import UnsupportedModel
from kvstrata.integrations._transformers_cache import cache_of_output
from kvstrata.keys import DEFAULT_BLOCK_TOKENS, KVLayout

__all__ = ["adapter_state", "layout_of", "weights_changed", "weights_identity"]

_CONFIG_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
_ROPE_OF_LENGTH = ("dynamic", "longrope")
_LAYER_TYPES = {"attention", "full_attention", "sliding_attention"}
_IDENTITY = "_kvstrata_identity"

_KV = list[tuple[torch.Tensor, torch.Tensor]]
_PADDING = 6
"""Tokens before a padded probe: positions so far away differ clearly also where the model learned them smoothly."""


def layout_of(model: Any, *, salt: bytes = b"", block_tokens: int = DEFAULT_BLOCK_TOKENS) -> KVLayout:
    """Return the KVLayout of `model` as it stands, adapters included.

    Runs three forward passes of a few tokens, to see the shapes of the KV instead of guessing them.
    Raises UnsupportedModel with the reason where a row of keys and values for each token, the same
    whatever follows and however much padding precedes, isn't all that the model keeps.
    """
    config = _refuse_by_config(model)
    first, second = _probe(model, [[1, 2]]), _probe(model, [[1, 0]])
    for index, ((keys, values), (other_keys, other_values)) in enumerate(zip(first, second, strict=True)):
        if keys.shape != values.shape or keys.shape != first[0][0].shape or keys.dtype != first[0][0].dtype:
            raise UnsupportedModel(
                f"layer {index} keeps keys {tuple(keys.shape)} and values {tuple(values.shape)} of "
                f"{keys.dtype}; all layers must keep keys and values of one shape and dtype"
            )
        for ours, theirs in ((keys, other_keys), (values, other_values)):
            if not torch.allclose(ours[:, :, 0].float(), theirs[:, :, 0].float(), rtol=0.05, atol=0.05):
                raise UnsupportedModel(
                    f"the KV of a token in layer {index} depends on the tokens after it "
                    "(attention isn't causal), so a prefix can't be reused"
                )
    _refuse_other_positions(model, first)
    _, heads, _, head_dim = first[0][0].shape
    return KVLayout(
        model=f"{type(_base(model)).__name__}:{weights_identity(model)}",
        dtype=str(first[0][0].dtype).removeprefix("torch."),
        layers=len(first),
        kv_heads=heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        attention=str(config._attn_implementation),
        rope=json.dumps(_rope(config), sort_keys=True, default=str),
        adapter=adapter_state(model),
        salt=salt,
    )


def weights_identity(model: Any) -> str:
    """Return a hex BLAKE3 over the model's parameters, buffers, module classes and configuration.

    It is of the content: a copy of the same weights elsewhere has the same identity. Kept on the
    model, and computed again when a parameter was replaced or written to.
    """
    kept = getattr(model, _IDENTITY, None)
    if kept is not None and not weights_changed(model):
        return str(kept[0])
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if torch.is_tensor(tensor)}
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
    digest.update(json.dumps(_config_of(_base(model)), sort_keys=True, default=str).encode())
    digest.update(json.dumps(sorted({type(module).__qualname__ for module in model.modules()})).encode())
    seen: dict[int, str] = {}
    for name in sorted(state):
        tensor = state[name].detach()
        first = seen.setdefault(id(state[name]), name)
        if first != name:  # tied: digest it once
            digest.update(f"\0{name}\0={first}\0".encode())
            continue
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    tensors = list(state.values())
    object.__setattr__(model, _IDENTITY, (digest.hexdigest(), tensors, _versions(tensors)))
    return digest.hexdigest()


def weights_changed(model: Any) -> bool:
    """Tell whether a parameter was moved or written to since its identity was taken.

    Cheap enough for every request. It can't see writes through `.data`, nor a module put in the
    place of another: after such surgery make a new PrefixReuse.
    """
    kept = getattr(model, _IDENTITY, None)
    return kept is None or kept[2] != _versions(kept[1])


def adapter_state(model: Any) -> str:
    """Return which PEFT adapters act on the model, canonically; "" for none."""
    if not (getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")):
        return ""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModel(f"adapter {name!r} writes into the KV cache itself (prompt learning)")
    states = sorted(
        {
            (tuple(module.active_adapters), tuple(module.merged_adapters), bool(module.disable_adapters),
             tuple(sorted((name, float(scale)) for name, scale in getattr(module, "scaling", {}).items())))
            for module in model.modules()
            if isinstance(module, BaseTunerLayer)
        }
    )  # fmt: skip
    return json.dumps(states)


def _refuse_by_config(model: Any) -> Any:
    """Raise UnsupportedModel for what can be seen without running the model; returns the decoder's config."""
    base = _base(model)
    if not isinstance(base, PreTrainedModel) or not hasattr(base, "generate"):
        raise UnsupportedModel(f"{type(model).__name__} is no transformers model that generates")
    if base.config.is_encoder_decoder:
        raise UnsupportedModel("encoder-decoder models keep a second cache, of the encoder's input")
    if base.training:
        raise UnsupportedModel("the model is in training mode (dropout may change the KV); call model.eval()")
    kind: Any = type(base)
    if not kind._supports_default_dynamic_cache():
        raise UnsupportedModel(f"{type(base).__name__} keeps its state in a cache of its own kind")
    devices = {parameter.device for parameter in base.parameters()}
    if any(device.type == "meta" for device in devices):
        raise UnsupportedModel("some parameters are offloaded, so the weights can't be identified")
    if len(devices) > 1:
        raise UnsupportedModel(f"the model is spread over {', '.join(sorted(map(str, devices)))}")
    if (getattr(base, "_tp_size", None) or 1) > 1:
        raise UnsupportedModel("tensor-parallel models are not supported by this integration yet")
    config = base.config.get_text_config(decoder=True)
    if config is not base.config:
        raise UnsupportedModel("multimodal models: the KV depends on inputs that are not in the token ids")
    if not getattr(config, "is_causal", True):
        raise UnsupportedModel("attention isn't causal, so the KV of a prefix depends on what follows")
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise UnsupportedModel(f"layers of the kind {', '.join(sorted(other))}: their KV isn't a row for each token")
    for name, rope in _rope(config).items():
        parts = [rope, *rope.values()] if isinstance(rope, dict) else [rope]  # of all layers, or by the layers' types
        for part in parts:
            kind = part.get("rope_type", part.get("type")) if isinstance(part, dict) else part
            if kind in _ROPE_OF_LENGTH:
                raise UnsupportedModel(f"{name}: {kind!r} scaling makes KV depend on the whole length")
    return config


def _refuse_other_positions(model: Any, alone: _KV) -> None:
    """Raise UnsupportedModel where the tokens that gave `alone` get other KV from `generate`, or behind padding.

    Prefixes are computed by bare passes, too, and a padded prompt shares blocks with the same one without padding.
    """
    pads = [0] * _PADDING
    inputs: dict[str, Any] = {"attention_mask": [[1] * (2 + _PADDING), [*pads, 1, 1]]}
    if "position_ids" in inspect.signature(_base(model).forward).parameters:  # as `generate` gives them
        inputs["position_ids"] = [[*range(2 + _PADDING)], [*pads, 0, 1]]
    layers = _probe(model, [[1, 2, *pads], [*pads, 1, 2]], **inputs)
    # Positions show in the first layer, sight of padding in the second; further on rounding adds up.
    for ours, theirs in zip(alone[:2], layers[:2], strict=True):
        for one, both in zip(ours, theirs, strict=True):
            if _differ(one[0], both[0, :, :2]):
                raise UnsupportedModel(
                    "the model numbers positions otherwise when it isn't told them than `generate` does, "
                    "so KV computed ahead of `generate` is not its own"
                )
            if _differ(one[0], both[1, :, -2:]):
                raise UnsupportedModel(
                    "padding before a token changes its KV (it counts as positions, or is seen), so prompts of a batch "
                    "can't share prefixes"
                )


def _differ(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two KV are further apart than passes of other shapes make them, by the largest value."""
    ours, theirs = ours.float(), theirs.float()
    return not bool((ours - theirs).abs().max() <= 0.03 * ours.abs().max())


def _probe(model: Any, tokens: Sequence[Sequence[int]], **inputs: Any) -> _KV:
    """Run rows of `tokens` and return each layer's keys and values, [rows, kv_heads, tokens, head_dim]."""
    given = {name: torch.tensor(value, device=_base(model).device) for name, value in inputs.items()}
    with torch.no_grad():
        output = model(input_ids=torch.tensor(tokens, device=_base(model).device), use_cache=True, **given)
    cache = cache_of_output(output)
    if not isinstance(cache, DynamicCache):
        raise UnsupportedModel(f"the model keeps a {type(cache).__name__}, not one row of KV for each token")
    layers: list[Any] = cache.layers
    if not layers:
        raise UnsupportedModel("the model keeps no KV")
    for index, layer in enumerate(layers):
        # A sliding window only leaves out what its mask hides anyway: all the same, a row for each token serves it.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise UnsupportedModel(
                f"layer {index} keeps a {type(layer).__name__} (recurrent, shared or compressed state), "
                "not one row of keys and values for each token"
            )
        if layer.keys.shape[-2] != len(tokens[0]):
            raise UnsupportedModel(f"layer {index} has a sliding window of less than {len(tokens[0]) + 1} tokens")
    return [(layer.keys, layer.values) for layer in layers]


def _rope(config: Any) -> dict[str, Any]:
    """Every setting of rotary or other position embeddings in `config`."""
    names = (
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "position_embedding_type",
    )
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def _config_of(base: Any) -> dict[str, Any]:
    """The configuration, less what doesn't change the KV."""
    config = {key: value for key, value in base.config.to_dict().items() if key not in _CONFIG_WITHOUT_EFFECT}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "gguf":
        del config["quantization_config"]  # names a file; what it led to is in the parameters and classes
    return config


def _base(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def _versions(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Where each tensor lies and how often it was written to (0 for inference tensors)."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
