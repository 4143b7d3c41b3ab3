"""What `kvstrata.open` takes, from where it may come: an argument, else the environment, else a file.

Every error names the source of the value that it is about. A file's path is `config=` or `$KVSTRATA_CONFIG`; none is
looked for elsewhere.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata.codecs.encryption import Keyring
from kvstrata.config import CacheOptions, parse_size
from kvstrata.errors import ConfigError, UnknownOption
from kvstrata.movement.prefetch import DEFAULT_IN_FLIGHT
from kvstrata.remote_url import RemoteURL

__all__ = ["Settings"]

_VARIABLES = "KVSTRATA_"
_YES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class _Option(NamedTuple):
    default: Any
    from_text: Callable[[str], Any]  # out of the environment; raises ValueError
    kinds: tuple[type, ...]  # in a file
    what: str


def _flag(text: str) -> bool:
    if text.strip().lower() not in _YES:
        raise ValueError
    return _YES[text.strip().lower()]


def _size(text: str) -> int | str:
    return int(text) if text.strip().isdigit() else text


_SIZE = "a size such as '512MiB'"
_OPTIONS = {
    "path": _Option(None, str, (str,), "the path of a directory"),
    "memory": _Option("1GiB", _size, (int, str), _SIZE),
    "disk": _Option(None, _size, (int, str), _SIZE),
    "disk_policy": _Option("fifo", str, (str,), '"fifo", "lru" or "ttl"'),
    "disk_write_limit": _Option(None, _size, (int, str), "a rate such as '50MiB/s'"),
    "disk_engine": _Option("log", str, (str,), '"log", "lsm" or "btree"'),
    "shared": _Option(True, _flag, (bool,), "yes or no"),
    "huge_pages": _Option(False, _flag, (bool,), "yes or no"),
    "prefetch": _Option(DEFAULT_IN_FLIGHT, _size, (int, str), _SIZE),
    "near": _Option(None, _size, (int, str), _SIZE),
    "encryption": _Option(None, str, (str,), "the path of a file of keys"),
    "remote": _Option((), str.split, (str, list), "a URL, or several"),
}
_NEAR_PART, _MOST_NEAR = 16, 64 << 20
_SIZES = ("memory", "disk", "disk_policy", "disk_write_limit", "disk_engine")


class Settings(NamedTuple):
    """The options of a cache, checked."""

    path: Path | None
    options: CacheOptions
    shared: bool
    huge_pages: bool
    prefetch: int
    near: int
    remotes: list[RemoteURL]
    keys: Keyring | None

    @property
    def places(self) -> list[str]:
        """Where the tiers elsewhere are, in their order."""
        return [remote.place for remote in self.remotes]

    @classmethod
    def gather(
        cls, arguments: Mapping[str, Any], *, config: str | os.PathLike[str] | None, environment: Mapping[str, str]
    ) -> Settings:
        """Take each option from the first that has it: `arguments` that aren't None, `environment`, the file.

        Raises ConfigError, which says where the value stands, and UnknownOption for a name in the file.
        """
        file = config if config is not None else environment.get(f"{_VARIABLES}CONFIG")
        stored = {} if file is None else _read(Path(file))
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, option in _OPTIONS.items():
            variable = _VARIABLES + name.upper()
            if arguments.get(name) is not None:
                values[name], sources[name] = arguments[name], ""
            elif variable in environment:
                sources[name] = f"${variable}"
                try:
                    values[name] = option.from_text(environment[variable])
                except ValueError:
                    raise ConfigError(f"${variable} must be {option.what}") from None
            elif name in stored:
                sources[name] = str(file)
                values[name] = stored[name]
                if type(stored[name]) not in option.kinds:
                    raise ConfigError(f"{file}: {name} must be {option.what}, not {type(stored[name]).__name__}")
            else:
                values[name], sources[name] = option.default, ""
        if values["disk_engine"] != "log" and values["remote"]:
            raise ConfigError("disk_engine='lsm' and 'btree' can't be combined with remote=; use disk_engine='log'")
        path = _told([sources["path"]], lambda: _directory(values["path"]))
        options = _told(
            [sources[name] for name in _SIZES],
            lambda: CacheOptions.parse(**{name: values[name] for name in _SIZES}, has_path=path is not None),
        )
        usual = min(options.memory // _NEAR_PART, _MOST_NEAR)
        near = usual if values["near"] is None else values["near"]
        return cls(
            path,
            options,
            bool(values["shared"]),
            bool(values["huge_pages"]),
            _told([sources["prefetch"]], lambda: parse_size(values["prefetch"], option="prefetch")),
            _told([sources["near"]], lambda: parse_size(near, option="near")),
            _told([sources["remote"]], lambda: _urls(values["remote"])),
            _told([sources["encryption"]], lambda: _keyring(values["encryption"])),
        )


def _directory(given: Any) -> Path | None:
    if given is None:
        return None
    if not os.fspath(given):
        raise ConfigError("path is empty; write '.' for the current directory")
    return Path(given).absolute()


def _keyring(given: Any) -> Keyring | None:
    if given is None or isinstance(given, Keyring):
        return given
    if callable(given):
        return Keyring(given)
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            "encryption takes the path of a file of keys, a function that returns them, or a Keyring, "
            f"not {type(given).__name__}"
        )
    return Keyring.from_file(given)


def _urls(remote: str | Sequence[str]) -> list[RemoteURL]:
    return [RemoteURL.parse(url) for url in ([remote] if isinstance(remote, str) else remote)]


def _told(sources: list[str], parse: Callable[[], Any]) -> Any:
    """Parse, and say in an error where its value came from, if that was no argument."""
    try:
        return parse()
    except ConfigError as error:
        places = " or ".join(dict.fromkeys(source for source in sources if source))
        if places:
            error.args = (f"{places}: {error}",)
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"can't read the configuration {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for name in stored:
        if name not in _OPTIONS:
            raise UnknownOption(f"option in {path}", name, _OPTIONS)
    return stored
