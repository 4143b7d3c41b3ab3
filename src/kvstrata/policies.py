"""Replacement policies without a cache: what would have been a hit, at which capacity, under which policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata import _core
from kvstrata.errors import ConfigError, UnknownOption

__all__ = ["Simulator", "names"]

Key: TypeAlias = int | bytes | str
Keys: TypeAlias = Sequence[Key] | npt.NDArray[np.integer[Any]]
Parents: TypeAlias = Sequence[Key | None] | npt.NDArray[np.integer[Any]]


def names() -> list[str]:
    """Return the policies that a namespace or a Simulator can have."""
    return _core.policy_names()


class Simulator:
    """A cache of keys without values, under the same native code that decides in a real one.

    `capacity` counts records, or with by="bytes" the sum of their sizes. A key is an int of 64 bits, or bytes or str,
    of which a 64-bit hash stands for the whole. `simulator.size` is what it holds, in the unit of its capacity.

    Raises UnknownOption for a policy or `by` that doesn't exist, and ConfigError for a capacity below 1.
    """

    def __init__(self, policy: str, capacity: int, *, by: Literal["count", "bytes"] = "count") -> None:
        if policy not in names():
            raise UnknownOption("policy", policy, names())
        if by not in ("count", "bytes"):
            raise UnknownOption("by", by, ["count", "bytes"])
        if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity < 1 << 63:
            raise ConfigError(f"capacity must be an int from 1 on, not {capacity!r}")
        self.policy = policy
        self.capacity = capacity
        self.by = by
        self._native = _core.Simulator(policy, capacity, by == "bytes")

    def access(self, key: Key, size: int = 1, *, cost: float = 1, parent: Key | None = None) -> bool:
        """Use a record; return whether it was there. If not, it comes in, unless it is larger than the whole cache.

        `size` counts with by="bytes" only, `cost` is that of computing the value again (for "gdsf"), and `parent` is
        the key of the block before this one in its prefix (for "auto").
        """
        return self._native.access(key, size, cost, parent)

    def run(
        self,
        keys: Keys,
        sizes: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        parents: Parents | None = None,
    ) -> npt.NDArray[np.bool_]:
        """Use many records, one after the other; return which were there, shape [len(keys)].

        Arrays of integers are fastest. In `parents`, None stands for no parent; in an array a negative number, or the
        key itself.
        """
        numbers = _numbers(keys)
        hits = np.empty(len(numbers), dtype=np.bool_)
        sizes_array = None if sizes is None else np.ascontiguousarray(sizes, dtype=np.uint64)
        if parents is None:
            self._native.run(numbers, sizes_array, None, None, hits)
            return hits
        if isinstance(parents, np.ndarray):
            inside = np.ascontiguousarray(parents >= 0)
            parent_numbers = _numbers(parents)
        else:
            inside = np.fromiter((parent is not None for parent in parents), np.bool_, len(parents))
            parent_numbers = _numbers([0 if parent is None else parent for parent in parents])
        self._native.run(numbers, sizes_array, parent_numbers, inside, hits)
        return hits

    def remove(self, key: Key) -> bool:
        """Take a record out, as a deletion does; return whether it was there."""
        return self._native.remove(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._native

    def __len__(self) -> int:
        return len(self._native)

    @property
    def size(self) -> int:
        """The sum of the sizes of what is there, in the unit of the capacity."""
        return self._native.size


def _numbers(keys: Keys | Parents) -> npt.NDArray[np.uint64]:
    """Return the 64-bit numbers that stand for keys."""
    if isinstance(keys, np.ndarray):
        if keys.ndim != 1 or keys.dtype.kind not in "iu":
            raise ConfigError(
                f"keys are a one-dimensional array of integers, not of {keys.dtype} in {keys.ndim} dimensions"
            )
        return np.ascontiguousarray(keys.astype(np.int64, copy=False) if keys.dtype.kind == "i" else keys).astype(
            np.uint64, copy=False
        )
    numbers = np.empty(len(keys), dtype=np.uint64)
    _core.key_numbers(keys, numbers)
    return numbers
