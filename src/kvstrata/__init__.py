"""kvstrata: the embedded, tiered KV-cache for model inference."""

from kvstrata.cache import Cache
from kvstrata.namespace import Namespace
from kvstrata.opening import open
from kvstrata.prefix import KVLayout, Match, PrefixCache

__version__ = "0.1.0"

__all__ = ["Cache", "KVLayout", "Match", "Namespace", "PrefixCache", "__version__", "open"]
