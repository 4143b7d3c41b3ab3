"""Reuse of prefixes around `model.generate` of Hugging Face transformers (5.x).

    reuse = PrefixReuse(model, "/var/cache/kv")
    output = reuse.generate(**inputs, max_new_tokens=32)      # as model.generate
    print(reuse.last)                                         # what was reused, from which tier

The longest cached prefix of the prompt is loaded instead of computed; the last token of the prompt is
always computed. After generation the new full blocks are stored. Trouble in the cache never fails a
request: it runs cold and is counted.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from kvstrata.cache import Cache
from kvstrata.config import parse_size
from kvstrata.errors import ConfigError, KVStrataError, MissingExtra, UnsupportedModel
from kvstrata.keys import DEFAULT_BLOCK_TOKENS, KVLayout
from kvstrata.namespace import Namespace
from kvstrata.prefix import LoadedKV, PrefixCache

try:
    import torch
    from transformers import GenerationConfig, GenerationMixin
except ImportError as error:
    raise MissingExtra("transformers", error.name or "transformers") from error

from kvstrata.integrations._transformers_cache import BufferPool, KVBuffer, cache_over
from kvstrata.integrations._transformers_model import adapter_state, layout_of, weights_changed

__all__ = ["FirstTokenTimer", "PrefixReuse", "ReuseStats", "layout_of"]

_CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
_UNKNOWN_LENGTH = 256
"""Room for new tokens where a request doesn't bound them."""

# Options of generation that need another cache than one row of KV for each token, and the values that don't.
_OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "use_cache": ((None, True), "without a cache there is nothing to reuse"),
    "num_beams": ((None, 1), "beam search reorders the cache"),
    "num_return_sequences": ((None, 1), "several sequences need a batch of caches"),
    "cache_implementation": ((None, "dynamic"), "it asks for another kind of cache"),
    "prompt_lookup_num_tokens": ((None,), "assisted decoding takes tokens back out of the cache"),
    "assistant_model": ((None,), "assisted decoding takes tokens back out of the cache"),
    "custom_generate": ((None,), "it may use the cache in any way"),
    "token_healing": ((None, False), "it changes the prompt"),
    "output_attentions": ((None, False), "a reused prefix has no attentions"),
    "output_hidden_states": ((None, False), "a reused prefix has no hidden states"),
}
_OWN_ARGUMENTS = {"cache", "past_key_values", "cache_params"}
_OPTIONS_OF_GENERATION = vars(GenerationConfig()).keys()  # type: ignore[no-untyped-call]
_HARMLESS_ARGUMENTS = _OPTIONS_OF_GENERATION | {
    "assistant_model", "attention_mask", "custom_generate", "generation_config", "logits_processor",
    "prefix_allowed_tokens_fn", "stopping_criteria", "streamer", "synced_gpus", "tokenizer",
    "use_model_defaults",
}  # fmt: skip


@dataclass(frozen=True)
class ReuseStats:
    """What one request reused. Times in seconds from the call of `generate`."""

    prompt_tokens: int
    reused_tokens: int
    loaded_bytes: int
    tier: str
    """The lowest tier read: "none", "memory" or "disk"."""
    ttft_s: float
    stored_blocks: int
    error: str = ""
    """Why the cache could not be used or filled; the request itself was served."""


