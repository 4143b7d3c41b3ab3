"""What a namespace is opened with: checked, in the form that the cache and the core want."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from kvstrata import _core
from kvstrata.codecs.base import Codec, TensorInfo
from kvstrata.codecs.registry import codec as codec_named
from kvstrata.config import CacheOptions, check_name, parse_size
from kvstrata.errors import ConfigError, UnknownOption
from kvstrata.tiers.encodings import Encoding

if TYPE_CHECKING:
    from kvstrata.codecs.encryption import Sealer

__all__ = ["SpaceOptions", "checked_encodings", "checked_options"]

_ENCODING_TIERS = ("disk", "remote")
_ADMISSION = {"all": 1, "reused": 2, "frequent": 4}  # how often something has to be wanted lately


class SpaceOptions(NamedTuple):
    """What everybody who has a namespace open agrees on; quota and guarantee in bytes, 0 = none."""

    name: str
    version: int = 1
    policy: str = "lru"
    quota: int = 0
    guarantee: int = 0
    immutable: bool = False
    admission: int = 1  # how often a key has to be wanted before its record goes to the disk
    write_back: bool = False
    remote: bool = True  # changes are told to the tiers elsewhere
    disk_quota: int = 0  # the tier below keeps it

    def native(self) -> tuple[str, int, str, int, int, bool, int, bool, bool]:
        """What the core has to know."""
        return self[:9]


def checked_options(
    cache: CacheOptions,
    name: str,
    *,
    version: int,
    policy: str,
    quota: int | str | None,
    disk_quota: int | str | None,
    guarantee: int | str | None,
    immutable: bool,
    admission: str,
    write: str,
    remote: bool,
) -> SpaceOptions:
    """Return what `Cache.namespace` was called with; raises ConfigError and UnknownOption."""
    check_name(name, "namespace")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 2**32:
        raise ConfigError(f"version must be an int from 1 on, not {version!r}")
    if name == "default" and version != 1:
        raise ConfigError("the namespace 'default', which is the cache itself, has no versions; use another name")
    if policy not in _core.policy_names():
        raise UnknownOption("policy", policy, _core.policy_names())
    if admission not in _ADMISSION:
        raise UnknownOption("admission", admission, _ADMISSION)
    if write not in ("behind", "through", "back"):
        raise UnknownOption("write", write, ["behind", "through", "back"])
    if write == "through" and not cache.disk:
        raise ConfigError("write='through' needs a disk tier: kvstrata.open('/some/directory', disk=...)")
    quota_bytes = 0 if quota is None else parse_size(quota, option="quota")
    if quota is not None and quota_bytes == 0:
        raise ConfigError("quota must be more than 0 bytes; None means no limit")
    disk_quota_bytes = 0 if disk_quota is None else parse_size(disk_quota, option="disk_quota")
    if disk_quota is not None and not (disk_quota_bytes and cache.disk):
        raise ConfigError("disk_quota must be more than 0 bytes, and needs a disk tier; None means no limit")
    guaranteed = 0 if guarantee is None else parse_size(guarantee, option="guarantee")
    if guaranteed > cache.memory // 4 * 3:
        raise ConfigError(f"guarantee={guarantee!r} is more than 3/4 of the memory, {cache.memory:,} bytes")
    if quota_bytes and guaranteed > quota_bytes:
        raise ConfigError(f"guarantee={guarantee!r} is more than the quota, {quota!r}")
    if cache.disk_engine != "log" and (admission != "all" or write == "back" or disk_quota is not None or not remote):
        raise ConfigError(
            f"with disk_engine={cache.disk_engine!r} every put is written: a namespace can't have "
            "admission, write='back', a disk_quota or remote=False; leave these out, or use disk_engine='log'"
        )
    return SpaceOptions(
        name,
        version,
        policy,
        quota_bytes,
        guaranteed,
        bool(immutable),
        _ADMISSION[admission],
        write == "back",
        bool(remote),
        disk_quota_bytes,
    )


def checked_encodings(
    wanted: str | Codec | Mapping[str, str | Codec] | None, tensor: TensorInfo | None, sealer: Sealer | None
) -> dict[str, Encoding]:
    """Return by tier how values are encoded there; raises ConfigError and UnknownOption."""
    if wanted is None:
        return {}
    by_tier = wanted if isinstance(wanted, Mapping) else dict.fromkeys(_ENCODING_TIERS, wanted)
    encodings = {}
    for tier, spec in by_tier.items():
        if tier == "memory":
            if codec_named(spec).name != "raw":
                raise ConfigError(f"values in memory are as they were put: codec={{'memory': {spec!r}}} can't be")
            continue
        if tier not in _ENCODING_TIERS:
            raise UnknownOption("tier with a codec", tier, ["memory", *_ENCODING_TIERS])
        chosen = codec_named(spec)
        if chosen.lossy and tensor is None:
            raise ConfigError(f"codec={spec!r} is lossy and has to know what it encodes: tensor=TensorInfo(...)")
        encodings[tier] = Encoding(chosen, tensor, sealer)
    return encodings
