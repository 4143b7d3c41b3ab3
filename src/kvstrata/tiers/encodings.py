"""What becomes of values below memory: encoded by the codec of their namespace, and sealed where the cache has keys.

Records say themselves how they were encoded, so any process reads them, whatever codec it would use itself; only
dictionaries and keys have to be known.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvstrata.codecs.base import Codec, TensorInfo, bytes_of
from kvstrata.codecs.encryption import SEALED, Keyring, Sealer
from kvstrata.codecs.raw import Raw
from kvstrata.codecs.registry import decoder, encode
from kvstrata.codecs.zstd import Zstd
from kvstrata.errors import ConfigError, CorruptRecord, FormatError, InvalidValue, WrongKey
from kvstrata.record import Record

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstrata._core import DirtyRecord

__all__ = ["KEYS_FILE", "TAILED", "Encoding", "Encodings", "Tail", "check_keys", "keys_in_use"]

KEYS_FILE = "encryption.json"
_IDENTITY = struct.Struct("<IIIQ")  # namespace, version, epoch, number
_RAW = Raw()

TAILED = 64
"""The codec number of values of which only the first part, a tensor, is encoded; by which codec, is inside."""

Tail = Callable[[memoryview, bytes], bytes]
_TAIL = struct.Struct("<BB2xI")  # version, number of the codec, bytes of the tail


class Encoding:
    """How the values of a namespace are stored in a tier: by a codec, told what tensors they are, and sealed.

    A value that isn't such a tensor is stored raw, as is one that the codec doesn't make smaller.
    """

    def __init__(self, codec: Codec = _RAW, tensor: TensorInfo | None = None, sealer: Sealer | None = None) -> None:
        self.codec = codec
        self.tensor = tensor
        self.sealer = sealer
        self.tail: Tail | None = None
        """Makes what stands behind a tensor that a lossy codec has changed, of its bytes and the record's key."""

    @property
    def plain(self) -> bool:
        """Whether it leaves values as they are."""
        return self.codec.id == _RAW.id and self.sealer is None

    def encode(self, value: Buffer, identity: bytes, key: bytes) -> tuple[int, Buffer]:
        """Return the number for the record's header, 0 for raw, and the payload.

        Raises InvalidValue for more than can be sealed.
        """
        try:
            number, payload = self._encode(bytes_of(value), key)
        except InvalidValue:
            number, payload = _RAW.id, value
        if self.sealer is None:
            return number, payload
        return SEALED, self.sealer.seal(number, payload, identity)

    def _encode(self, value: memoryview, key: bytes) -> tuple[int, Buffer]:
        """Encode a value: a tensor, maybe with something behind it."""
        size = value.nbytes if self.tensor is None else self.tensor.nbytes
        if value.nbytes <= size or self.codec.id == _RAW.id:
            return encode(self.codec, value, self.tensor)
        number, payload = encode(self.codec, value[:size], self.tensor)
        if number == _RAW.id:
            return number, value
        tail = bytes(value[size:])
        if self.codec.lossy and self.tail is not None:
            decoded = memoryview(bytearray(size))
            self.codec.decode_into(payload, decoded)
            tail = self.tail(decoded, key)
        return TAILED, b"".join((_TAIL.pack(1, number, len(tail)), tail, payload))

    def decode(self, number: int, payload: Buffer, identity: bytes, length: int) -> bytearray:
        """Return the value, which has `length` bytes; raises CorruptRecord, also where the payload says otherwise.

        Raises WrongKey as well.
        """
        parts = self._parts(number, payload, identity, length)
        try:
            out = bytearray(length)
        except MemoryError:
            raise CorruptRecord(f"there is no memory for a value of {length:,} bytes") from None
        parts.decode_into(memoryview(out))
        return out

    def decode_into(self, number: int, payload: Buffer, identity: bytes, out: Buffer) -> None:
        """Fill `out`, which has the value's bytes; raises CorruptRecord and WrongKey."""
        target = bytes_of(out)
        self._parts(number, payload, identity, target.nbytes).decode_into(target)

    def _parts(self, number: int, payload: Buffer, identity: bytes, length: int) -> _Parts:
        if number == SEALED:
            if self.sealer is None:
                raise WrongKey("this was encrypted; open the cache with the keys: encryption=...")
            number, payload = self.sealer.open(payload, identity)
        tail, data = memoryview(b""), bytes_of(payload)
        if number == TAILED:
            number, tail, data = _parted(data)
        known = self.codec
        try:
            chosen = known if isinstance(known, Zstd) and number == known.id else decoder(number)
        except FormatError as error:
            raise CorruptRecord(str(error)) from error
        parts = _Parts(chosen, data, tail)
        if parts.value_len != length:
            raise CorruptRecord("a payload of another length than its value")
        return parts


