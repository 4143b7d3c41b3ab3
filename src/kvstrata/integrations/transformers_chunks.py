"""An experiment: reuse of chunks that are no prefix, such as documents in the order in which they were retrieved.

    chunks = ChunkReuse(model, cache, recompute=0.25)
    output = chunks.generate([instruction, document_b, document_a, question], max_new_tokens=32)

The KV of a chunk is computed once by itself, as if nothing stood before it, and stored as the prefix that it then is.
Where it is used, its keys are turned to their new place (rotary embeddings of a sum of positions are the product of
both), and a part of its tokens, the first ones, is computed again with everything before in view: those miss it most,
since a chunk's first tokens draw the attention of the others when nothing stands before them (EPIC: Hu et al., 2024,
arXiv:2410.15332; which tokens to compute again otherwise: CacheBlend, Yao et al., 2024, arXiv:2405.16444).

**Answers change**: the rest of a chunk has never seen what stands before it. docs/chunks.md has what that costs a small
model. Nothing else in kvstrata does this, and what is stored under it are true prefixes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvstrata.cache import Cache
from kvstrata.errors import ConfigError, InvalidValue, UnsupportedModel
from kvstrata.integrations._transformers_cache import CACHE_ARGUMENT, KVBuffer, cache_of_output, cache_over
from kvstrata.integrations.transformers import PrefixReuse

__all__ = ["ChunkReuse", "ChunkStats"]

_PROBED_AT = 37  # any place but 0


@dataclass(frozen=True)
class ChunkStats:
    """What one request was spared: of `prompt_tokens`, `computed_tokens` went through the model."""

    prompt_tokens: int
    computed_tokens: int


class ChunkReuse:
    """`model.generate` on a prompt of chunks, each of which may have been seen anywhere. An experiment: see above.

    cache: a path or an open Cache.
    recompute: which part of a chunk that isn't the first is computed again, from 0 to 1; with 1 nothing is reused but
        the first chunk, and the answer is the model's own.

    Raises UnsupportedModel for what PrefixReuse refuses, and for models whose keys aren't turned by rotary embeddings
    as Llama's are.
    """

    def __init__(
        self, model: Any, cache: Cache | str | os.PathLike[str], *, recompute: float = 0.25, **options: Any
    ) -> None:
        if not 0 <= recompute <= 1:
            raise ConfigError(f"recompute is a part from 0 to 1, not {recompute!r}")
        self._reuse = PrefixReuse(model, cache, **options)
        self._model = model
        self.recompute = recompute
        self.last: ChunkStats | None = None
        """What the latest request was spared."""
        self._check_keys()

    def close(self) -> None:
        """Close the cache if this object opened it."""
        self._reuse.close()

    def generate(self, chunks: Sequence[Any], **options: Any) -> Any:
        """Do what `model.generate` does on all chunks, one after the other, each a sequence or tensor of token ids.

        The last one, the question, is always computed. Raises InvalidValue for chunks without tokens.
        """
        buffer, computed, ids = self.prepare(chunks)
        held = cache_over(buffer, ids.shape[1] - 1)
        self.last = ChunkStats(ids.shape[1], computed + 1)
        return self._model.generate(ids, **{CACHE_ARGUMENT: held}, **options)

    def prepare(self, chunks: Sequence[Any]) -> tuple[KVBuffer, int, torch.Tensor]:
        """Fill a buffer with the KV of all tokens but the last.

        Returns it, how many tokens had to be computed for it, and all tokens [1, tokens].
        """
        parts = [torch.as_tensor(chunk, dtype=torch.long).reshape(-1) for chunk in chunks]
        if not parts or any(not len(part) for part in parts):
            raise InvalidValue("every chunk must have a token at least")
        ids = torch.cat(parts)
        self._reuse._refresh()
        buffer = KVBuffer(self._reuse.layout, len(ids) + 512, self._model.device)
        wanted, spent, start = torch.ones(len(ids) - 1, dtype=torch.bool), 0, 0
        with torch.inference_mode():
            for number, part in enumerate(parts[:-1]):
                known, new = self._placed(part, start, buffer)
                again = round(self.recompute * len(part)) if number else 0
                wanted[start + min(again, known) : start + known] = False
                spent += new
                start += len(part)
            self._compute(ids, wanted, buffer)
        return buffer, spent + int(wanted.sum()), ids[None]

    def _placed(self, part: torch.Tensor, start: int, buffer: KVBuffer) -> tuple[int, int]:
        """Bring the KV of a chunk to its place; returns of how many tokens, and how many were computed for it."""
        layout = self._reuse.layout
        full = len(part) // layout.block_tokens * layout.block_tokens
        prefixes = self._reuse._prefixes
        tokens = part[:full].tolist()
        match = prefixes.match(tokens)
        known = match.load(buffer.host[:, :, 0, :, start:]).tokens if match.tokens else 0
        buffer.loaded(0, start, start + known)
        if known < full:
            output = self._model(part[None, :full].to(self._model.device), **{CACHE_ARGUMENT: DynamicCache()})
            layers = cache_of_output(output).layers
            prefixes.store(tokens, [(layer.keys[0], layer.values[0]) for layer in layers])
            for own, layer in zip(buffer.tensor, layers, strict=True):
                own[0, 0, :, start : start + full] = layer.keys[0]
                own[1, 0, :, start : start + full] = layer.values[0]
        keys: torch.Tensor = buffer.tensor[:, 0, 0, :, start : start + full]
        keys.copy_(self._turned(keys, start))
        return full, full if known < full else 0

    def _compute(self, ids: torch.Tensor, wanted: torch.Tensor, buffer: KVBuffer) -> None:
        """Compute the KV of the tokens wanted, each with all before it in view, into their places."""
        places = wanted.nonzero()[:, 0].to(self._model.device)
        if not len(places):
            return
        tokens = len(wanted)
        hidden = places[:, None] < torch.arange(tokens, device=places.device)[None]
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=places.device)
        mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
        cache = DynamicCache()
        cache.layers = [_Scattered(layer[0], layer[1], places, tokens) for layer in buffer.tensor]
        options = {"logits_to_keep": 1} if self._model._supports_logits_to_keep() else {}
        self._model(
            ids[places.cpu()][None].to(places.device), attention_mask=mask[None, None], position_ids=places[None],
            **{CACHE_ARGUMENT: cache}, **options,
        )  # fmt: skip

    def _turned(self, keys: torch.Tensor, by: int) -> torch.Tensor:
        """Turn keys [..., head_dim] to places further on by so many."""
        if not by:
            return keys
        place = torch.tensor([[by]], device=keys.device)
        cos, sin = (part[0, 0].float() for part in self._rotary(torch.zeros(1, device=keys.device), position_ids=place))
        half = keys.shape[-1] // 2
        wide = keys.float()
        turned: torch.Tensor = wide * cos + torch.cat((-wide[..., half:], wide[..., :half]), -1) * sin
        return turned.to(keys.dtype)

    @property
    def _rotary(self) -> Any:
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        found = getattr(base.base_model, "rotary_emb", None)
        if found is None:
            raise UnsupportedModel(f"{type(base).__name__} has no rotary embeddings for all of its layers")
        return found

    def _check_keys(self) -> None:
        """See on the keys of the first layer, which depend on nothing before, whether turning them is all there is."""
        here, there = (self._first_keys(place) for place in (0, _PROBED_AT))
        if not torch.allclose(self._turned(here, _PROBED_AT).float(), there.float(), rtol=0.05, atol=0.05):
            raise UnsupportedModel("the keys of this model aren't turned by rotary embeddings as Llama's are")

    def _first_keys(self, place: int) -> torch.Tensor:
        device = self._model.device
        with torch.inference_mode():
            output = self._model(
                torch.tensor([[1]], device=device), position_ids=torch.tensor([[place]], device=device),
                **{CACHE_ARGUMENT: DynamicCache()},
            )  # fmt: skip
        keys: torch.Tensor = cache_of_output(output).layers[0].keys
        return keys


class _Scattered(DynamicLayer):  # type: ignore[misc]
    """A layer whose new keys and values go to given places among those that are there."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, tokens: int) -> None:
        """`keys` and `values` are [1, kv_heads, capacity, head_dim], of which `tokens` count."""
        super().__init__()
        self.keys, self.values = keys[:, :, :tokens], values[:, :, :tokens]
        self.device, self.dtype = keys.device, keys.dtype
        self.is_initialized = True
        self._places = places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [1, kv_heads, places, head_dim] there, and return all keys and values."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self._places] = key_states
        self.values[:, :, self._places] = value_states
        return self.keys, self.values
