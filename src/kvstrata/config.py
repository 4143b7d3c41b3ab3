"""Sizes and options as users write them, turned into checked numbers."""

from __future__ import annotations

import re

import msgspec

from kvstrata.errors import ConfigError, UnknownOption

__all__ = ["CacheOptions", "check_name", "parse_duration", "parse_jitter", "parse_rate", "parse_size"]

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

MIN_MEMORY = 1 << 20
MIN_DISK = 4 << 20
MAX_MEMORY = (256 << 30) - (1 << 20)
MAX_SIZE = 1 << 45
DEFAULT_DISK = 8 << 30
DISK_POLICIES = ("fifo", "lru", "ttl")
DISK_ENGINES = ("log", "lsm", "btree")
MIN_ENGINE = 64 << 20


def parse_size(value: int | str, *, option: str = "size") -> int:
    """Return bytes from an int or a string such as "512MiB", "1.5 GiB" or "100MB"."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f"{option} must be an int or a string such as '512MiB', not {value!r}")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(f"{option}={value!r} is not a size; write a number of bytes or e.g. '512MiB'")
        value = int(float(match[1]) * unit)
    if not 0 <= value <= MAX_SIZE:
        raise ConfigError(f"{option}={value!r} is out of range (0 to {MAX_SIZE:,} bytes)")
    return value


def parse_rate(value: int | str, *, option: str) -> int:
    """Return bytes per second, more than 0, from an int or a string such as "50MiB/s"."""
    if isinstance(value, str):
        value = value.strip().removesuffix("/s")
    rate = parse_size(value, option=option)
    if rate == 0:
        raise ConfigError(f"{option} must be more than 0 bytes per second; None means no limit")
    return rate


def check_name(name: str, of: str) -> None:
    """Raise ConfigError unless this can be the name of a namespace or holder."""
    try:
        size = len(name.encode()) if isinstance(name, str) else 0
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= 128:
        raise ConfigError(f"a {of}'s name is a str of 1 to 128 bytes in UTF-8, not {name!r}")


def parse_duration(seconds: float | None, *, option: str = "ttl") -> int:
    """Return whole milliseconds from seconds; None gives 0, which means without end."""
    if seconds is None:
        return 0
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ConfigError(f"{option} must be a positive number of seconds or None, not {seconds!r}")
    if seconds > 10**10:
        raise ConfigError(f"{option}={seconds!r} is longer than 10**10 seconds; use None for no end")
    return max(1, int(seconds * 1000))


def parse_jitter(part: float) -> float:
    """Return the part of its time to live by which a record's may be shorter, 0 to 1; raises ConfigError."""
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 <= part <= 1:
        raise ConfigError(f"ttl_jitter must be a number from 0 to 1, not {part!r}")
    return float(part)


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What every process that opens one path must agree on; sizes in bytes, disk 0 means none."""

    memory: int
    disk: int
    disk_policy: str = "fifo"
    disk_write_limit: int = 0  # bytes per second, 0 = none; each process's own
    disk_engine: str = "log"

    @classmethod
    def parse(
        cls,
        *,
        memory: int | str,
        disk: int | str | None,
        has_path: bool,
        disk_policy: str = "fifo",
        disk_write_limit: int | str | None = None,
        disk_engine: str = "log",
    ) -> CacheOptions:
        """Check the arguments of `kvstrata.open`; raises ConfigError."""
        memory_bytes = parse_size(memory, option="memory")
        if memory_bytes < MIN_MEMORY:
            raise ConfigError(f"memory={memory!r} is too small; the least is {MIN_MEMORY:,} bytes")
        if memory_bytes > MAX_MEMORY:
            raise ConfigError(f"memory={memory!r} is too much for one cache; the most is {MAX_MEMORY:,} bytes")
        if disk is None:
            disk_bytes = DEFAULT_DISK if has_path else 0
        else:
            disk_bytes = parse_size(disk, option="disk")
        if disk_bytes and not has_path:
            raise ConfigError("disk needs a path: kvstrata.open('/some/directory', disk=...)")
        if 0 < disk_bytes < MIN_DISK:
            raise ConfigError(f"disk={disk!r} is too small; the least is {MIN_DISK:,} bytes, 0 means none")
        if disk_policy not in DISK_POLICIES:
            raise UnknownOption("disk_policy", disk_policy, DISK_POLICIES)
        limit = 0 if disk_write_limit is None else parse_rate(disk_write_limit, option="disk_write_limit")
        if disk_engine not in DISK_ENGINES:
            raise UnknownOption("disk_engine", disk_engine, DISK_ENGINES)
        if disk_engine != "log":
            if disk_bytes < MIN_ENGINE:
                raise ConfigError(
                    f"disk_engine={disk_engine!r} needs a path, and disk={MIN_ENGINE:,} bytes at least, not {disk!r}"
                )
            if disk_policy != "fifo" or limit:
                raise ConfigError(
                    f"disk_engine={disk_engine!r} can't have disk_policy={disk_policy!r} or a disk_write_limit: the "
                    "oldest leave it, and every put is written; leave these options out, or use disk_engine='log'"
                )
        return cls(
            memory=memory_bytes,
            disk=disk_bytes,
            disk_policy=disk_policy,
            disk_write_limit=limit,
            disk_engine=disk_engine,
        )

    @property
    def log(self) -> int:
        """The bytes of a log-structured disk tier, 0 where there is none or another engine."""
        return self.disk if self.disk_engine == "log" else 0

    def differences(self, other: CacheOptions) -> dict[str, tuple[object, object]]:
        """Return {option: (other's, ours)} for each option that differs."""
        return {
            name: (getattr(other, name), getattr(self, name))
            for name in self.__struct_fields__
            if getattr(other, name) != getattr(self, name)
        }
