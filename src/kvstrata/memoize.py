"""`Namespace.memoize`: functions whose results every process shares, computed once at a time."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import numpy as np
from blake3 import blake3

from kvstrata.errors import ConfigError, InvalidKey, TierError, VersionConflict
from kvstrata.forking import after_fork
from kvstrata.objects import ObjectCache

if TYPE_CHECKING:
    from kvstrata.namespace import Namespace

__all__ = ["MemoInfo", "Memoized", "memoized"]

P = ParamSpec("P")
R = TypeVar("R")
_ABSENT: Any = object()


class MemoInfo(NamedTuple):
    """What a memoized function did in this process.

    `hits` found the object itself, `loads` made it from bytes that some process had stored, `computed` called the
    function. `joined` waited for a call of another thread or task, `not_stored` could not be stored for others.
    """

    hits: int
    loads: int
    computed: int
    joined: int
    not_stored: int


class Memoized(Protocol[P, R]):
    """A function with a memory. Calling it returns a shared object, which must not be changed."""

    __wrapped__: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the result that is remembered, or call the function."""

    def cache_info(self) -> MemoInfo:
        """Return what it did in this process."""

    def cache_clear(self) -> None:
        """Forget all results of this function and version, in every process; costs as `Namespace.delete_prefix`."""

    def forget(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the result of one call, in every process; returns whether there was one."""


def memoized(
    function: Callable[P, R], namespace: Namespace, objects: ObjectCache, *,
    name: str | None, version: int, key: Callable[..., Any] | None, ttl: float | None, cost: float | None,
) -> Memoized[P, R]:  # fmt: skip
    """Wrap a function; `Namespace.memoize` documents how."""
    identity = blake3()
    _encode(("memoize", _name_of(function) if name is None else name, version), identity.update, "name or version")
    prefix = b"memo:" + identity.digest(16)
    key_of = _KeyMaker(function, prefix, key)
    flights = _Flights()
    not_stored = 0

    def store(at: bytes, value: Any, flight: _Flight) -> Any:
        nonlocal not_stored
        if flight.forgotten.is_set():
            return value  # it may be of what was there before
        try:
            objects.put(at, value, ttl=ttl, cost=cost)
            if flight.forgotten.is_set():
                objects.delete(at)
        except (TierError, VersionConflict):
            not_stored += 1  # the caller has its result all the same
        return value

    def recall(at: bytes) -> Any:
        try:
            return objects.get(at, _ABSENT)
        except TierError:
            return _ABSENT

    wrapper: Any
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            at = key_of(args, kwargs)
            value = recall(at)
            if value is not _ABSENT:
                return value

            async def compute(flight: _Flight) -> Any:
                return store(at, await cast(Any, function)(*args, **kwargs), flight)

            return await flights.join_task(at, compute)

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            at = key_of(args, kwargs)
            value = recall(at)
            if value is not _ABSENT:
                return value

            def compute(flight: _Flight) -> Any:
                again = recall(at)  # another thread may just have finished
                return store(at, function(*args, **kwargs), flight) if again is _ABSENT else again

            return flights.join(at, compute)

    def cache_info() -> MemoInfo:
        info = objects.info()
        return MemoInfo(info.hits, info.loads, flights.started, flights.joined, not_stored)

    def cache_clear() -> None:
        flights.forget_all()
        namespace.delete_prefix(prefix)
        objects.drop()

    def forget(*args: Any, **kwargs: Any) -> bool:
        at = key_of(args, kwargs)
        flights.forget(at)
        return objects.delete(at)

    wrapper.cache_info, wrapper.cache_clear, wrapper.forget = cache_info, cache_clear, forget
    return cast("Memoized[P, R]", wrapper)


def _name_of(function: Callable[..., Any]) -> str:
    """Return what tells this function from all others, in every process."""
    qualname = getattr(function, "__qualname__", None)
    if not isinstance(qualname, str) or "<lambda>" in qualname or getattr(function, "__closure__", None):
        raise ConfigError(
            f"{function!r} can't be told from others by its name, since it is a lambda, a closure, or has none: "
            "give it one with name="
        )
    module = function.__module__
    if module == "__main__":  # another one in every program
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        file = getattr(sys.modules["__main__"], "__file__", None)
        module = spec.name if spec else os.path.realpath(file) if file else "__main__"
    return f"{module}:{qualname}"


# ---- Keys ----------------------------------------------------------------------------------------


class _KeyMaker:
    """Makes the key of a call: the function's prefix and a digest of the arguments, however they were passed."""

    def __init__(self, function: Callable[..., Any], prefix: bytes, key: Callable[..., Any] | None) -> None:
        self._signature = inspect.signature(function)
        self._prefix = prefix
        self._key = key

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        digest = blake3()
        if self._key is not None:
            _encode(self._key(*args, **kwargs), digest.update, "what key= returned")
        else:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                digest.update(_text(name))
                _encode(value, digest.update, f"the argument {name!r}")
        return self._prefix + digest.digest()


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"s%d:%b" % (len(data), data)


def _encode(value: Any, write: Callable[[bytes], object], what: str) -> None:
    """Write the canonical form of a value: equal bytes for equal values of equal types, and for no others.

    A letter for the type, then what tells values apart, with lengths ahead: `N`one, `T`rue, `F`alse; `i`nt in decimal;
    `f`loat and `c`omplex by their bits; `s`tr in UTF-8; `b`ytes; `(` tuple, `[` list, with their members;
    `{` dict and `<` set, members sorted by their form; `a`rray of numpy by dtype, shape and bytes. A subclass could
    mean anything, so only these types themselves are taken. Raises InvalidKey for others.
    """
    kind = type(value)
    if value is None or kind is bool:
        write(b"N" if value is None else b"T" if value else b"F")
    elif kind is int:
        write(b"i%d;" % value if -(1 << 63) <= value < 1 << 63 else b"i%b;" % hex(value).encode())
    elif kind is float:
        write(b"f" + struct.pack(">d", value))
    elif kind is complex:
        write(b"c" + struct.pack(">dd", value.real, value.imag))
    elif kind is str:
        write(_text(value))
    elif kind is bytes:
        write(b"b%d:%b" % (len(value), value))
    elif kind is tuple or kind is list:
        write(b"%b%d:" % (b"(" if kind is tuple else b"[", len(value)))
        for member in value:
            _encode(member, write, what)
    elif kind is dict:
        write(b"{%d:" % len(value))
        for form in sorted(_form(item, what) for item in value.items()):
            write(form)
    elif kind is set or kind is frozenset:
        write(b"<%d:" % len(value))
        for form in sorted(_form(member, what) for member in value):
            write(form)
    elif isinstance(value, np.generic) or kind is np.ndarray:
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise InvalidKey(f"{what} is an array of objects, which has no canonical form; use key=")
        write(b"a" if kind is np.ndarray else b"g")
        write(_text(str(array.dtype.descr)))
        for name in _opaque_types(array.dtype):
            write(_text(name))
        _encode(array.shape, write, what)
        write(array.tobytes())
    else:
        raise InvalidKey(
            f"{what} holds a {kind.__module__}.{kind.__qualname__}, which has no canonical form; "
            "give memoize a key= that turns the arguments into a str, bytes, numbers, or tuples of them"
        )


def _opaque_types(dtype: np.dtype[Any]) -> Iterator[str]:
    """Yield the names of the types in it that are no more than bytes to numpy, such as those of ml_dtypes."""
    if dtype.fields is not None:
        for name in dtype.names or ():
            yield from _opaque_types(dtype.fields[name][0])
    elif dtype.subdtype is not None:
        yield from _opaque_types(dtype.subdtype[0])
    elif dtype.kind == "V":
        yield f"{dtype.type.__module__}.{dtype.type.__qualname__}"


def _form(value: Any, what: str) -> bytes:
    parts: list[bytes] = []
    _encode(value, parts.append, what)
    return b"".join(parts)


# ---- One computation at a time -------------------------------------------------------------------


class _Flight:
    """A computation; `thread` is 0 where it is a task's. Once `forgotten` nobody else joins it, and nobody keeps it."""

    def __init__(self, thread: int = 0) -> None:
        self.thread = thread
        self.forgotten = threading.Event()
        self.result: Future[Any] = Future()
        self.task: asyncio.Task[Any]


class _Flights:
    """Computations under way in this process: who asks for one that is, waits for it, and gets its error, too."""

    def __init__(self) -> None:
        self.started = self.joined = 0
        self._forget_parent()
        after_fork(self)

    def _forget_parent(self) -> None:
        """Also in a forked child: the threads that were computing are the parent's."""
        self._lock = threading.Lock()
        self._threads: dict[bytes, _Flight] = {}
        self._tasks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[bytes, _Flight]]
        self._tasks = weakref.WeakKeyDictionary()

    def forget(self, key: bytes) -> None:
        """Let who asks from now on compute it anew."""
        with self._lock:
            for flights in (self._threads, *self._tasks.values()):
                if (flight := flights.pop(key, None)) is not None:
                    flight.forgotten.set()

    def forget_all(self) -> None:
        """The same for all that are under way."""
        with self._lock:
            for flights in (self._threads, *self._tasks.values()):
                for flight in flights.values():
                    flight.forgotten.set()
                flights.clear()

    def join(self, key: bytes, compute: Callable[[_Flight], Any]) -> Any:
        me = threading.get_ident()
        with self._lock:
            flight = self._threads.get(key)
            mine = flight is None
            if flight is None:
                self.started += 1
                flight = self._threads[key] = _Flight(me)
            else:
                self.joined += 1
        if not mine:
            # A function that asks for its own result would wait for itself.
            return compute(flight) if flight.thread == me else flight.result.result()
        try:
            value = compute(flight)
        except BaseException as error:
            flight.result.set_exception(error)
            raise
        else:
            flight.result.set_result(value)
            return value
        finally:
            self._land(self._threads, key, flight)

    async def join_task(self, key: bytes, compute: Callable[[_Flight], Coroutine[Any, Any, Any]]) -> Any:
        loop = asyncio.get_running_loop()
        with self._lock:
            flights = self._tasks.setdefault(loop, {})
            flight = flights.get(key)
            if flight is None:
                self.started += 1
                flight = landing = flights[key] = _Flight()
                flight.task = loop.create_task(compute(flight))
                flight.task.add_done_callback(lambda _: self._land(flights, key, landing))
            else:
                self.joined += 1
        if flight.task is asyncio.current_task():
            return await compute(flight)  # a function that asks for its own result would wait for itself
        return await asyncio.shield(flight.task)  # whoever is cancelled doesn't take it from the others

    def _land(self, flights: dict[bytes, _Flight], key: bytes, flight: _Flight) -> None:
        with self._lock:
            if flights.get(key) is flight:
                del flights[key]
