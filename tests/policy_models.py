"""The simple policies once more, in a few lines of Python each, as plainly as they can be said."""

from __future__ import annotations

from collections import OrderedDict


class Model:
    """A cache of keys that holds `capacity` of them; `access` and `remove` say whether the key was there."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: OrderedDict[int, int] = OrderedDict()  # oldest first; with a number of the policy's own

    def access(self, key: int) -> bool:
        if key in self.keys:
            self.hit(key)
            return True
        if len(self.keys) >= self.capacity:
            del self.keys[self.victim()]
        self.keys[key] = 0
        return False

    def remove(self, key: int) -> bool:
        return self.keys.pop(key, None) is not None

    def hit(self, key: int) -> None:
        raise NotImplementedError

    def victim(self) -> int:
        return next(iter(self.keys))


class Fifo(Model):
    def hit(self, key: int) -> None:
        pass


class Lru(Model):
    def hit(self, key: int) -> None:
        self.keys.move_to_end(key)


class Lfu(Model):
    """Among equals, the one that has had its count for longest."""

    def hit(self, key: int) -> None:
        self.keys[key] += 1
        self.keys.move_to_end(key)

    def victim(self) -> int:
        return min(self.keys, key=self.keys.__getitem__)


class Slru(Model):
    """The number is 1 in the protected segment; `keys` is in order of the last move."""

    def hit(self, key: int) -> None:
        self.keys[key] = 1
        self.keys.move_to_end(key)
        protected = [other for other, segment in self.keys.items() if segment]
        for other in protected[: -max(1, self.capacity * 4 // 5)]:
            self.keys[other] = 0
            self.keys.move_to_end(other)

    def victim(self) -> int:
        return min(self.keys, key=self.keys.__getitem__)


class Sieve(Model):
    """The number is 1 for what was used since the hand passed."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.hand: int | None = None

    def hit(self, key: int) -> None:
        self.keys[key] = 1

    def younger(self, key: int) -> int | None:
        order = list(self.keys)
        place = order.index(key) + 1
        return order[place] if place < len(order) else None

    def remove(self, key: int) -> bool:
        if key == self.hand:
            self.hand = self.younger(key)
        return super().remove(key)

    def victim(self) -> int:
        at = self.hand if self.hand is not None else next(iter(self.keys))
        while self.keys[at]:
            self.keys[at] = 0
            following = self.younger(at)
            at = following if following is not None else next(iter(self.keys))
        self.hand = self.younger(at)
        return at


MODELS = {"fifo": Fifo, "lru": Lru, "lfu": Lfu, "slru": Slru, "sieve": Sieve}
