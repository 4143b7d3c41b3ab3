"""Tiers elsewhere as users name them: URLs, whose secrets nobody gets to see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvstrata.errors import ConfigError, UnknownOption
from kvstrata.tiers.base import RecordStore
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.keyed import KeyedTier
from kvstrata.tiers.keyed_space import MAX_PREFIX
from kvstrata.tiers.presence import FilterOptions

__all__ = ["RemoteURL"]

_VALKEY = ("redis", "rediss", "valkey", "valkeys", "unix")
_CLUSTER = ("redis+cluster", "rediss+cluster", "valkey+cluster", "valkeys+cluster")
_TLS = tuple(scheme for scheme in (*_VALKEY, *_CLUSTER) if scheme.partition("+")[0] in ("rediss", "valkeys"))
_SCHEMES = (*_VALKEY, *_CLUSTER, "s3")
_SECONDS = ("lookup_timeout", "change_timeout", "generation_ttl", "bloom_refresh")
_COMMON = (*_SECONDS, "bloom", "bloom_fp")
_VALKEY_OPTIONS = (
    *_COMMON, "prefix", "db", "username", "password_env", "password_file",
    "tls_ca", "tls_cert", "tls_key", "tls_verify",
)  # fmt: skip
_S3_OPTIONS = (
    *_COMMON, "endpoint", "region", "access_key", "access_key_env", "secret_key_env", "secret_key_file",
    "virtual_hosted",
)  # fmt: skip
_OF_PLACE = ("prefix", "db", "endpoint")
_LOOKUP_S = {"s3": 0.5}
_CHANGE_S = {"s3": 10.0}
_REFRESH_S = {"s3": 10.0}
_ESCAPE = "remote: escape / in a password as %2F, ? as %3F, # as %23 and @ as %40; @ also in a path"
_FILTERED = ("s3",)  # where a miss costs more than to find what others write a little later


class RemoteURL:
    """A tier elsewhere, parsed and checked. `label` names it without user, password or query."""

    def __init__(self, scheme: str, parts: SplitResult, options: dict[str, str]) -> None:
        self.scheme = scheme
        self._parts = parts
        self._options = options
        host = parts.hostname or ""
        if ":" in host:
            host = f"[{host}]"
        try:
            number = parts.port
        except ValueError:
            number = 0
        if number == 0:
            raise ConfigError(f"remote: the port of {scheme}://{host} is no number from 1 to 65535")
        port = "" if number is None else f":{number}"
        self.label = f"{scheme}://{host}{port}{parts.path}"

    def __repr__(self) -> str:
        return f"<remote {self.label}>"

    @property
    def place(self) -> str:
        """Where its records are: two with the same one share them, whoever logs in there and however they are asked."""
        return "&".join([self.label, *(f"{name}={self._options[name]}" for name in _OF_PLACE if name in self._options)])

    @classmethod
    def parse(cls, url: str) -> RemoteURL:
        """Check a URL; raises ConfigError and UnknownOption, neither of which repeats what may be secret."""
        if not isinstance(url, str):
            raise ConfigError(f"remote must be a URL or a sequence of URLs, not {type(url).__name__}")
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ConfigError("remote: this is no URL; write for instance 'redis://host:6379/0'") from None
        scheme = parts.scheme
        if scheme not in _SCHEMES:
            raise UnknownOption("kind of remote", scheme, _SCHEMES)
        if "@" in parts.path or parts.fragment:
            raise ConfigError(_ESCAPE)
        options: dict[str, str] = {}
        known = _S3_OPTIONS if scheme == "s3" else _VALKEY_OPTIONS
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name not in known:
                if "@" in parts.query:  # it may be the end of a password
                    raise ConfigError(_ESCAPE)
                raise UnknownOption(f"option of {scheme}://", name, known)
            if name in options:
                raise ConfigError(f"remote: {name} is given twice")
            options[name] = value
        parsed = cls(scheme, parts, options)
        parsed._check()
        return parsed

    def open(self) -> KeyedTier:
        """Make the tier; nothing is connected yet. Raises MissingExtra, and ConfigError where a secret is missing."""
        store = self._s3() if self.scheme == "s3" else self._valkey()
        return KeyedTier(
            store,
            prefix=self._prefix(),
            lookup_s=self._seconds("lookup_timeout", _LOOKUP_S.get(self.scheme, 0.05)),
            change_s=self._seconds("change_timeout", _CHANGE_S.get(self.scheme, 2.0)),
            generation_s=self._seconds("generation_ttl", 1.0),
            breaker=Breaker(self.label),
            bloom=self._bloom(),
        )

    # ---- Inside

    def _check(self) -> None:
        if self.scheme == "unix":
            if not self._parts.path:
                raise ConfigError("remote: unix:// needs the socket's path: 'unix:///run/valkey.sock'")
        elif not self._parts.hostname:
            what = "a bucket: 's3://bucket/prefix'" if self.scheme == "s3" else "a host: 'redis://host:6379/0'"
            raise ConfigError(f"remote: {self.scheme}:// needs {what}")
        for name in _SECONDS:
            self._seconds(name, 1.0)
        self._bloom()
        self._prefix()
        if self._database() and self.scheme in _CLUSTER:
            raise ConfigError(f"remote {self.label}: a cluster has no database but 0")
        self._check_twice()
        useless = [name for name in self._options if name.startswith("tls_")]
        if useless and self.scheme not in _TLS:
            raise ConfigError(f"remote {self.label}: {useless[0]} is for TLS: write rediss:// or valkeys://")
        for name in ("tls_verify", "virtual_hosted"):
            self._flag(name, default=True)

    def _check_twice(self) -> None:
        """Raise ConfigError where one of two ways to say something would count for nothing."""
        parts = self._parts
        user, secret = ("access_key", "secret_key") if self.scheme == "s3" else ("username", "password")
        for name, value in (("db", self._path_database()), (user, parts.username), (secret, parts.password)):
            given = [option for option in (name, f"{name}_env", f"{name}_file") if option in self._options]
            if len(given) > 1 or (given and value):
                where = "as two options" if len(given) > 1 else f"in the URL and as {given[0]}"
                raise ConfigError(f"remote {self.label}: {name} is given twice: {where}")

    def _seconds(self, name: str, default: float) -> float:
        text = self._options.get(name)
        try:
            seconds = default if text is None else float(text)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds <= 3600:
            raise ConfigError(f"remote {self.label}: {name}={text!r} must be a number of seconds from 0 to 3600")
        return seconds

    def _flag(self, name: str, *, default: bool) -> bool:
        text = self._options.get(name)
        if text not in (None, "yes", "no"):
            raise ConfigError(f"remote {self.label}: {name}={text!r} must be yes or no")
        return default if text is None else text == "yes"

    def _bloom(self) -> FilterOptions | None:
        text = self._options.get("bloom_fp", "0.01")
        try:
            fp_rate = float(text)
        except ValueError:
            fp_rate = 0.0
        if not 1e-6 <= fp_rate <= 0.5:
            raise ConfigError(f"remote {self.label}: bloom_fp={text!r} must be a number from 1e-6 to 0.5")
        refresh_s = self._seconds("bloom_refresh", _REFRESH_S.get(self.scheme, 1.0))
        wanted = self._flag("bloom", default=self.scheme in _FILTERED)
        return FilterOptions(fp_rate, refresh_s) if wanted else None

    def _prefix(self) -> bytes:
        prefix = self._options.get("prefix", "kvstrata").encode()
        if not 1 <= len(prefix) <= MAX_PREFIX:
            raise ConfigError(f"remote {self.label}: prefix must have 1 to {MAX_PREFIX} bytes")
        return prefix

    def _database(self) -> int:
        text = self._path_database() or self._options.get("db", "0")
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(f"remote {self.label}: the database must be a number, not {text!r}")
        return int(text)

    def _path_database(self) -> str:
        return "" if self.scheme in ("unix", "s3") else self._parts.path.strip("/")

    def _secret(self, name: str, default: str | None) -> str | None:
        """A secret that the URL names the place of, or holds."""
        variable, file = self._options.get(f"{name}_env"), self._options.get(f"{name}_file")
        if variable is not None:
            if variable not in os.environ:
                raise ConfigError(f"remote {self.label}: the environment has no variable {variable} ({name}_env)")
            return os.environ[variable]
        if file is not None:
            try:
                return Path(file).read_text().strip()
            except OSError as error:
                raise ConfigError(f"remote {self.label}: can't read {file} ({name}_file): {error.strerror}") from error
        return default

    def _valkey(self) -> RecordStore:
        from kvstrata.tiers.valkey import ValkeyStore

        parts = self._parts
        given = None if parts.password is None else unquote(parts.password)
        options: dict[str, Any] = {"password": self._secret("password", given)}
        user = unquote(parts.username) if parts.username else self._options.get("username")
        if user:
            options["username"] = user
        if self.scheme == "unix":
            options["path"] = unquote(parts.path)
        else:
            options |= {"host": parts.hostname, "port": parts.port or 6379}
        if self.scheme in _TLS:
            verify = self._flag("tls_verify", default=True)
            options |= {"ssl_cert_reqs": "required" if verify else "none", "ssl_check_hostname": verify}
            for ours, theirs in (("tls_ca", "ssl_ca_certs"), ("tls_cert", "ssl_certfile"), ("tls_key", "ssl_keyfile")):
                if ours in self._options:
                    options[theirs] = self._options[ours]
            if self.scheme in _CLUSTER:
                options["ssl"] = True
        if self.scheme not in _CLUSTER:
            options["db"] = self._database()
        return ValkeyStore(self.label, options, cluster=self.scheme in _CLUSTER)

    def _s3(self) -> RecordStore:
        from kvstrata.tiers.s3 import S3Store

        parts = self._parts
        options: dict[str, Any] = {}
        key = self._secret(
            "access_key", self._options.get("access_key") or (parts.username and unquote(parts.username))
        )
        secret = self._secret("secret_key", parts.password and unquote(parts.password))
        if key and secret:
            options |= {"access_key_id": key, "secret_access_key": secret}
        for name in ("endpoint", "region"):
            if name in self._options:
                options[name] = self._options[name]
        options["virtual_hosted_style_request"] = self._flag("virtual_hosted", default="endpoint" not in options)
        return S3Store(self.label, parts.hostname or "", unquote(parts.path.strip("/")), options)
