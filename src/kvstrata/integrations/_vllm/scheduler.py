"""The connector's side in vLLM's scheduler: which blocks of a request are there, what is to be loaded and stored."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvstrata.cache import Cache
from kvstrata.integrations._blocks import EngineBlocks
from kvstrata.integrations._vllm.groups import NULL_BLOCK, Group, longest
from kvstrata.integrations._vllm.keys import Adapters, RequestKeys, seed_of
from kvstrata.integrations._vllm.messages import Load, Progress, Rank, Store, Work
from kvstrata.integrations._vllm.metrics import Deltas, KVStrataStats, total
from kvstrata.movement.cost import Prefill, worth_loading

__all__ = ["Scheduler"]

_MATCH_S = 0.2  # how long an answer holds for a request that waits: it is asked for in every step
_MEDIUM = "kvstrata"
_WITH_STEP_BYTES, _WITH_STEP_BLOCKS = 256 << 20, 2048
"""Of KV in memory so much may be loaded with a step: some ten milliseconds that whoever arrives meanwhile waits."""


class _Tracked:
    """A request from its arrival to its end."""

    def __init__(self, request: Any, keys: RequestKeys | None) -> None:
        self.request = request
        self.keys = keys  # None: its KV isn't known by its tokens
        self.stored = 0  # blocks that were given to the workers to store, or were there
        self.start = 0  # the block at which a load would begin
        self.found = 0
        self.below = 0  # so many of those have to come from disk
        self.with_step = False  # whether they come with the step that needs them
        self.loading: set[int] = set()  # the engine's blocks that are being loaded, or were
        self.gave_up = False  # a load has failed: what is left is computed
        self.asked_at = float("-inf")

    def keys_to(self, end: int) -> list[bytes]:
        """Return the keys of the blocks that would be loaded, up to block `end`."""
        assert self.keys is not None
        return self.keys.upto(self.request.all_token_ids, end)[self.start :]


class _Told(NamedTuple):
    """What an event says of blocks that are being stored."""

    hashes: list[Any]
    parent: Any
    tokens: list[int]
    lora: Any
    heard: list[int]  # from each worker, how many are there


class Scheduler:
    """One engine's.

    Loads go ahead of the step that needs them, while others are computed. With `layerwise` they belong to that step,
    layer by layer. Where `with_step` allows it they do so as a whole, too, when nobody else is computed and all lies in
    memory: then a step of its own takes longer than the wait.
    """

    def __init__(
        self, cache: Cache, vllm_config: Any, groups: Sequence[Group], *, layerwise: bool, with_step: bool,
        reads: bool, writes: bool, prefill_tokens_per_s: float | None, namespace_options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._cache = cache
        self._block_tokens = vllm_config.cache_config.block_size
        self._layerwise, self._may_go_with_step = layerwise, with_step
        self._reads, self._writes = reads, writes
        self._prefill = Prefill(prefill_tokens_per_s)
        self._namespace_options = namespace_options
        self._groups = groups
        self._ranks: list[list[EngineBlocks]] = [[] for _ in groups]  # of each group: what each rank has of it
        self._block_bytes = 0  # in all ranks
        self._computed: set[str] = set()  # requests that the last step computed, and that haven't ended
        self._spare = int(layerwise or any(group.window for group in groups))
        self._told_of = next((number for number, group in enumerate(groups) if group.window is None), 0)
        self._tracked: dict[str, _Tracked] = {}
        self._adapters = Adapters(vllm_config.lora_config and vllm_config.lora_config.lora_dtype)
        self._generation = ""
        self._loads: list[Load] = []
        self._stores = 0
        self._deltas = Deltas()
        self._telling: dict[int, _Told] = {}
        self._events: list[Any] = []
        self._wants_events = bool(vllm_config.kv_events_config and vllm_config.kv_events_config.enable_kv_cache_events)

    def meet(self, ranks: Sequence[Rank]) -> None:
        """Learn from all workers where their parts of blocks are."""
        self._ranks = [[] for _ in self._groups]
        self._block_bytes = sum(shard.block_bytes for rank in ranks for shard in rank.shards)
        for shard in (shard for rank in ranks for shard in rank.shards):
            self._ranks[shard.group].append(
                EngineBlocks.named(self._cache, shard.namespace, tensor=shard.tensor, **self._namespace_options)
            )

    # ---- A request

    def arrived(self, request: Any) -> _Tracked:
        """Begin to follow a request."""
        keys = None
        adapter = self._adapters.identity(request.lora_request)
        if adapter is not None and request.prompt_embeds is None and any(self._ranks):
            seed = seed_of(adapter=adapter, salt=request.cache_salt or "", generation=self._generation)
            keys = RequestKeys(seed, self._block_tokens, request.mm_features)
        tracked = self._tracked[request.request_id] = _Tracked(request, keys)
        return tracked

    def match(self, request: Any, computed: int) -> tuple[int, bool]:
        """Return how many tokens behind the first `computed` can be loaded, and whether ahead of the step."""
        tracked = self._of(request)
        size = self._block_tokens
        if tracked.keys is None or tracked.gave_up or not self._reads:
            return 0, False
        # A step computes a token at least. One that was loaded before it may be computed once more, where all that this
        # token sees is there: with windows that needn't be.
        limit = (request.num_tokens - self._spare) // size
        start = computed // size
        now = time.monotonic()
        if start != tracked.start or now - tracked.asked_at > _MATCH_S:
            keys = tracked.keys.upto(request.all_token_ids, limit)
            tracked.start, tracked.asked_at = start, now
            tracked.found, tracked.below = self._worthwhile(keys[: self._longest(keys, start)], start)
        if not tracked.found:
            return 0, False
        tracked.with_step = self._layerwise or self._goes_with_step(tracked)
        return tracked.found * size, not tracked.with_step

    def _goes_with_step(self, tracked: _Tracked) -> bool:
        """Say whether what was found is loaded in the step that needs it, as a whole."""
        request, end = tracked.request, tracked.start + tracked.found
        if not self._may_go_with_step or tracked.below or self._computed - {request.request_id}:
            return False
        planned = tracked.found + sum(len(load.blocks) for load in self._loads if load.with_step)
        if planned > _WITH_STEP_BLOCKS or planned * self._block_bytes > _WITH_STEP_BYTES:
            return False
        if end * self._block_tokens >= request.num_tokens:  # a step computes a token at least
            return False
        keys = tracked.keys_to(end)
        return not any(absent for parts in self._ranks for blocks in parts for absent in blocks.absent(keys))

    def _longest(self, keys: list[bytes], start: int) -> int:
        return longest(keys, start, self._block_tokens, self._groups, self._ranks)

    def _worthwhile(self, keys: list[bytes], start: int) -> tuple[int, int]:
        """Return how many blocks from `start` on are sooner loaded than computed, and how many come from disk."""
        if len(keys) <= start or not self._cache.options.disk:
            return max(0, len(keys) - start), 0
        sizes = self._sizes_below(keys, start)
        token_s = self._prefill.token_s
        if token_s is not None:
            below = self._cache.below.name
            places = [(below, size) if size else None for size in sizes]
            worth = worth_loading(places, self._cache.tiers.cost.seconds, token_s * self._block_tokens)
            if worth < len(sizes):  # behind which not all windows may be there
                keys = keys[: self._longest(keys[: start + worth], start)]
                sizes = self._sizes_below(keys, start)
        return len(sizes), sum(size > 0 for size in sizes)

    def _sizes_below(self, keys: list[bytes], start: int) -> list[int]:
        """Return for each block from `start` on what has to be read for it, when a request goes on behind the last."""
        sizes = [0] * (len(keys) - start)
        for group, parts in zip(self._groups, self._ranks, strict=True):
            first = max(start, group.first_seen(len(keys), self._block_tokens))
            for blocks in parts:
                for position, size in enumerate(blocks.sizes_below(keys[first:]), first - start):
                    sizes[position] += size
        return sizes

    def sources(self, request: Any, tokens: int) -> tuple[int, int]:
        """Return how many of the tokens of a load that was planned come from memory, and how many from disk."""
        below = min(tokens, self._of(request).below * self._block_tokens)
        return tokens - below, below

    def allocated(self, request: Any, blocks: Any, tokens: int) -> None:
        """Note that the engine has given blocks to a request, and wants so many tokens loaded into them."""
        if not tokens:
            return
        tracked = self._of(request)
        end = tracked.start + tokens // self._block_tokens
        keys = tracked.keys_to(end)
        tracked.asked_at = float("-inf")
        tracked.loading = set()
        for group, table in enumerate(blocks.get_block_ids()):
            places = _places(keys, table[tracked.start : end])
            load = Load(request.request_id, group, list(places), list(places.values()), tracked.with_step)
            self._loads.append(load)
            tracked.loading.update(places.values())

    def ended(self, request: Any) -> None:
        """Forget a request. Stores that are under way need nothing of it."""
        self._tracked.pop(request.request_id, None)
        self._computed.discard(request.request_id)

    def _of(self, request: Any) -> _Tracked:
        return self._tracked.get(request.request_id) or self.arrived(request)

    # ---- A step

    def work(self, step: Any) -> Work:
        """Return what the step brings for the workers."""
        idle = not step.total_num_scheduled_tokens
        work = Work(self._loads, fresh=self._fresh(step), layerwise=self._layerwise, idle=idle)
        self._loads = []
        self._computed = set(step.num_scheduled_tokens)
        state = step.kv_connector_block_state
        for name, scheduled in step.num_scheduled_tokens.items():
            tracked = self._tracked.get(name)
            if tracked is None or tracked.keys is None or not self._writes:
                continue
            request = tracked.request
            known = min(request.num_computed_tokens + scheduled, request.num_tokens)
            blocks = known // self._block_tokens
            if blocks > tracked.stored:
                first, tracked.stored = tracked.stored, blocks
                keys = tracked.keys.upto(request.all_token_ids, blocks)[first:]
                for group, table in enumerate(state.get_block_ids(name)):
                    places = _places(keys, table[first:blocks])
                    self._stores += 1
                    begin = blocks - len(places)  # what isn't there any more lies before the rest
                    work.stores.append(
                        Store(self._stores, name, group, begin, list(places), list(places.values()))
                    )  # fmt: skip
                    if self._wants_events and group == self._told_of:
                        self._will_tell(self._stores, request, begin, blocks)
        return work

    def _fresh(self, step: Any) -> set[int]:
        """The blocks that are written from this step on, and weren't before."""
        size = self._block_tokens
        fresh: set[int] = set()
        for new in step.scheduled_new_reqs:
            for table in new.block_ids:
                fresh.update(table[new.num_computed_tokens // size :])
        cached = step.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            resumed = name in cached.resumed_req_ids  # then these are all blocks that it has
            for table in blocks or ():
                fresh.update(table[computed // size if resumed else 0 :])
        for load in self._loads:
            fresh.update(load.blocks)
        return fresh

    # ---- What happened

    def heard(self, progress: Progress | None) -> None:
        """Take note of stores that have ended in some workers."""
        for number, counts in (progress.stored if progress else {}).items():
            told = self._telling.get(number)
            if told is None:
                continue
            told.heard.extend(counts)
            if len(told.heard) >= len(self._ranks[self._told_of]):
                del self._telling[number]
                self._tell(told, min(told.heard))

    def failed(self, blocks: set[int]) -> None:
        """Blocks could not be loaded, and will be computed: to be stored then, and not to be asked for once more."""
        for tracked in self._tracked.values():
            tracked.stored = 0
            tracked.gave_up = tracked.gave_up or not tracked.loading.isdisjoint(blocks)

    def failed_as_a_whole(self, requests: Iterable[str]) -> None:
        """Requests could not be loaded, and will be computed from their beginning."""
        for name in requests:
            if (tracked := self._tracked.get(name)) is not None:
                tracked.stored = 0
                tracked.gave_up = True

    @property
    def telling(self) -> bool:
        """Whether there will be events without another request."""
        return bool(self._telling)

    def events(self) -> Iterable[Any]:
        """Return the events since it was last asked."""
        events, self._events = self._events, []
        return events

    def stats(self) -> KVStrataStats | None:
        """Return what was counted since it was last asked."""
        return self._deltas.of(total(blocks.stats() for parts in self._ranks for blocks in parts))

    def reset(self) -> None:
        """Find nothing of what was stored up to now, by this engine from now on.

        vLLM asks for it when its weights were changed in memory, too. So from now on it shares with nobody, until it
        is started again.
        """
        self._generation = os.urandom(16).hex()
        self._tracked.clear()
        self._telling.clear()
        if self._wants_events:
            from vllm.distributed.kv_events import AllBlocksCleared

            self._events.append(AllBlocksCleared())

    def _will_tell(self, number: int, request: Any, first: int, end: int) -> None:
        size = self._block_tokens
        hashes = request.block_hashes[:end]
        if len(hashes) == end:  # vLLM hashes in other units for some models
            self._telling[number] = _Told(
                hashes[first:], hashes[first - 1] if first else None,
                list(request.all_token_ids[first * size : end * size]), request.lora_request, [],
            )  # fmt: skip

    def _tell(self, told: _Told, blocks: int) -> None:
        from vllm.distributed.kv_events import BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        if blocks:
            self._events.append(
                BlockStored(
                    block_hashes=[maybe_convert_block_hash(name) for name in told.hashes[:blocks]],
                    parent_block_hash=told.parent and maybe_convert_block_hash(told.parent),
                    token_ids=told.tokens[: blocks * self._block_tokens],
                    block_size=self._block_tokens,
                    lora_id=told.lora and told.lora.lora_int_id,
                    medium=_MEDIUM,
                    lora_name=told.lora and told.lora.lora_name,
                    group_idx=self._told_of,
                )
            )


def _places(keys: Sequence[bytes], table: Sequence[int]) -> dict[bytes, int]:
    """Return the block of each key that has one."""
    return {key: block for key, block in zip(keys, table, strict=False) if block != NULL_BLOCK}
