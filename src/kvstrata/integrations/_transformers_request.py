"""What a call of `generate` asks for, and which calls can't be served over cached prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import GenerationConfig

from kvstrata.errors import UnsupportedModel

__all__ = ["Request", "read_request"]

_UNKNOWN_LENGTH = 256
"""Room for new tokens where a request doesn't bound them."""

# Options of generation that use the cache in other ways than to append to it, the values that don't, and the reason.
_OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "use_cache": ((None, True), "without a cache there is nothing to reuse"),
    "cache_implementation": (
        (None, "dynamic", "hybrid", "static"),
        "its cache can't start with a prefix; the dynamic and the static one can",
    ),
    "prompt_lookup_num_tokens": ((None,), "assisted decoding takes tokens back out of the cache"),
    "assistant_model": ((None,), "assisted decoding takes tokens back out of the cache"),
    "assistant_early_exit": ((None,), "assisted decoding takes tokens back out of the cache"),
    "use_mtp": ((None, False), "assisted decoding takes tokens back out of the cache"),
    "is_assistant": ((None, False), "assisted decoding takes tokens back out of the cache"),
    "custom_generate": ((None,), "it may use the cache in any way"),
    "penalty_alpha": ((None,), "contrastive search may use the cache in any way"),
    "dola_layers": ((None,), "DoLa needs the hidden states of the whole prompt"),
    "num_beam_groups": ((None, 1), "group beam search may use the cache in any way"),
    "constraints": ((None,), "constrained beam search may use the cache in any way"),
    "force_words_ids": ((None,), "constrained beam search may use the cache in any way"),
    "token_healing": ((None, False), "it changes the prompt"),
    "output_attentions": ((None, False), "a reused prefix has no attentions"),
    "output_hidden_states": ((None, False), "a reused prefix has no hidden states"),
}
if tuple(map(int, transformers.__version__.split(".", 2)[:2])) < (5, 21):
    _OPTIONS["prefill_chunk_size"] = (
        (None,),
        "before 5.21 transformers computes the whole prompt again behind the prefix; upgrade transformers",
    )

