"""Every exception that kvstrata raises.

KVStrataError
├── ConfigError (ValueError)        options that can't be used
│   ├── UnknownOption               a name that doesn't exist; says the nearest one that does
│   └── ConfigMismatch              this cache is open elsewhere with other options
├── InvalidKey (ValueError)         a key of the wrong type or length
├── InvalidValue (ValueError)       a value that is no contiguous buffer, or doesn't fit what it is for
├── FormatError                     files of a newer or foreign format
├── VersionConflict                 a namespace has moved on to a newer version
├── CacheClosed                     used after close()
├── TierError                       a tier could not do what was asked
│   ├── TierFull                    no room, and nothing that may leave
│   ├── TierUnavailable             locked, broken or gone; others go on
│   ├── CorruptRecord               a record that isn't what was stored
│   ├── WrongKey                    a record encrypted under a key that isn't known here
│   └── PrefixShortened             a prefix that is being loaded ends earlier than was said
├── UnsupportedModel                a model whose cache can't be represented
└── MissingExtra (ImportError)      an optional part that isn't installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CacheClosed",
    "ConfigError",
    "ConfigMismatch",
    "CorruptRecord",
    "FormatError",
    "InvalidKey",
    "InvalidValue",
    "KVStrataError",
    "MissingExtra",
    "PrefixShortened",
    "TierError",
    "TierFull",
    "TierUnavailable",
    "UnknownOption",
    "UnsupportedModel",
    "VersionConflict",
    "WrongKey",
]


class KVStrataError(Exception):
    """The root of every error below."""


class ConfigError(KVStrataError, ValueError):
    """An option has a value that can't be used."""


class UnknownOption(ConfigError):
    """A name that doesn't exist among `known`; the message names the nearest that does."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.known = sorted(known)
        near = difflib.get_close_matches(str(name), self.known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {', '.join(self.known)})")

    def __reduce__(self) -> tuple[type[UnknownOption], tuple[object, ...]]:
        return type(self), (self.kind, self.name, self.known)


class ConfigMismatch(ConfigError):
    """A cache or namespace is open with other options; the message says which, and with what."""

    @classmethod
    def of_cache(cls, path: str, differences: dict[str, tuple[object, object]]) -> ConfigMismatch:
        """Build it from {option: (theirs, ours)}."""
        told = ", ".join(
            f"{name}: open with {theirs!r}, asked for {ours!r}" for name, (theirs, ours) in differences.items()
        )
        return cls(
            f"the cache at {path} is already open with other options ({told}); "
            "use the same, or close it everywhere first"
        )


class InvalidKey(KVStrataError, ValueError):
    """A key that is neither str nor bytes, or not of 1 to 1,024 bytes."""


class InvalidValue(KVStrataError, ValueError):
    """A value that is no contiguous buffer, or that doesn't fit what it is for."""


class FormatError(KVStrataError):
    """A file of a format that this release doesn't read."""


class VersionConflict(KVStrataError):
    """A namespace has moved on to a newer version than the one asked for."""


class CacheClosed(KVStrataError):
    """The cache was used after close()."""


class TierError(KVStrataError):
    """A tier could not do what was asked."""


class TierFull(TierError):
    """No room for `need` bytes in `tier`, with `free` bytes left and nothing that may leave; `advice`: what to do."""

    def __init__(
        self,
        tier: str,
        need: int,
        free: int,
        advice: str = "open the cache larger, store smaller values or release pins",
    ) -> None:
        self.tier = tier
        self.need = need
        self.free = free
        self.advice = advice
        super().__init__(
            f"the {tier} tier has no room for {need:,} bytes ({free:,} free, and nothing else may leave); {advice}"
        )

    def __reduce__(self) -> tuple[type[TierFull], tuple[object, ...]]:
        return type(self), (self.tier, self.need, self.free, self.advice)


class TierUnavailable(TierError):
    """A tier can't be reached within its time limit, or is broken."""


class CorruptRecord(TierError):
    """A record is damaged, or isn't the one that was asked for."""


class WrongKey(TierError):
    """A record is encrypted under a key that isn't among those that are known."""


class PrefixShortened(TierError):
    """Of a prefix that is being loaded layer by layer, only the first `tokens` tokens are there in all layers.

    `layer` is the next one to come; the ones before it were given out for more tokens. What was computed with them has
    to be computed again, over `tokens` tokens.
    """

    def __init__(self, tokens: int, layer: int) -> None:
        self.tokens = tokens
        self.layer = layer
        super().__init__(
            f"blocks were lost before layer {layer} came: the prefix now ends after {tokens} tokens, in the layers "
            "before it, too; compute again what was computed over more"
        )

    def __reduce__(self) -> tuple[type[PrefixShortened], tuple[object, ...]]:
        return type(self), (self.tokens, self.layer)


class UnsupportedModel(KVStrataError):
    """A model whose attention cache can't be represented; the message says why."""


class MissingExtra(KVStrataError, ImportError):
    """An optional part that isn't installed; the message says how to install it."""

    def __init__(self, extra: str, package: str) -> None:
        self.extra = extra
        self.package = package
        super().__init__(f"this needs the package {package!r}: pip install 'kvstrata[{extra}]'")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[object, ...]]:
        return type(self), (self.extra, self.package)
