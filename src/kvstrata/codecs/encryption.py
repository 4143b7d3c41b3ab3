"""Encryption of payloads where they are at rest: AES-256-GCM, over what a codec made (`kvstrata[encryption]`).

    keys = Keyring.from_file("/etc/kvstrata/keys")      # 64 hex digits a line, the newest last
    sealer = Sealer(keys)
    payload = sealer.seal(number, encoded, identity)    # in a record with codec SEALED
    number, encoded = sealer.open(payload, identity)

`identity` is what the payload belongs to: any bytes, which aren't stored. A payload that is moved to another record
doesn't open there. To change keys, add a line to the file: new payloads are sealed under it, older ones open with
theirs.

Nonces are 96 random bits, so one key is good for 2**32 payloads (NIST SP 800-38D, 8.3); change it before.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3

from kvstrata.codecs.base import bytes_of
from kvstrata.errors import ConfigError, CorruptRecord, InvalidValue, MissingExtra, WrongKey
from kvstrata.forking import after_fork

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["KEY_BYTES", "SEALED", "Keyring", "Sealer", "key_id"]

SEALED = 128
"""The codec number of records whose payload is sealed; which codec made it is inside."""

KEY_BYTES = 32

_VERSION = 1
_HEADER = struct.Struct("<BB2x8s12s")  # version, number of the codec inside, key id, nonce
_TAG = 16
_MOST = (1 << 31) - 1 - _TAG  # what the library takes at once
_ASK_AGAIN_S = 1.0  # after which a key that wasn't known may be
_MOST_UNKNOWN = 1024  # ids that are remembered
_KEY_ID = "kvstrata 2026-11-25 id of an encryption key"


def key_id(key: bytes) -> bytes:
    """Return the 8 bytes that name a key in payloads; they tell nothing of it."""
    return blake3.blake3(key, derive_key_context=_KEY_ID).digest(length=8)


class Keyring:
    """The keys that are known, the newest last: it seals, all open.

    keys: 32 bytes each, or what returns them; that is called again when a payload's key isn't among them, once a second
    at most for each, so keys can be added while the cache is open. Raises ConfigError for what are no keys.
    """

    __slots__ = ("__weakref__", "_asking", "_keys", "_lock", "_newest", "_source", "_unknown")

    def __init__(self, keys: Sequence[bytes] | Callable[[], Sequence[bytes]]) -> None:
        if not callable(keys):
            fixed = list(keys)
            self._source: Callable[[], Sequence[bytes]] | None = None
        else:
            self._source = keys
            fixed = list(keys())
        self._unknown: dict[bytes, tuple[float, str]] = {}  # by id: when it was asked for, and what went wrong
        self._forget_parent()
        self._take(fixed)
        after_fork(self)

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()
        self._asking = threading.Lock()

    def __repr__(self) -> str:
        return f"<kvstrata keyring, {len(self._keys)} keys, newest {self._newest[0].hex()}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a keyring isn't pickled: its keys would go along")

    @classmethod
    def from_file(cls, file: str | os.PathLike[str]) -> Keyring:
        """Read keys from a file of lines with 64 hex digits; lines that are empty or begin with # don't count.

        Raises ConfigError when it can't be read, when others than its owner may read it, or for another line.
        """
        return cls(lambda: _keys_in(Path(file)))

    @property
    def newest(self) -> tuple[bytes, bytes]:
        """The key that seals: its id, and itself."""
        return self._newest

    def knows(self, number: bytes) -> bool:
        """Say whether the key with that id is among them."""
        return number in self._keys

    def find(self, number: bytes) -> bytes:
        """Return the key with that id; raises WrongKey, also when the keys can't be read again."""
        key = self._keys.get(number)
        if key is not None:
            return key
        cause, trouble = None, ""
        if self._source is not None:
            with self._asking:  # one for all
                asked_at, trouble = self._unknown.get(number, (float("-inf"), ""))
                if number not in self._keys and time.monotonic() - asked_at >= _ASK_AGAIN_S:
                    try:
                        self.refresh()
                        trouble = ""
                    except Exception as error:  # noqa: BLE001 - whatever a source raises: values without a key are misses
                        cause, trouble = error, f"; they can't be read again ({type(error).__name__})"
                    if len(self._unknown) >= _MOST_UNKNOWN:
                        self._unknown.clear()
                    self._unknown[number] = time.monotonic(), trouble
            key = self._keys.get(number)
        if key is None:
            raise WrongKey(
                f"this was encrypted under the key {number.hex()}, which isn't among the "
                f"{len(self._keys)} that are known; add it to the keyring{trouble}"
            ) from cause
        return key

    def refresh(self) -> None:
        """Read the keys again, if they come from a file or a function; a newer one seals from now on."""
        if self._source is not None:
            self._take(list(self._source()))

    def _take(self, keys: list[bytes]) -> None:
        if not keys:
            raise ConfigError("there is no key")
        for key in keys:
            if not isinstance(key, bytes) or len(key) != KEY_BYTES:
                raise ConfigError(
                    f"a key has {KEY_BYTES} bytes; one of these is {type(key).__name__} or has another length"
                )
        with self._lock:
            self._keys = {key_id(key): key for key in keys}
            self._newest = (key_id(keys[-1]), keys[-1])