# Options that only choose tokens, end sequences, shape the output, or do nothing where a cache is given. Whatever
# else a GenerationConfig knows has to be at its default.
_HARMLESS_OPTIONS = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings",
    "do_sample", "num_beams", "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale", "watermarking_config",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
    "decoder_start_token_id", "compile_config", "disable_compile", "prefill_chunk_size",
    "cache_config", "max_cache_len",  # of caches that `generate` makes
    "continuous_batching_config",  # of `generate_batch`
    # of assisted decoding, which is refused:
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "max_matching_ngram_size",
    "diversity_penalty", "low_memory",  # of group beam and contrastive search
    "transformers_version",
}  # fmt: skip
_DEFAULTS = GenerationConfig._get_default_generation_params()
_OPTIONS_OF_GENERATION = {**_OPTIONS, **vars(GenerationConfig())}.keys()
_UNKNOWN_OPTION = "kvstrata doesn't know what it does to the cache"
_OWN_ARGUMENTS = {"cache", "past_key_values", "cache_params"}
_HARMLESS_ARGUMENTS = {
    "attention_mask", "generation_config", "logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria",
    "streamer", "synced_gpus", "tokenizer", "use_model_defaults",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The prompts [prompts, columns] of a call, padded on the left by `pads` tokens each, and what is made of them.

    copies: how many sequences `generate` makes of each prompt. beams: it reorders them while it goes.
    columns: room for prompt and new tokens. static: the caller wants a static cache.
    keep: the output holds the cache, which therefore has to stay.
    """

    ids: torch.Tensor
    pads: tuple[int, ...]
    copies: int
    beams: bool
    columns: int
    static: bool
    keep: bool
    pad_token: int | None

    def prompt(self, row: int) -> npt.NDArray[Any]:
        """The tokens of a prompt, without its padding."""
        tokens: npt.NDArray[Any] = self.ids[row, self.pads[row] :].cpu().numpy()
        return tokens

    def generated(self, sequence: torch.Tensor, row: int, held: int) -> npt.NDArray[Any]:
        """The tokens of a sequence made of prompt `row` whose KV is held, without the padding at both ends."""
        tokens: npt.NDArray[Any] = sequence[self.pads[row] : held].cpu().numpy()
        shortest = self.ids.shape[1] - self.pads[row]
        if self.pad_token is not None and len(self.pads) * self.copies > 1:
            kept = np.flatnonzero(tokens != self.pad_token)
            tokens = tokens[: max(shortest, int(kept[-1]) + 1 if kept.size else 0)]
        return tokens


def read_request(model: Any, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Request:
    """Read the arguments of `model.generate`; raises UnsupportedModel for a call that can't be represented.

    Leaves in `kwargs` what goes on to `generate`, besides the ids and the cache.
    """
    ids = kwargs.pop("input_ids", None)
    ids = inputs if ids is None else ids
    if not torch.is_tensor(ids) or ids.ndim != 2 or ids.is_floating_point():
        raise UnsupportedModel("the prompts must be given as input_ids, a tensor [prompts, tokens] of integers")
    if 0 in ids.shape:
        raise UnsupportedModel("the prompt is empty")

    def option(name: str) -> Any:
        config = kwargs.get("generation_config") or model.generation_config
        value = kwargs.get(name)
        value = getattr(config, name, None) if value is None else value
        return getattr(model.generation_config, name, None) if value is None else value

    for name in _OPTIONS_OF_GENERATION:
        if name[0] == "_" or (name in _HARMLESS_OPTIONS and name not in _OPTIONS):
            continue
        allowed, reason = _OPTIONS.get(name, ((None, _DEFAULTS.get(name)), _UNKNOWN_OPTION))
        value = option(name)
        if not any(value is item or value == item for item in allowed):
            shown = value if isinstance(value, int | float | str) else type(value).__name__
            raise UnsupportedModel(f"{name}={shown!r}: {reason}")
    for name in kwargs:
        if name in _OWN_ARGUMENTS:
            raise UnsupportedModel(f"{name} is what this object provides; call model.generate for your own")
        if name not in _OPTIONS_OF_GENERATION and name not in _HARMLESS_ARGUMENTS:
            raise UnsupportedModel(f"the input {name!r} may change the KV, but isn't in the token ids")
    static = option("cache_implementation") == "static"
    if option("cache_implementation") is not None:
        kwargs["cache_implementation"] = None  # it gets a cache, and must not make one
    length = ids.shape[1]
    bounds = (option("max_new_tokens"), option("max_length"))
    new = int(bounds[0]) if bounds[0] is not None else int(bounds[1]) - length if bounds[1] is not None else None
    beams = int(option("num_beams") or 1)
    return Request(
        ids=ids,
        pads=_pads(ids, kwargs.get("attention_mask"), option("pad_token_id"), option("eos_token_id")),
        copies=max(beams, int(option("num_return_sequences") or 1)),
        beams=beams > 1,
        columns=length + (_UNKNOWN_LENGTH if new is None else max(1, new)),
        static=static,
        keep=bool(option("return_dict_in_generate")),
        pad_token=option("pad_token_id"),
    )


def _pads(ids: torch.Tensor, mask: Any, pad: Any, eos: Any) -> tuple[int, ...]:
    """How many tokens on the left of each prompt are padding; any other mask is refused.

    Without a mask, `generate` takes all padding tokens for hidden ones unless they end sequences, too.
    """
    if mask is None:
        ends = eos if isinstance(eos, list | tuple) else [eos]
        mask = torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise UnsupportedModel(f"attention_mask must be {tuple(ids.shape)}, of zeros and ones")
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise UnsupportedModel(
            "attention_mask hides tokens behind the first visible one, and a prefix's KV would depend on that; "
            "pad on the left (padding_side='left')"
        )
    if not bool(mask[:, -1].all()):
        raise UnsupportedModel("attention_mask hides a whole prompt")
    return tuple(int(pads) for pads in (mask == 0).sum(dim=1))
