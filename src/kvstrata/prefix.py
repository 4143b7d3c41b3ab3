"""PrefixCache: from the tokens of a prompt to the KV of its longest cached prefix, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.base import Codec, TensorInfo
from kvstrata.errors import InvalidValue, TierFull
from kvstrata.keys import KVLayout, block_tokens_array, prefix_keys
from kvstrata.movement.cost import Prefill
from kvstrata.movement.warm import Progress, Warmed
from kvstrata.prefix_blocks import Layers, Words, as_layers, fill_block, trailer_of
from kvstrata.prefix_layers import LayerLoad
from kvstrata.prefix_loading import LoadedKV, PrefixLoader, StoredHead, Tally
from kvstrata.prefix_sessions import Session, SessionStore

if TYPE_CHECKING:
    from kvstrata.cache import Cache
    from kvstrata.movement.prefetch import Prefetch
    from kvstrata.namespace import Namespace

__all__ = ["KVLayout", "LayerLoad", "LoadedKV", "Match", "PrefixCache", "Session"]

Tokens: TypeAlias = Sequence[int] | npt.ArrayLike


class PrefixCache:
    """The cached prefixes of one model and layout, in a namespace of the caller's: see `open` for one made for it.

    `ns` should be immutable=True and have policy="auto". Thread-safe. `threads` copy a load (default: up to 4, as many
    as this process may use).

    With `prefill_tokens_per_s`, how fast the model computes KV, or after `observe_prefill`, a load leaves out the part
    of a match that would take longer to come up from below memory than to be computed: see `Match.load`.
    """

    def __init__(
        self,
        ns: Namespace,
        layout: KVLayout,
        *,
        threads: int | None = None,
        prefill_tokens_per_s: float | None = None,
    ) -> None:
        self.ns = ns
        self.layout = layout
        self._seed = layout.seed()
        self._tally = Tally(
            "matches", "matched_tokens", "loads", "loaded_tokens", "loaded_bytes",
            "short_loads", "load_errors", "stored_blocks", "stored_bytes", "stores_cut_short",
            "skips", "skipped_tokens", "skipped_tokens_memory", "skipped_tokens_disk",
            "skipped_tokens_remote", "probes",
        )  # fmt: skip
        self._loader = PrefixLoader(ns, layout, self._tally, threads, Prefill(prefill_tokens_per_s))

    @classmethod
    def open(
        cls,
        cache: Cache,
        layout: KVLayout,
        *,
        name: str | None = None,
        threads: int | None = None,
        codec: str | Codec | Mapping[str, str | Codec] | None = None,
        prefill_tokens_per_s: float | None = None,
    ) -> PrefixCache:
        """Open the prefixes of a layout in an immutable namespace under the policy "auto".

        It is called `name`, by default what the layout is called. `codec` encodes blocks below memory, lossy ones
        included, as for `Cache.namespace`. Raises ConfigMismatch where somebody has a namespace of that name open with
        other options.
        """
        chosen = name or layout.name()
        tensor = None if codec is None else TensorInfo.of_block(layout)
        ns = cache.namespace(chosen, policy="auto", immutable=True, codec=codec, tensor=tensor)
        cache.set_tail(chosen, functools.partial(trailer_of, layout=layout))
        return cls(ns, layout, threads=threads, prefill_tokens_per_s=prefill_tokens_per_s)

    def keys(self, tokens: Tokens) -> list[bytes]:
        """Return the key of each full block of `tokens`; raises InvalidValue for bad tokens."""
        return prefix_keys(tokens, self._seed, self.layout.block_tokens)

    def match(self, tokens: Tokens, *, prefetch: bool = False) -> Match:
        """Find the longest cached prefix of `tokens`; looks only at the index and loads nothing.

        With `prefetch`, what of it lies below memory begins to come up in the background: see `Match.prefetched`.
        """
        keys = self.keys(tokens)
        found, elsewhere = self.ns._prefix_places(keys) if keys else (0, {})
        match = Match(self, keys[:found], elsewhere)
        self._tally.add(matches=1, matched_tokens=match.tokens)
        if prefetch and found:
            match.prefetched = self.ns.prefetch(match.keys)
        return match

    def store(self, tokens: Tokens, kv: Words | Sequence[tuple[Any, Any]]) -> int:
        """Store the full blocks of `tokens` that aren't there yet, head first; returns how many.

        `kv` holds exactly these tokens, as one array [layers, 2, kv_heads, tokens, head_dim] or as
        one (keys, values) pair a layer, each [kv_heads, tokens, head_dim]; numpy or torch, of the
        layout's dtype. Stops at the first block for which there is no room, so that no block is
        ever stored behind a hole. Raises InvalidValue where shapes or dtypes don't fit the layout.
        """
        keys = self.keys(tokens)
        layers = as_layers(kv, self.layout)
        length = layers[0][0].shape[1]
        count = len(tokens) if isinstance(tokens, Sequence) else np.shape(tokens)[0]
        if length != count:
            raise InvalidValue(f"kv holds {length} tokens, but {count} tokens were given")
        present = self.ns.contains_prefix(keys)
        stored = 0
        try:
            with StoredHead(self.ns) as head:
                head.add(keys[:present])
                for index in range(present, len(keys)):
                    stored += self._store_block(keys[index], layers, index)
                    head.add(keys[index : index + 1])
        except TierFull:
            self._tally.add(stores_cut_short=1)
        finally:
            if not self._loader.head_first:
                for key in reversed(keys):  # most recently used is the head, so that a prefix is evicted from its tail
                    self.ns._space.present_immutable(key)
            self._tally.add(stored_blocks=stored, stored_bytes=stored * self.layout.block_bytes)
        return stored

    def save_session(
        self,
        name: str | bytes,
        tokens: Tokens,
        kv: Words | Sequence[tuple[Any, Any]],
        *,
        ttl: float | None = None,
    ) -> int:
        """Store a conversation under a name, to be taken up with `resume`: also the KV behind its last full block.

        Its full blocks are stored as by `store`, whose result this returns and whose errors it raises; what the name
        had before is replaced. `ttl` seconds after it was saved the session is gone; its blocks aren't. Raises TierFull
        where there is no room for what it holds besides blocks.
        """
        stored = self.store(tokens, kv)
        self._sessions.save(name, block_tokens_array(tokens), as_layers(kv, self.layout), ttl)
        return stored

    def resume(self, name: str | bytes) -> Session | None:
        """Return what was last saved under a name, in whichever process; None where there is nothing."""
        found = self._sessions.read(name)
        if found is None:
            return None
        tokens, rest = found
        return Session(tokens, rest, self.keys(tokens), self._loader)

    def forget_session(self, name: str | bytes) -> bool:
        """Remove a session, from all tiers; its blocks stay. Returns whether it was there."""
        return self._sessions.forget(name)

    @functools.cached_property
    def _sessions(self) -> SessionStore:
        """A session is overwritten each turn, so it can't be among the blocks, which never change."""
        return SessionStore(self.ns._cache.namespace(f"{self.ns.name}-sessions"), self.layout)

    def warm(
        self, prompts: Iterable[Tokens], *, time_limit: float | None = None, progress: Progress | None = None
    ) -> Warmed:
        """Bring the cached prefixes of prompts into memory, head first; see `Namespace.warm`."""
        keys = list(dict.fromkeys(key for prompt in prompts for key in self.match(prompt).keys))
        return self.ns.warm(keys, time_limit=time_limit, progress=progress)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Tell how long the model took to compute the KV of so many tokens; what it takes for others is learned so."""
        self._loader.prefill.observe(tokens, seconds)

    def stats(self) -> dict[str, int]:
        """Return this object's counters since it was made.

        "skipped_tokens" were sooner computed than loaded, "skips" how often; of these, "skipped_tokens_disk" lay on
        disk, "skipped_tokens_remote" elsewhere, and "skipped_tokens_memory" in memory, behind such ones. "probes" were
        loaded although it seemed slower.
        """
        return self._tally.snapshot()

    def _store_block(self, key: bytes, layers: Layers, index: int) -> bool:
        """Write one block straight into the arena; False when it was there already, behind a hole."""
        if key in self.ns:
            return False
        with self.ns._reserve(key, self.layout.value_bytes, depth=index + 1) as buffer:
            fill_block(buffer, key, layers, index * self.layout.block_tokens, self.layout)
        return True


class Match:
    """The longest cached prefix of some tokens, as the index saw it; nothing is loaded or claimed yet."""

    def __init__(self, prefixes: PrefixCache, keys: list[bytes], elsewhere: Mapping[int, str]) -> None:
        self._prefixes = prefixes
        self._elsewhere = elsewhere  # the tier that has it, for blocks that weren't on this host
        self.keys = keys
        self.prefetched: Prefetch | None = None
        """The prefetch that the lookup started, if it was to start one and anything matched."""

    @property
    def tokens(self) -> int:
        """How many tokens matched, a multiple of the layout's block_tokens."""
        return len(self.keys) * self._prefixes.layout.block_tokens

    def load(self, out: Words | None = None, *, max_tokens: int | None = None) -> LoadedKV:
        """Copy the prefix into `out`, or into a new array, and return what was really there.

        `out` is writable and of the layout's words, [layers, 2, kv_heads, tokens, head_dim] with room for the
        matched tokens; it may be strided. At most `max_tokens` are loaded. The result is shorter than the match
        where blocks were evicted, damaged or unreachable meanwhile, and where a prefill rate is known, it is cut where
        loading what lies below memory is estimated to take longer than computing it: by what earlier loads took (now
        and then a few blocks are loaded all the same, to find out). That is counted and never an error, and what
        `out` then holds behind the loaded tokens has no meaning. Raises InvalidValue for an `out` that doesn't fit.
        """
        return self._prefixes._loader.load(self._wanted(max_tokens), out)

    def load_layers(self, out: Words | None = None, *, max_tokens: int | None = None) -> LayerLoad:
        """Load the prefix as `load` does, but give each layer as soon as it is there, while the next ones are read.

        Returns an iterator over (layer, words), words being [2, kv_heads, tokens, head_dim], a view of `out` or of a
        new array; see `LayerLoad` for what happens when blocks are lost meanwhile. Raises InvalidValue for an `out`
        that doesn't fit.
        """
        return LayerLoad(self._prefixes._loader, self._wanted(max_tokens), out)

    def _wanted(self, max_tokens: int | None) -> list[bytes]:
        """Return the keys of the blocks that are to be loaded."""
        keys = self.keys
        if max_tokens is not None:
            keys = keys[: max(0, max_tokens) // self._prefixes.layout.block_tokens]
        return self._prefixes._loader.worthwhile(keys, self._elsewhere)
