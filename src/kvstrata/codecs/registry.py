"""Codecs by name, as users write them, and by number, as records have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvstrata.codecs.base import Codec, TensorInfo, bytes_of
from kvstrata.codecs.container import ChunkedCodec
from kvstrata.codecs.fp8 import Fp8E4m3
from kvstrata.codecs.int4 import Int4
from kvstrata.codecs.int8 import Int8
from kvstrata.codecs.lz4 import Lz4
from kvstrata.codecs.planes import Planes
from kvstrata.codecs.raw import Raw
from kvstrata.codecs.zstd import Zstd
from kvstrata.errors import ConfigError, FormatError, UnknownOption

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CODECS", "codec", "decoder", "encode"]

CODECS: dict[str, type[Raw] | type[ChunkedCodec]] = {
    kind.name: kind for kind in (Raw, Lz4, Zstd, Planes, Int8, Int4, Fp8E4m3)
}
"""All that there are, by name."""

_RAW = Raw()


def codec(spec: str | Codec, **options: Any) -> Codec:
    """Return the codec that the text names: "raw", "zstd:3", "int4:group=32,scales=f8".

    Behind the colon stand options, separated by commas; the first may go without its name. `options` are added to
    them, and can be what has no text (the dictionary of zstd). A Codec is returned as it is.
    Raises UnknownOption for a name that doesn't exist, ConfigError for a value that can't be used.
    """
    if not isinstance(spec, str):
        if isinstance(spec, Codec) and not options:
            return spec
        raise ConfigError(f"a codec is named in a str such as 'zstd:3', not {spec!r}")
    name, _, rest = spec.partition(":")
    kind = CODECS.get(name.strip())
    if kind is None:
        raise UnknownOption("codec", name.strip(), CODECS)
    given: dict[str, Any] = {}
    for number, item in enumerate(part.strip() for part in rest.split(",") if part.strip()):
        key, equals, text = item.partition("=")
        if not equals and number == 0 and kind.first_setting:
            key, text = kind.first_setting, item
        key = key.strip()
        if key not in kind.settings:
            raise UnknownOption(f"option of codec {name}", key, kind.settings)
        try:
            given[key] = kind.settings[key](text.strip())
        except ValueError:
            raise ConfigError(f"codec {spec!r}: {key} can't be {text.strip()!r}") from None
    try:
        return kind(**given, **options)
    except TypeError as error:
        raise ConfigError(f"codec {spec!r}: {error}") from None


def decoder(number: int, *, dictionaries: Iterable[Buffer] = ()) -> Codec:
    """Return a codec that decodes the payloads of records with that number in their header.

    dictionaries: those that values may have been compressed with.
    Raises FormatError for a number that this release doesn't know.
    """
    for kind in CODECS.values():
        if kind.id == number:
            return Zstd(dictionaries=dictionaries) if kind is Zstd else kind()
    raise FormatError(f"codec {number} is not one that this release knows; a newer one wrote the record")


def encode(chosen: Codec, value: Buffer, tensor: TensorInfo | None = None) -> tuple[int, Buffer]:
    """Return the number for the record's header, and the payload: raw (0) if the codec's isn't smaller than the value.

    Raises InvalidValue as `chosen.encode` does.
    """
    payload = chosen.encode(value, tensor)
    view = bytes_of(value)
    if chosen.id != _RAW.id and len(memoryview(payload)) >= view.nbytes:
        return _RAW.id, view
    return chosen.id, payload