class FirstTokenTimer:
    """A streamer that notes when the first new token was there, and passes everything on to `inner`."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner
        self.start = time.perf_counter()
        self.first: float | None = None
        self._prompt_seen = False

    @property
    def ttft_s(self) -> float:
        """Seconds from the making of this object to the first new token; to now if there was none."""
        return (self.first if self.first is not None else time.perf_counter()) - self.start

    def put(self, value: Any) -> None:
        """Take the prompt (first call) or new tokens from `generate`."""
        if self._prompt_seen and self.first is None:
            self.first = time.perf_counter()
        self._prompt_seen = True
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        """Take the end of generation from `generate`."""
        if self.inner is not None:
            self.inner.end()


class PrefixReuse:
    """`model.generate` that keeps and reuses the KV of prefixes in a kvstrata cache.

    cache: a path (opened with defaults, closed by `close`), an open Cache (a namespace of the
        layout's name is used in it), or a Namespace of the caller's (make it immutable=True).
    salt: a secret of the tenant; requests under different salts share nothing.
    store: False only reads.
    buffer: memory kept ready for the KV of one request, allocated now; larger requests allocate anew.

    Raises UnsupportedModel, with the reason, for a model or a request whose cache can't be
    represented. Requests may run in several threads as far as the model allows it.
    """

    def __init__(
        self,
        model: Any,
        cache: Cache | Namespace | str | os.PathLike[str],
        *,
        salt: str | bytes = b"",
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
        store: bool = True,
        buffer: int | str = "256MiB",
    ) -> None:
        self.model = model
        self.store = store
        self._salt = salt.encode() if isinstance(salt, str) else salt
        self._block_tokens = block_tokens
        self._buffer_bytes = parse_size(buffer, option="buffer")
        layout = layout_of(model, salt=self._salt, block_tokens=block_tokens)
        self._opened: Cache | None = None
        if isinstance(cache, str | os.PathLike):
            from kvstrata import open as open_cache

            cache = self._opened = open_cache(cache)
        if not isinstance(cache, Cache | Namespace):
            raise ConfigError(f"cache must be a path, a Cache or a Namespace, not {type(cache).__name__}")
        self._source = cache
        self._local = threading.local()
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(
            ("requests", "requests_reused", "prompt_tokens", "reused_tokens", "loaded_bytes",
             "stored_blocks", "load_errors", "store_errors"), 0
        )  # fmt: skip
        self._use(layout)

    @property
    def layout(self) -> KVLayout:
        """The layout that requests are stored under."""
        return self._layout

    @property
    def last(self) -> ReuseStats | None:
        """What this thread's latest request reused; None before the first."""
        return getattr(self._local, "last", None)

    def stats(self) -> dict[str, int]:
        """Return totals over all requests so far."""
        with self._lock:
            return dict(self._totals)

    def close(self) -> None:
        """Close the cache if this object opened it."""
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> PrefixReuse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Do what `model.generate` does, on one prompt [1, tokens], and return what it returns."""
        timer = FirstTokenTimer(kwargs.pop("streamer", None))
        ids = self._check_request(inputs, kwargs)
        self._refresh()
        prefixes, pool = self._prefixes, self._pool
        tokens = ids[0].cpu().numpy()
        room = len(tokens) + self._new_tokens(len(tokens), kwargs)
        # An output that isn't just tokens holds the cache, and the cache looks into the buffer.
        keep = bool(self._option("return_dict_in_generate", kwargs))
        buffer = pool.make(room) if keep else pool.take(room)
        try:
            loaded, error = self._load(prefixes, tokens, buffer)
            reused = loaded.tokens if loaded is not None else 0
            cache = cache_over(buffer, reused)
            output = self.model.generate(ids, streamer=timer, **{_CACHE_ARGUMENT: cache}, **kwargs)
            stored = 0
            if self.store:
                sequence = (output if torch.is_tensor(output) else output.sequences)[0]
                stored, store_error = self._store(prefixes, sequence, cache)
                error = error or store_error
        finally:
            if not keep:
                pool.give(buffer)
        self._note(
            ReuseStats(
                prompt_tokens=len(tokens),
                reused_tokens=reused,
                loaded_bytes=loaded.nbytes if loaded is not None else 0,
                tier=loaded.tier if loaded is not None else "none",
                ttft_s=timer.ttft_s,
                stored_blocks=stored,
                error=error,
            )
        )
        return output

    def _load(self, prefixes: PrefixCache, tokens: Any, buffer: KVBuffer) -> tuple[LoadedKV | None, str]:
        """Bring the longest cached prefix, short of the last token, into `buffer`."""
        try:
            match = prefixes.match(tokens[:-1])
            if not match.tokens:
                return None, ""
            loaded = match.load(out=buffer.host)
        except (KVStrataError, OSError) as error:
            self._count(load_errors=1)
            return None, f"load: {error}"
        buffer.loaded(loaded.tokens)
        return loaded, ""

    def _store(self, prefixes: PrefixCache, sequence: torch.Tensor, cache: Any) -> tuple[int, str]:
        """Store the new full blocks of everything whose KV was computed."""
        held = cache.get_seq_length()
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        try:
            return prefixes.store(sequence[:held].cpu().numpy(), layers), ""
        except (KVStrataError, OSError) as error:
            self._count(store_errors=1)
            return 0, f"store: {error}"

    def _check_request(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the prompt [1, tokens]; raises UnsupportedModel for a request that can't be represented."""
        ids = kwargs.pop("input_ids", None)
        ids = inputs if ids is None else ids
        if not torch.is_tensor(ids) or ids.ndim != 2 or ids.is_floating_point():
            raise UnsupportedModel("the prompt must be given as input_ids, a tensor [1, tokens] of integers")
        if ids.shape[0] != 1:
            raise UnsupportedModel(f"a batch of {ids.shape[0]} prompts: one prompt at a time for now")
        if ids.shape[1] == 0:
            raise UnsupportedModel("the prompt is empty")
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.shape != ids.shape or not bool((mask == 1).all())):
            raise UnsupportedModel("attention_mask hides or pads tokens; a prefix's KV would depend on it")
        for name, (allowed, reason) in _OPTIONS.items():
            value = self._option(name, kwargs)
            if not any(value is item or value == item for item in allowed):
                shown = value if isinstance(value, int | str) else type(value).__name__
                raise UnsupportedModel(f"{name}={shown!r}: {reason}")
        for name in kwargs:
            if name in _OWN_ARGUMENTS:
                raise UnsupportedModel(f"{name} is what this object provides; call model.generate for your own")
            if name not in _HARMLESS_ARGUMENTS:
                raise UnsupportedModel(f"the input {name!r} may change the KV, but isn't in the token ids")
        return ids

    def _new_tokens(self, prompt: int, kwargs: dict[str, Any]) -> int:
        """An upper bound, or a guess, of how many tokens will be generated after `prompt` tokens."""
        for name, less in (("max_new_tokens", 0), ("max_length", prompt)):
            value = self._option(name, kwargs)
            if value is not None:
                return max(1, int(value) - less)
        return _UNKNOWN_LENGTH

    def _option(self, name: str, kwargs: dict[str, Any]) -> Any:
        """The value that `generate` will use for an option of generation."""
        config = kwargs.get("generation_config") or self.model.generation_config
        return kwargs.get(name, getattr(config, name, None))

    def _refresh(self) -> None:
        """Follow a change of weights, adapters or attention: other KV, so other keys."""
        if (
            weights_changed(self.model)
            or adapter_state(self.model) != self._layout.adapter
            or str(self.model.config._attn_implementation) != self._layout.attention
            or self.model.training
        ):
            self._use(layout_of(self.model, salt=self._salt, block_tokens=self._block_tokens))

    def _use(self, layout: KVLayout) -> None:
        """Take up `layout`."""
        source = self._source
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        tokens = self._buffer_bytes // layout.token_bytes
        self._layout = layout
        self._prefixes = (
            PrefixCache(source, layout) if isinstance(source, Namespace) else PrefixCache.open(source, layout)
        )
        self._pool = BufferPool(layout, self.model.device, min(tokens, limit or tokens))

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount

    def _note(self, stats: ReuseStats) -> None:
        self._local.last = stats
        self._count(
            requests=1,
            requests_reused=int(stats.reused_tokens > 0),
            prompt_tokens=stats.prompt_tokens,
            reused_tokens=stats.reused_tokens,
            loaded_bytes=stats.loaded_bytes,
            stored_blocks=stats.stored_blocks,
        )
