"""Reuse of prefixes around `model.generate` of Hugging Face transformers (5.x).

    reuse = PrefixReuse(model, "/var/cache/kv-transformers")
    output = reuse.generate(**inputs, max_new_tokens=32)      # as model.generate
    print(reuse.last)                                         # what was reused, from which tier

The longest cached prefix of each prompt is loaded instead of computed; the last token of a prompt is
always computed. After generation the new full blocks are stored. Trouble in the cache never fails a
request: it runs cold and is counted.

In a batch each prompt has a prefix of its own length, but `generate` wants one length for all. Where
prefixes end in different columns, the shorter ones are first computed up to the longest, each by itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
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
    import transformers  # noqa: F401
except ImportError as error:
    raise MissingExtra("transformers", error.name or "transformers") from error

from kvstrata.integrations._transformers_cache import (
    CACHE_ARGUMENT,
    BufferPool,
    KVBuffer,
    cache_of_row,
    cache_over,
    static_copy,
)
from kvstrata.integrations._transformers_model import adapter_state, layout_of, weights_changed
from kvstrata.integrations._transformers_request import Request, read_request

__all__ = ["FirstTokenTimer", "PrefixReuse", "ReuseStats", "layout_of"]


@dataclass(frozen=True)
class ReuseStats:
    """What one request reused, all its prompts together. Times in seconds from the call of `generate`."""

    prompt_tokens: int
    reused_tokens: int
    loaded_bytes: int
    tier: str
    """The lowest tier read: "none", "memory" or "disk"."""
    ttft_s: float
    """To the end where the tokens don't come one by one: beam search."""
    stored_blocks: int
    reused_by_prompt: tuple[int, ...]
    """Of `reused_tokens`, what each prompt of the batch had."""
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

    def generate(self, inputs: torch.Tensor | None = None, *, session: str | bytes | None = None, **kwargs: Any) -> Any:
        """Do what `model.generate` does, on prompts [prompts, tokens] padded on the left, and return what it returns.

        With the name of a `session`, one prompt goes on where the session was saved at the end of the last call with
        that name, in whichever process: no token that is in it is computed again. A prompt that doesn't begin like
        the session, edited meanwhile, say, reuses what is cached of it.
        """
        timer = FirstTokenTimer(kwargs.pop("streamer", None))
        request = read_request(self.model, inputs, kwargs)
        if session is not None and len(request.pads) * request.copies != 1:
            raise UnsupportedModel("a session goes on with one prompt and one sequence")
        self._refresh()
        prefixes, pool = self._prefixes, self._pool
        rows = len(request.pads)
        # An output that isn't just tokens holds the cache, and the cache looks into the buffer.
        buffer = pool.make(request.columns, rows) if request.keep else pool.take(request.columns, rows)
        try:
            loads = [self._load(prefixes, request, row, buffer, session) for row in range(rows)]
            reused = tuple(loaded.tokens if loaded is not None else 0 for loaded, _ in loads)
            cache: Any = cache_over(buffer, self._level(request, buffer, reused))
            if request.static:
                cache = static_copy(cache, request.columns, request.copies)
            elif request.copies > 1:
                cache.batch_repeat_interleave(request.copies)
            if not request.beams or timer.inner is not None:  # beam search takes no streamer, and says so
                kwargs["streamer"] = timer
            output = self.model.generate(request.ids, **{CACHE_ARGUMENT: cache}, **kwargs)
            stored = 0
            errors = [error for _, error in loads]
            if self.store:
                sequences = output if torch.is_tensor(output) else output.sequences
                for tokens, layers in _computed(request, sequences, cache):
                    count, error = self._store(prefixes, tokens, layers, session)
                    stored += count
                    errors.append(error)
        finally:
            if not request.keep:
                pool.give(buffer)
        found = [loaded for loaded, _ in loads if loaded is not None and loaded.tokens]
        self._note(
            ReuseStats(
                prompt_tokens=request.ids.numel() - sum(request.pads),
                reused_tokens=sum(reused),
                loaded_bytes=sum(loaded.nbytes for loaded in found),
                tier=min((loaded.tier for loaded in found), default="none"),  # "disk" before "memory"
                ttft_s=timer.ttft_s,
                stored_blocks=stored,
                reused_by_prompt=reused,
                error=next(filter(None, errors), ""),
            )
        )
        return output

    def _load(
        self, prefixes: PrefixCache, request: Request, row: int, buffer: KVBuffer, session: str | bytes | None
    ) -> tuple[LoadedKV | None, str]:
        """Bring the longest cached prefix of a prompt, short of its last token, into its row of `buffer`."""
        tokens, start = request.prompt(row)[:-1], request.pads[row]
        out = buffer.host[:, :, row, :, start:]
        loaded = None
        try:
            match = prefixes.match(tokens)
            saved = prefixes.resume(session) if session is not None else None
            if saved is not None and len(saved.tokens) > match.tokens and saved.begins(tokens):
                loaded = saved.load(out)
            elif match.tokens:
                loaded = match.load(out)
        except (KVStrataError, OSError) as error:
            self._count(load_errors=1)
            return None, f"load: {error}"
        if loaded is not None:
            buffer.loaded(row, start, start + loaded.tokens)
        return loaded, ""

    def _level(self, request: Request, buffer: KVBuffer, reused: tuple[int, ...]) -> int:
        """Bring all rows to the column at which the last of the loaded prefixes ends, and return that column."""
        ends = [pads + tokens for pads, tokens in zip(request.pads, reused, strict=True)]
        column = max(ends) if any(reused) else 0
        options: dict[str, Any] = {"use_cache": True}
        if column > min(ends) and self.model._supports_logits_to_keep():
            options["logits_to_keep"] = 1
        for row, end in enumerate(ends):
            buffer.tensor[:, :, row, :, : min(request.pads[row], column)] = (
                0  # hidden by the mask, but has to be finite
            )
            if end < column:
                part = cache_of_row(buffer, row, request.pads[row], reused[row])
                with torch.no_grad():
                    ids = request.ids[row : row + 1, end:column].to(self.model.device)
                    self.model(input_ids=ids, **{CACHE_ARGUMENT: part}, **options)
        return column

    def _store(
        self, prefixes: PrefixCache, tokens: Any, layers: list[tuple[Any, Any]], session: str | bytes | None
    ) -> tuple[int, str]:
        """Store the new full blocks of a sequence, and the session where there is one."""
        try:
            if session is not None:
                return prefixes.save_session(session, tokens, layers), ""
            return prefixes.store(tokens, layers), ""
        except (KVStrataError, OSError) as error:
            self._count(store_errors=1)
            return 0, f"store: {error}"

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


def _computed(
    request: Request, sequences: torch.Tensor, cache: Any
) -> Iterator[tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Give (tokens, layers) of each sequence whose KV was computed; layers are [kv_heads, tokens, head_dim].

    Beam search reorders the rows of the cache until the end, but of one prompt they all share its tokens.
    """
    held = int(cache.get_seq_length())
    for row in range(0, len(request.pads) * request.copies, request.copies if request.beams else 1):
        prompt = row // request.copies
        start = request.pads[prompt]
        tokens = request.prompt(prompt) if request.beams else request.generated(sequences[row], prompt, held)
        stop = start + len(tokens)
        yield (
            tokens,
            [(layer.keys[row, :, start:stop], layer.values[row, :, start:stop]) for layer in cache.layers],
        )