class _Parts(NamedTuple):
    """What a payload consists of."""

    codec: Codec
    payload: memoryview
    tail: memoryview

    @property
    def value_len(self) -> int:
        """Bytes of the value, as its own checked header says."""
        return self.codec.value_len(self.payload) + self.tail.nbytes

    def decode_into(self, out: memoryview) -> None:
        start = out.nbytes - self.tail.nbytes
        out[start:] = self.tail
        try:
            self.codec.decode_into(self.payload, out[:start])
        except ConfigError as error:  # a dictionary that isn't known here
            raise WrongKey(str(error)) from error


def _parted(payload: memoryview) -> tuple[int, memoryview, memoryview]:
    """Return the number of the codec before the tail, the tail, and the payload of what stands before it."""
    if payload.nbytes < _TAIL.size:
        raise CorruptRecord("a payload with a tail is too short")
    version, number, length = _TAIL.unpack_from(payload)
    if version != 1 or number in (TAILED, SEALED) or length > payload.nbytes - _TAIL.size:
        raise CorruptRecord("a payload with a tail is damaged")
    start = _TAIL.size + length
    return number, payload[_TAIL.size : start], payload[start:]


class Encodings:
    """The encodings of all namespaces in the disk tier. `sealer`: the cache has keys."""

    def __init__(self, sealer: Sealer | None) -> None:
        self._default = Encoding(sealer=sealer)
        self._of: dict[int, Encoding] = {}

    def set(self, ns: int, encoding: Encoding | None) -> None:
        """From now on values of that namespace are encoded so; None: as those of others."""
        if encoding is None:
            self._of.pop(ns, None)
        else:
            self._of[ns] = encoding

    def apply(self, record: DirtyRecord, seed: int) -> None:
        """Let a record that is on its way down be stored as its namespace wants it; raises as `Encoding.encode`."""
        encoding = self._of.get(record.ns, self._default)
        if encoding.plain:
            return
        start = record.payload_offset
        value = record.view[start : start + record.stored_len]
        identity = _IDENTITY.pack(record.ns, record.version, record.epoch, record.seq) + record.key
        number, payload = encoding.encode(value, identity, record.key)
        if number != _RAW.id:
            record.encode(payload, codec=number, seed=seed)

    def decode_into(self, record: Record, payload: Buffer, out: Buffer) -> None:
        """Fill `out` with the value of a record; raises CorruptRecord and WrongKey."""
        encoding = self._of.get(record.ns, self._default)
        identity = _IDENTITY.pack(record.ns, record.version, record.epoch, record.seq) + record.key
        encoding.decode_into(record.codec, payload, identity, out)


def check_keys(directory: Path, keys: Keyring | None) -> None:
    """Raise WrongKey if values in the directory are encrypted, and under keys that aren't known."""
    try:
        used = [bytes.fromhex(number) for number in json.loads((directory / KEYS_FILE).read_bytes())]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        return  # damaged: what can't be opened is told then
    if keys is None:
        raise WrongKey(f"the values in {directory} are encrypted; open the cache with the keys: encryption=...")
    unknown = [number for number in used if not keys.knows(number)]
    if len(unknown) == len(used):
        listed = ", ".join(number.hex() for number in unknown)
        raise WrongKey(f"the values in {directory} are encrypted under the keys {listed}; none of them is given")


def keys_in_use(directory: Path, keys: Keyring) -> bytes | None:
    """Return what KEYS_FILE has to say from now on; None when it says so."""
    try:
        used = list(json.loads((directory / KEYS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        used = []
    newest = keys.newest[0].hex()
    return None if newest in used else json.dumps([*used, newest]).encode()
