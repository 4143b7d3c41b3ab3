"""The memory tier: one mapping per cache, private or shared by every process that opens the same path."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kvstrata import _core
from kvstrata.config import CacheOptions
from kvstrata.errors import ConfigError, ConfigMismatch, FormatError, TierFull, TierUnavailable

__all__ = ["MemoryTier"]

_FORMAT = 1
_SETUP_PATIENCE_S = 30.0


class _Identity(msgspec.Struct, frozen=True):
    """What `identity.json` in the directory says: which cache this is, and the seed of its header checksums."""

    format: int
    id: str
    seed: int


class MemoryTier:
    """Opens, shares and finally removes the mapping; the verbs are those of its `store`."""

    name = "memory"

    def __init__(self, store: _core.Store, directory: Path | None, file: Path | None, users: int | None) -> None:
        self.store = store
        self.directory = directory
        self._file = file
        self._users = users  # descriptor of the lock that says how this process uses the directory

    # ---- Opening

    @classmethod
    def open(
        cls, directory: Path | None, options: CacheOptions, *, shared: bool, restore: Callable[[_core.Store], None]
    ) -> MemoryTier:
        """Open the tier of this directory; None makes a private one that leaves nothing behind.

        A new mapping is handed to `restore`, which tells it what lies below, before anybody else can attach to it.

        Raises ConfigMismatch when it is open with other options, or exclusively, and ConfigError when the directory
        can't be used.
        """
        if directory is None:
            with _explained(options):
                return cls(_core.Store.open_private(options.memory), None, None, None)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            users = os.open(directory / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"can't use {directory} as a cache: {error.strerror or error}") from error
        try:
            _claim_directory(users, directory, shared)
            with _setup_lock(directory):
                identity = _identity(directory)
                if shared:
                    file = _shared_file(directory, identity)
                    store = _open_shared(file, directory, options, identity.seed, restore)
                    return cls(store, directory, file, users)
                with _explained(options):
                    store = _core.Store.open_private(options.memory, options.disk, identity.seed)
                restore(store)
                return cls(store, directory, None, users)
        except BaseException:
            os.close(users)
            raise

    # ---- Forking and closing

    def leave_to_parent(self) -> None:
        """In a forked child: let go of what is the parent's, at once, so that its death can be seen."""
        self.store.leave_to_parent()
        if self._users is not None and self._file is not None:
            os.close(self._users)
            assert self.directory is not None
            self._users = os.open(self.directory / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def attach_again(self) -> None:
        """In a forked child: take a place of its own in the same mapping."""
        if self._users is not None and self._file is not None:
            assert self.directory is not None
            _claim_directory(self._users, self.directory, shared=True)
        self.store.attach_again()

    def close(self) -> None:
        """Leave the mapping; the last one out removes it."""
        self.store.close()
        if self.directory is not None and self._file is not None:
            try:
                with _setup_lock(self.directory):
                    if not _core.probe(str(self._file))[3]:
                        self._file.unlink(missing_ok=True)
            except OSError:
                pass  # the directory has gone; the next open of this path makes another cache
        if self._users is not None:
            os.close(self._users)
            self._users = None


def _claim_directory(users: int, directory: Path, shared: bool) -> None:
    try:
        fcntl.flock(users, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        how = "exclusively (shared=False)" if shared else "elsewhere, and shared=False wants it alone"
        raise ConfigMismatch(f"the cache at {directory} is already open {how}; close it there first") from None


@contextmanager
def _setup_lock(directory: Path) -> Iterator[None]:
    """Hold the lock under which the mapping is made, attached and removed."""
    descriptor = os.open(directory / "setup.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + _SETUP_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TierUnavailable(
                        f"another process has been opening the cache at {directory} for {_SETUP_PATIENCE_S:.0f} s; is it stopped?"
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def _identity(directory: Path) -> _Identity:
    """Read which cache this directory holds; a new or unreadable one becomes a new cache."""
    path = directory / "identity.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Identity)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        found = _Identity(_FORMAT, secrets.token_hex(16), secrets.randbits(32))
        draft = directory / f"identity.json.{os.getpid()}"
        draft.write_bytes(msgspec.json.encode(found))
        draft.replace(path)
    if found.format > _FORMAT:
        raise FormatError(f"{directory} has format {found.format}, this release reads format {_FORMAT}; upgrade kvstrata")
    return found


def _shared_file(directory: Path, identity: _Identity) -> Path:
    """Name the mapping's file: the same for every process on this host, another for a copy of the directory."""
    place = directory.stat()
    digest = hashlib.blake2b(f"{identity.id} {place.st_dev} {place.st_ino}".encode(), digest_size=8).hexdigest()
    return Path(os.environ.get("KVSTRATA_SHM_DIR", "/dev/shm")) / f"kvstrata-{os.getuid()}-{digest}"


def _open_shared(
    file: Path, directory: Path, options: CacheOptions, seed: int, restore: Callable[[_core.Store], None]
) -> _core.Store:
    exists, ready, format, in_use, memory, disk = _core.probe(str(file))
    if exists and not in_use and (not ready or (memory, disk) != (options.memory, options.disk)):
        file.unlink()  # left by processes that were killed, and of no use now
        exists = False
    if exists:
        if not ready:
            raise FormatError(f"{file} is in use by a release with format {format}, which this one doesn't read")
        differences = options.differences(CacheOptions(memory=memory, disk=disk))
        if differences:
            raise ConfigMismatch.of_cache(str(directory), differences)
        return _core.Store.attach_shared(str(file))
    with _explained(options):
        store = _core.Store.create_shared(str(file), options.memory, options.disk, seed)
    try:
        restore(store)
    except BaseException:
        file.unlink()
        raise
    store.mark_ready()
    return store


@contextmanager
def _explained(options: CacheOptions) -> Iterator[None]:
    """Turn a lack of memory at opening into the error that says so."""
    try:
        yield
    except OSError as error:
        filesystem = os.statvfs(os.environ.get("KVSTRATA_SHM_DIR", "/dev/shm"))
        raise TierFull("memory (/dev/shm)", options.memory, filesystem.f_bavail * filesystem.f_frsize) from error
