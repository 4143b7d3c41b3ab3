"""Opening a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal

from kvstrata.cache import Cache
from kvstrata.codecs.encryption import Keyring
from kvstrata.settings import Settings

__all__ = ["open"]


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    memory: int | str | None = None,
    disk: int | str | None = None,
    disk_policy: Literal["fifo", "lru", "ttl"] | None = None,
    disk_write_limit: int | str | None = None,
    disk_engine: Literal["log", "lsm", "btree"] | None = None,
    shared: bool | None = None,
    huge_pages: bool | None = None,
    prefetch: int | str | None = None,
    near: int | str | None = None,
    encryption: str | os.PathLike[str] | Callable[[], Sequence[bytes]] | Keyring | None = None,
    remote: str | Sequence[str] | None = None,
    config: str | os.PathLike[str] | None = None,
) -> Cache:
    """Open the cache at a directory, making it if need be; without one, a private cache that leaves nothing behind.

    Every process that opens the same path shares one memory tier of `memory` bytes (1 GiB) and one disk tier of at
    most `disk` bytes (8 GiB where there is a path; 0: no disk tier). Sizes are ints or strings such as "512MiB". All
    that have it open must agree on `memory`, `disk`, `disk_policy` and `remote`, or ConfigMismatch says how they
    differ. `shared=False` opens it for this process alone.

    `disk_policy` says what leaves a full disk first: "fifo", the oldest; "lru", the oldest, but what was used meanwhile
    stays; "ttl", what expires first. It is recorded with the cache. `disk_write_limit`, such as "50MiB/s", bounds what
    this process writes there, for the life of the device: what is beyond it stays in memory only.

    `disk_engine` says what keeps the records on disk: "log", segments under an index in shared memory; or for many
    small values, without an entry there for each, "lsm" (RocksDB, one process) or "btree" (LMDB); docs/engines.md says
    what differs. Raises MissingExtra without `kvstrata[lsm]` or `kvstrata[btree]`.

    `huge_pages=True` puts the memory tier into pages of 2 MiB, for this process and whoever attaches; it takes a
    while at opening, in which the memory is copied once. Raises ConfigError, saying what to do, when the kernel
    refuses.

    `prefetch` is how many bytes this process reads ahead at a time for `Namespace.prefetch` (64 MiB); 0: it does
    nothing.

    `near` is how many bytes of memory of its own this process uses to keep small values that it has read (up to 4 KiB
    each), which a get then returns without a copy as long as they are true: by default a 16th of `memory`, 64 MiB at
    most; 0: none.

    `encryption` is a file of keys, a function that returns them, or a `kvstrata.codecs.Keyring`: all values on the disk
    and in tiers elsewhere are encrypted then (AES-256-GCM); keys of records are not. Raises WrongKey where the disk's
    are encrypted under others, and MissingExtra without `kvstrata[encryption]`.

    `remote` names one or more tiers elsewhere, asked in that order after a miss here: "redis://user:pw@host:6379/0",
    "rediss://...", "redis+cluster://...", "unix:///path", "s3://bucket/prefix"; docs/remote.md has all of it. All
    processes of this host that open the path must name the same. Raises MissingExtra without `kvstrata[valkey]` or
    `kvstrata[s3]`.

    What isn't given comes from the environment ($KVSTRATA_PATH, $KVSTRATA_MEMORY, $KVSTRATA_DISK, ...; several remotes
    are parted by spaces), else from the TOML file `config` or $KVSTRATA_CONFIG, whose keys are these options.
    """
    settings = Settings.gather(
        {
            "path": path, "memory": memory, "disk": disk, "disk_policy": disk_policy,
            "disk_write_limit": disk_write_limit, "disk_engine": disk_engine, "shared": shared,
            "huge_pages": huge_pages, "prefetch": prefetch,
            "near": near, "encryption": encryption, "remote": remote,
        },
        config=config,
        environment=os.environ,
    )  # fmt: skip
    return Cache(settings)