class Sealer:
    """Seals and opens payloads, from several threads if need be.

    Raises MissingExtra without `kvstrata[encryption]`.
    """

    __slots__ = ("_aesgcm", "_invalid_tag", "_keys")

    def __init__(self, keys: Keyring) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise MissingExtra("encryption", "cryptography") from None
        self._keys = keys
        self._aesgcm: Any = AESGCM
        self._invalid_tag: type[Exception] = InvalidTag

    def __repr__(self) -> str:
        return f"<kvstrata sealer over {self._keys!r}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a sealer isn't pickled: its keys would go along")

    def seal(self, number: int, payload: Buffer, identity: bytes) -> bytes:
        """Return `payload`, made by the codec with that number, encrypted under the newest key.

        It opens with the same `identity` only. Raises InvalidValue for 2 GiB and more.
        """
        data = bytes_of(payload, "a payload")
        if data.nbytes > _MOST:
            raise InvalidValue(f"at most {_MOST:,} bytes can be encrypted, not {data.nbytes:,}; store smaller values")
        name, key = self._keys.newest
        nonce = os.urandom(12)
        header = _HEADER.pack(_VERSION, number, name, nonce)
        sealed: bytes = self._aesgcm(key).encrypt(nonce, data, header + identity)
        return header + sealed

    def open(self, payload: Buffer, identity: bytes) -> tuple[int, bytes]:
        """Return the number of the codec, and the payload that was sealed.

        Raises WrongKey when its key isn't known, CorruptRecord when it was changed or sealed with another identity.
        """
        data = bytes_of(payload, "a payload")
        if data.nbytes < _HEADER.size + _TAG:
            raise CorruptRecord("an encrypted payload is too short")
        version, number, name, nonce = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise CorruptRecord(f"an encrypted payload has version {version}; this release reads {_VERSION}")
        associated = bytes(data[: _HEADER.size]) + identity
        key = self._keys.find(name)
        try:
            opened: bytes = self._aesgcm(key).decrypt(nonce, data[_HEADER.size :], associated)
        except self._invalid_tag:
            raise CorruptRecord(
                f"an encrypted payload was changed, or belongs to another record (key {name.hex()})"
            ) from None
        return number, opened


def _keys_in(file: Path) -> list[bytes]:
    try:
        with file.open(encoding="ascii") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            lines = opened.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of keys {file} can't be read: {error}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(f"others than its owner may use the file of keys {file}: chmod 600 it")
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            keys.append(bytes.fromhex(text))
        except ValueError:
            keys.append(b"")
        if len(keys[-1]) != KEY_BYTES:
            raise ConfigError(f"line {number} of {file} is no key of {2 * KEY_BYTES} hex digits") from None
    if not keys:
        raise ConfigError(f"the file of keys {file} holds none; `openssl rand -hex {KEY_BYTES}` makes one")
    return keys
