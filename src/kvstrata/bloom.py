"""Bloom filters: which keys a slow tier certainly doesn't have, for a few bytes a key.

After Bloom, "Space/time trade-offs in hash coding with allowable errors" (1970), with counters in place of bits (Fan,
Cao, Almeida, Broder, "Summary cache", 2000), so that keys can be taken out again; growing after Almeida, Baquero,
Preguiça, Hutchison, "Scalable Bloom filters" (2007).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata import _core
from kvstrata.errors import ConfigError, InvalidKey

__all__ = ["HASH_BYTES", "BloomFilter", "GrowingBloomFilter"]

Key: TypeAlias = bytes | str
Keys: TypeAlias = Sequence[Key] | npt.NDArray[np.uint8]
"""Keys one by one, or an array of shape [count, bytes] whose rows are keys, such as digests."""


class BloomFilter:
    """Says of a key that it is certainly not in there, or that it may be.

    It has room for `capacity` keys; once so many are in it, it says "may be" of a part `fp_rate` of all others.
    With more keys that part grows; nothing that is in there is ever denied. A counter has four bits and stays once it
    has reached 15, so where one key is added many times, it, and some others, may be found for ever.

    Hashes are keyed with a secret of the filter, so nobody can choose keys that it takes for others. All methods may
    be called from any thread; the batched ones let others run. Raises ConfigError for parameters that make no filter
    and InvalidKey for what is no key.
    """

    def __init__(self, capacity: int, fp_rate: float = 0.01) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity <= 10**10:
            raise ConfigError(f"capacity must be an int from 1 to 10**10, not {capacity!r}")
        if not isinstance(fp_rate, (int, float)) or not 1e-7 <= fp_rate <= 0.5:
            raise ConfigError(f"fp_rate must be a number from 1e-7 to 0.5, not {fp_rate!r}")
        self.capacity = capacity
        self.fp_rate = float(fp_rate)
        self._native = _core.BloomFilter(capacity, self.fp_rate)

    def __repr__(self) -> str:
        return f"BloomFilter(capacity={self.capacity}, fp_rate={self.fp_rate:g})"

    def add(self, key: Key) -> None:
        """Put a key in, once more if it is in already."""
        self._native.add(key)

    def remove(self, key: Key) -> bool:
        """Take a key out, once, that was put in before; return whether it, or one that looks like it, was in.

        Taking out what was never put in may take another key with it.
        """
        return self._native.remove_many([key]) == 1

    def __contains__(self, key: Key) -> bool:
        return self._native.contains(key)

    def add_many(self, keys: Keys) -> None:
        """Put keys in; an array has shape [count, bytes] and dtype uint8."""
        self._native.add_many(_checked(keys))

    def remove_many(self, keys: Keys) -> int:
        """Take keys out that were put in before; return how many of them, or their like, were in."""
        return self._native.remove_many(_checked(keys))

    def contains_many(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return for each key whether it may be in, shape [count]; False is certain."""
        found = np.empty(len(keys), dtype=np.bool_)
        self._native.contains_many(_checked(keys), found)
        return found

    def clear(self) -> None:
        """Take everything out."""
        self._native.clear()

    @property
    def nbytes(self) -> int:
        """Its size in bytes, the same however many keys are in."""
        return self._native.nbytes

    def stats(self) -> dict[str, float]:
        """Look at all counters and return what they tell.

        "fill": the part that isn't zero; "fp_rate": the chance that another key is taken for one of those that are in;
        "keys": about how many different ones are; "stuck": how many counters have reached their end.
        """
        fill, fp_rate, keys, stuck = self._native.figures()
        return {"fill": fill, "fp_rate": fp_rate, "keys": keys, "stuck": stuck}


HASH_BYTES = 8
"""Bytes of a hash, as GrowingBloomFilter makes and takes them."""
_FIRST_CAPACITY = 4096
_GROWTH = 4


class GrowingBloomFilter:
    """Grows with what is put in, and says "may be" of at most a part `fp_rate` of other keys whatever its size.

    Each part is four times as large as the one before and wrong half as often. It takes keys by their hashes, which
    are the same in all filters with the same `secret` of 16 bytes. All methods may be called from any thread.
    """

    def __init__(self, secret: bytes, fp_rate: float) -> None:
        self.fp_rate = fp_rate
        self._secret = secret
        self._lock = threading.Lock()
        self._parts: list[_core.BloomFilter] = []
        self._room = 0  # of the last part
        self.count = 0
        """How many keys were put in that weren't in yet."""
        self._grow()

    def hashes(self, keys: Sequence[Key]) -> bytes:
        """Return the hashes of keys, one behind the other."""
        return self._parts[0].hash_many(keys)

    def absent(self, hashes: bytes) -> bytes:
        """Return those of the hashes that certainly aren't in."""
        for part in self._parts:
            hashes = part.absent(hashes)
        return hashes

    def add_hashes(self, hashes: bytes) -> None:
        """Put keys in by their hashes, where they aren't in yet."""
        with self._lock:
            hashes = self.absent(hashes)
            while hashes:
                some, hashes = hashes[: self._room * HASH_BYTES], hashes[self._room * HASH_BYTES :]
                self._parts[-1].add_hashes(some)
                self.count += len(some) // HASH_BYTES
                self._room -= len(some) // HASH_BYTES
                if not self._room:
                    self._grow()

    def __contains__(self, key: Key) -> bool:
        for part in self._parts:  # noqa: SIM110 - any() takes a quarter of what a whole lookup may take
            if part.contains(key):
                return True
        return False

    def contains_many(self, keys: Sequence[Key]) -> npt.NDArray[np.bool_]:
        """Return for each key whether it may be in, shape [count]; False is certain."""
        found = np.zeros(len(keys), dtype=np.bool_)
        one = np.empty(len(keys), dtype=np.bool_)
        for part in self._parts:
            part.contains_many(keys, one)
            found |= one
        return found

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return sum(part.nbytes for part in self._parts)

    def _grow(self) -> None:
        number = len(self._parts)
        self._room = _FIRST_CAPACITY * _GROWTH**number
        self._parts.append(_core.BloomFilter(self._room, max(self.fp_rate / 2 ** (number + 1), 1e-7), self._secret))


def _checked(keys: Keys) -> Any:
    if not isinstance(keys, np.ndarray):
        return keys
    if keys.dtype != np.uint8 or keys.ndim != 2 or not 1 <= keys.shape[1] <= 1024:
        raise InvalidKey(
            f"an array of keys has shape [count, 1 to 1,024] and dtype uint8, not {list(keys.shape)} and {keys.dtype}"
        )
    return np.ascontiguousarray(keys)
