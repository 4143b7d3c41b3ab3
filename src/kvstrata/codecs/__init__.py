"""How payloads are encoded: `codec("zstd:3")` and the like. docs/codecs.md says which to choose."""

from kvstrata.codecs.base import AXES, Codec, ErrorStats, PartError, TensorInfo
from kvstrata.codecs.registry import CODECS, codec, decoder, encode
from kvstrata.codecs.zstd import train_dictionary

__all__ = [
    "AXES",
    "CODECS",
    "Codec",
    "ErrorStats",
    "PartError",
    "TensorInfo",
    "codec",
    "decoder",
    "encode",
    "train_dictionary",
]
