"""Deserialized Python values in front of a namespace: made once in a process, true in all of them.

An `ObjectCache` stores serialized bytes in the namespace and keeps the object itself in a `cachebox.LRUCache` of this
process, together with the number of the record that it was made from. A get asks the shared index, in constant time
and without a lock, whether that record is still the key's. So whoever overwrites, deletes, clears, or bumps the
version, in any process, takes the object from everybody. A record that was evicted takes its object along; objects
that are used tell the policy so, now and then.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvstrata import _core
from kvstrata.errors import ConfigError, InvalidValue, MissingExtra, UnknownOption
from kvstrata.tiers.base import Key

if TYPE_CHECKING:
    from kvstrata.namespace import Namespace

__all__ = ["ObjectCache", "ObjectInfo", "Serializer"]

Serializer = tuple[Callable[[Any], Any], Callable[[Any], Any]]  # dumps: object -> buffer; loads: memoryview -> object

_ABSENT = object()


def _pickle(value: Any) -> bytes:
    return pickle.dumps(value, protocol=5)


_SERIALIZERS: dict[str, Serializer] = {
    "pickle": (_pickle, pickle.loads),
    "msgpack": (msgspec.msgpack.encode, msgspec.msgpack.decode),
}


class ObjectInfo(NamedTuple):
    """What an ObjectCache of this process did: gets that found an object, that made one from bytes, and that missed.

    `unreadable` of the misses found bytes that can't be deserialized. `kept` is how many objects it has, stale ones
    included.
    """

    hits: int
    loads: int
    misses: int
    unreadable: int
    kept: int


class ObjectCache(_core.ObjectLayer):
    """Python objects over a namespace; `Namespace.objects` makes one. All methods may be called from any thread.

    **Objects are shared.** A get returns the very object that was put, or made, in this process: whoever changes it
    changes it for the others here, and for no other process. Put what nobody changes.

    **pickle runs code.** The default serializer, pickle (protocol 5), gives every object back as it was, but whoever
    can write to the cache's files can run code in a process that reads it. They belong to their user alone (mode 0600).
    Where others can write them, the directory came from elsewhere, or others can write to a tier elsewhere, use
    serializer="msgpack": plain data only, and tuples come back as lists when they were made from bytes.
    """

    __slots__ = (
        "__weakref__", "_bound", "_dumps", "_kept", "_loaded", "_loads", "_missed", "_namespace", "_unreadable",
    )  # fmt: skip

    def __init__(self, namespace: Namespace, maxsize: int, serializer: str | Serializer) -> None:
        if isinstance(maxsize, bool) or not isinstance(maxsize, int) or maxsize < 1:
            raise ConfigError(f"maxsize must be an int from 1 on, not {maxsize!r}")
        self._dumps, self._loads = _serializer(serializer)
        try:
            import cachebox
        except ImportError:
            raise MissingExtra("objects", "cachebox") from None
        self._namespace = namespace
        self._kept: Any = cachebox.LRUCache(maxsize)
        self._bound = namespace._native()
        self._loaded = self._missed = self._unreadable = 0
        super().__init__(self._kept, self._bound)

    def __repr__(self) -> str:
        return f"<kvstrata objects of {self._namespace!r}>"

    # ---- Reading; `get` is native

    def _fetch(self, key: Key, default: Any) -> Any:
        """Make the object from the record's bytes, keep and return it; what `get` calls when it has none."""
        self._rebind()
        return self._made(key, self._namespace._pin_or_none(key), default)

    def _made(self, key: Key, pin: _core.Pin | None, default: Any) -> Any:
        if pin is None:
            self._missed += 1
            return default
        with pin as view:
            try:
                value = self._loads(view)
            except Exception:  # noqa: BLE001 - bytes that aren't what they should be raise anything
                self._missed += 1
                self._unreadable += 1
                return default
            self._loaded += 1
            self.keep(key, value, pin)
        return value

    def get_many(self, keys: Sequence[Key], default: Any = None) -> list[Any]:
        """Return the objects in the order of the keys, `default` where absent."""
        keys = list(keys)
        values = [self.find(key, _ABSENT) for key in keys]
        wanted = [i for i, value in enumerate(values) if value is _ABSENT]
        if wanted:
            self._rebind()
            for i, pin in zip(wanted, self._namespace.pin_many([keys[i] for i in wanted]), strict=True):
                values[i] = self._made(keys[i], pin, default)
        return values

    def __contains__(self, key: Key) -> bool:
        return key in self._namespace

    # ---- Writing

    def put(
        self, key: Key, value: Any, *, ttl: float | None = None, cost: float | None = None,
        tags: Sequence[Key] | None = None,
    ) -> None:  # fmt: skip
        """Store an object, with the options of `Namespace.put`; it must not be changed from now on.

        In an immutable namespace a key that is there stays as it is. Raises InvalidValue when it can't be serialized,
        and what `Namespace.put` raises.
        """
        try:
            data = self._dumps(value)
        except Exception as error:
            raise InvalidValue(f"a {type(value).__name__} that can't be serialized: {error}") from error
        self._rebind()
        pin = self._namespace._put_pinned(key, data, ttl, cost, tags)
        if pin is not None:
            try:
                self.keep(key, value, pin)
            finally:
                pin.release()

    def put_many(self, items: Mapping[Key, Any], *, ttl: float | None = None) -> None:
        """Store objects in the order given. When one fails the ones before it are stored."""
        for key, value in items.items():
            self.put(key, value, ttl=ttl)

    # ---- Removing

    def delete(self, key: Key) -> bool:
        """Remove a key from all tiers and for everybody; returns whether it was there."""
        present = self._namespace.delete(key)
        self._kept.pop(key, None)
        return present

    def drop(self, keys: Iterable[Key] | None = None) -> None:
        """Let go of this process's objects, or of those of some keys; the records stay."""
        if keys is None:
            self._kept.clear()
        for key in keys or ():
            self._kept.pop(key, None)

    def info(self) -> ObjectInfo:
        """Return what it did in this process."""
        return ObjectInfo(self.hits, self._loaded, self._missed, self._unreadable, len(self._kept))

    def _rebind(self) -> None:
        """In a forked child, the namespace has another native part from its first use on."""
        space = self._namespace._native()
        if space is not self._bound:
            self.bind(space)
            self._bound = space


def _serializer(wanted: str | Serializer) -> Serializer:
    if isinstance(wanted, str):
        if wanted not in _SERIALIZERS:
            raise UnknownOption("serializer", wanted, _SERIALIZERS)
        return _SERIALIZERS[wanted]
    if not (isinstance(wanted, tuple) and len(wanted) == 2 and all(map(callable, wanted))):
        raise ConfigError(f"serializer must be a name or a pair of functions (dumps, loads), not {wanted!r}")
    return wanted
