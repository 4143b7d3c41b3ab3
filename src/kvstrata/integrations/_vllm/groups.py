"""Groups of layers in vLLM: those of one have a table of blocks in common, and look back equally far.

A layer with a sliding window sees the KV of so many tokens and no more, so vLLM frees the blocks before. A request can
go on behind block n where each group has those blocks before n that the next token still sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvstrata.errors import UnsupportedModel

__all__ = ["NULL_BLOCK", "Group", "fails_in_blocks", "groups_of", "longest"]

NULL_BLOCK = 0
"""What vLLM puts into a table of blocks for those that nobody sees any more."""

_AT_ONCE = 64  # blocks of a window that are looked up at once, since some more may have to be
_ADVICE = (
    "with --disable-hybrid-kv-cache-manager vLLM keeps the KV of all layers for each token, where the model allows that"
)


@dataclass(frozen=True)
class Group:
    """Layers by their names, and how many tokens each of them sees, the current one among them; None: all."""

    layers: tuple[str, ...]
    window: int | None = None

    def first_seen(self, end: int, block_tokens: int) -> int:
        """Return the first block of which the token behind the first `end` blocks sees something."""
        return 0 if self.window is None else max(0, end * block_tokens - self.window + 1) // block_tokens


class Blocks(Protocol):
    """Where a rank's part of a group's blocks is: `EngineBlocks`."""

    def match(self, keys: Sequence[bytes]) -> int:
        """Return how many are there from the first on."""
        ...

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Say of each whether it is there."""
        ...


def groups_of(kv_cache_config: Any, block_tokens: int) -> list[Group]:
    """Return the groups of a model; raises UnsupportedModel where KV isn't kept for each token, or for a window."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, iter_layer_specs

    groups: list[Group] = []
    for group in kv_cache_config.kv_cache_groups:
        specs = list(iter_layer_specs(group.kv_cache_spec))
        # Those that are derived from them keep it in yet another way.
        other = sorted({type(spec).__name__ for spec in specs
                        if type(spec) not in (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec)})  # fmt: skip
        if other:
            raise UnsupportedModel(
                f"layers of this model keep their state in a way of their own ({other[0]}); {_ADVICE}"
            )
        if group.kv_cache_spec.block_size != block_tokens:
            raise UnsupportedModel(
                f"blocks of some layers hold {group.kv_cache_spec.block_size} tokens, of others {block_tokens}; "
                f"{_ADVICE}"
            )
        windows = {
            spec.sliding_window + spec.extra_retained_tokens for spec in specs if type(spec) is SlidingWindowSpec
        }
        groups.append(Group(tuple(group.layer_names), max(windows, default=None)))
    if not groups:
        raise UnsupportedModel("this model keeps no KV")
    return groups


def fails_in_blocks(groups: Sequence[Group]) -> bool:
    """Whether vLLM computes from the first block on that can't be loaded; else it computes the whole request."""
    return len(groups) == 1 and groups[0].window is None


def longest(
    keys: Sequence[bytes], start: int, block_tokens: int, groups: Sequence[Group], ranks: Sequence[Sequence[Blocks]]
) -> int:
    """Return behind how many blocks a request can go on, when the engine has the first `start` itself.

    `keys` are those of its blocks from the first on; `ranks` has the parts of each group.
    """
    end = len(keys)
    tails: list[tuple[Group, _Tail]] = []
    for group, parts in zip(groups, ranks, strict=True):
        for blocks in parts:  # what one lacks is of no use to the others
            if group.window is None:
                end = start + blocks.match(keys[start:end]) if end > start else start
            else:
                tails.append((group, _Tail(keys, start, blocks)))
    checked = 0  # so many in a row have all that is seen from there
    while end > start and checked < len(tails):
        group, tail = tails[checked]
        hole = tail.last_hole(max(start, group.first_seen(end, block_tokens)), end)
        if hole is None:
            checked += 1
        else:
            end, checked = hole, 0  # from an end between, one would look back on it, too
    return end


class _Tail:
    """Which blocks of a part are there, looked up from the last one on as far as needed."""

    def __init__(self, keys: Sequence[bytes], start: int, blocks: Blocks) -> None:
        self._keys, self._start, self._blocks = keys, start, blocks
        self._first: int | None = None
        self._there: list[bool] = []  # of blocks from `_first` on

    def last_hole(self, first: int, end: int) -> int | None:
        """Return the last one from `first` to before `end` that isn't there. Neither ever grows."""
        known = end if self._first is None else self._first
        if known > first:
            low = max(self._start, min(first, known - _AT_ONCE))
            self._there = self._blocks.present(self._keys[low:known]) + self._there
            self._first = known = low
        return next((block for block in reversed(range(first, end)) if not self._there[block - known]), None)
