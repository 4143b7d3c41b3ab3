"""The memory tier: one mapping per cache, private or shared by every process that opens the same path."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec

from kvstrata import _core
from kvstrata.config import CacheOptions
from kvstrata.errors import ConfigError, ConfigMismatch, FormatError, TierFull, TierUnavailable
from kvstrata.tiers.segment_format import stored_seed
from kvstrata.tiers.small_files import replace_file, usable

__all__ = ["MemoryTier"]

_FORMAT = 1
_HUGE_PAGE = 2 << 20
_SETUP_PATIENCE_S = 30.0
_LEAVING_PATIENCE_S = 2.0


class _Identity(msgspec.Struct, frozen=True):
    """What `identity.json` in the directory says: which cache this is, for the name of its mapping."""

    format: int
    id: str
    disk_policy: str = "fifo"
    disk_engine: str = "log"


class _Format(msgspec.Struct):
    """What every format of it says."""

    format: int


class MemoryTier:
    """Opens, shares and finally removes the mapping; the verbs are those of its `store`."""

    name = "memory"

    def __init__(
        self, store: _core.Store, options: CacheOptions, directory: Path | None, file: Path | None, users: int | None
    ) -> None:
        self.store = store
        self.directory = directory
        self._options = options
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
                return cls(_core.Store.open_private(options.memory), options, None, None, None)
        with usable(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _setup_lock(directory):
            users = _claim_directory(directory, shared)
            try:
                identity = _identity(directory, options.disk_engine)
                _check_disk(directory, identity, options)
                file = _shared_file(directory, identity)
                if shared:
                    store = _open_shared(file, directory, users, options, restore)
                    return cls(store, options, directory, file, users)
                with _explained(options):
                    # Left by processes that were killed. What is done here would make it untrue.
                    file.unlink(missing_ok=True)
                    store = _core.Store.open_private(options.memory, options.log, _seed(directory))
                _record_policy(directory, options)
                restore(store)
                return cls(store, options, directory, None, users)
            except BaseException:
                os.close(users)
                raise

    def use_huge_pages(self) -> None:
        """Put the memory into huge pages; raises ConfigError, with what to do about it, when the kernel refuses."""
        try:
            self.store.use_huge_pages()
        except OSError as error:
            raise ConfigError(f"huge_pages=True was refused: {_why_no_huge_pages(self._options, error)}") from error

    # ---- Forking and closing

    def leave_to_parent(self) -> None:
        """In a forked child: let go of what is the parent's, at once, so that its death can be seen."""
        self.store.leave_to_parent()
        if self._file is not None:
            self._leave_directory()

    def attach_again(self, restore: Callable[[_core.Store], None]) -> None:
        """In a forked child: take a place of its own in the mapping, or in a new one if all others have left it."""
        if self._file is None:
            self.store.attach_again()
            return
        assert self.directory is not None
        with _setup_lock(self.directory):
            if self._users is None:
                self._users = _claim_directory(self.directory, shared=True)
            self.store = _open_shared(self._file, self.directory, self._users, self._options, restore)

    def close(self, last_out: Callable[[], object] = lambda: None) -> None:
        """Leave the mapping; the last one out calls `last_out` first, and removes it."""
        try:
            if self.directory is not None and self._file is not None:
                # If the directory has gone, nobody else can come.
                with _setup_lock(self.directory) if self.directory.is_dir() else nullcontext():
                    # Pins may keep the mapping in use here, but nobody needs to find it any more.
                    alone = self.store.alone()
                    if alone:
                        last_out()
                    self.store.close()
                    if alone or not _core.probe(str(self._file))[3]:
                        self._file.unlink(missing_ok=True)
                    self._leave_directory()
            elif self.directory is not None:
                last_out()
        except (ConfigError, OSError, TierUnavailable):
            pass  # left behind until the next open of this path
        finally:
            self.store.close()
            self._leave_directory()

    def _leave_directory(self) -> None:
        if self._users is not None:
            os.close(self._users)
            self._users = None


def _claim_directory(directory: Path, shared: bool) -> int:
    """Take the lock that says how a process uses the directory, and return its descriptor.

    Taken and given back under the setup lock: who holds it shared has the mapping attached.
    """
    with usable(directory):
        users = os.open(directory / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(users, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(users)
        if not isinstance(error, BlockingIOError):
            raise ConfigError(f"can't lock {directory}/users.lock: {error.strerror or error}") from error
        how = "exclusively (shared=False)" if shared else "elsewhere, and shared=False wants it alone"
        raise ConfigMismatch(f"the cache at {directory} is already open {how}; close it there first") from None
    return users


def _refuse_another_mapping(users: int, directory: Path) -> None:
    """Make sure that nobody uses the directory with a mapping that this process doesn't see.

    Two indexes over one disk tier would each miss what is changed through the other.
    """
    until = time.monotonic() + _LEAVING_PATIENCE_S
    while True:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:  # nobody who is just being killed, or forked
                raise TierUnavailable(
                    f"the cache at {directory} is open in a process whose shared memory this one doesn't see: is it in "
                    "another container, has it another KVSTRATA_SHM_DIR, or was identity.json removed? Close it there"
                ) from None
            time.sleep(0.005)
    fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def _setup_lock(directory: Path) -> Iterator[None]:
    """Hold the lock under which the mapping is made, attached and removed."""
    with usable(directory):
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
                        f"another process has been opening the cache at {directory} for {_SETUP_PATIENCE_S:.0f} s; "
                        "is it stopped?"
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def _identity(directory: Path, engine: str = "log") -> _Identity:
    """Read which cache this directory holds; a new or unreadable one becomes a new cache, with that engine."""
    path = directory / "identity.json"
    with usable(directory):
        try:
            text = path.read_bytes()
            format = msgspec.json.decode(text, type=_Format).format
            if format > _FORMAT:
                raise FormatError(f"{path} has format {format}, this release reads format {_FORMAT}; upgrade kvstrata")
            return msgspec.json.decode(text, type=_Identity)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            new = _Identity(_FORMAT, secrets.token_hex(16), disk_engine=engine)
            _write_identity(directory, new)
            return new


def _check_disk(directory: Path, identity: _Identity, options: CacheOptions) -> None:
    if identity.disk_engine != options.disk_engine:
        raise ConfigError(
            f"the cache at {directory} has disk_engine={identity.disk_engine!r}, not {options.disk_engine!r}; "
            "open it so, or use another directory"
        )
    if not options.disk and stored_seed(directory) is not None:
        raise ConfigError(
            f"the cache at {directory} has a disk tier, which with disk=0 wouldn't hear of what is put and removed, "
            "and would bring older values back later; open it with disk, or use another directory"
        )


def _write_identity(directory: Path, identity: _Identity) -> None:
    replace_file(directory / "identity.json", msgspec.json.encode(identity), sync=True)


def _record_policy(directory: Path, options: CacheOptions) -> None:
    """Say what leaves the disk first, for all who attach from now on."""
    known = _identity(directory)
    if known.disk_policy != options.disk_policy:
        with usable(directory):
            _write_identity(directory, msgspec.structs.replace(known, disk_policy=options.disk_policy))


def _seed(directory: Path) -> int:
    """Return what the header checksums of this directory's records start from; a new number where there are none."""
    seed = stored_seed(directory)
    return secrets.randbits(32) if seed is None else seed


def _shared_file(directory: Path, identity: _Identity) -> Path:
    """Name the mapping's file: the same for every process on this host, another for a copy of the directory."""
    place = directory.stat()
    digest = hashlib.blake2b(f"{identity.id} {place.st_dev} {place.st_ino}".encode(), digest_size=8).hexdigest()
    return Path(os.environ.get("KVSTRATA_SHM_DIR", "/dev/shm")) / f"kvstrata-{os.getuid()}-{digest}"


def _open_shared(
    file: Path, directory: Path, users: int, options: CacheOptions, restore: Callable[[_core.Store], None]
) -> _core.Store:
    with _explained(options):
        exists, ready, format, in_use, memory, disk = _core.probe(str(file))
        if not in_use:
            _refuse_another_mapping(users, directory)
            _record_policy(directory, options)
        if exists and not in_use and (not ready or (memory, disk) != (options.memory, options.log)):
            file.unlink()  # left by processes that were killed, and of no use now
            exists = False
        if exists:
            if not ready:
                raise FormatError(f"{file} is in use by a release with format {format}, which this one doesn't read")
            theirs = msgspec.structs.replace(
                options,
                memory=memory,
                disk=disk if options.disk_engine == "log" else options.disk,
                disk_policy=_identity(directory).disk_policy,
            )
            differences = options.differences(theirs)
            if differences:
                raise ConfigMismatch.of_cache(str(directory), differences)
            try:
                return _core.Store.attach_shared(str(file))
            except TierUnavailable:
                if in_use:
                    raise
                file.unlink()  # every place in it is taken by a process that was killed
        store = _core.Store.create_shared(str(file), options.memory, options.log, _seed(directory))
    try:
        restore(store)
    except BaseException:
        file.unlink()
        raise
    store.mark_ready()
    return store


@contextmanager
def _explained(options: CacheOptions) -> Iterator[None]:
    """Turn a lack of memory at opening, or of the right to use it, into the error that says so."""
    try:
        yield
    except OSError as error:
        place = os.environ.get("KVSTRATA_SHM_DIR", "/dev/shm")
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise TierUnavailable(
                f"can't make or open the memory tier in {place}: {error.strerror or error}"
            ) from error
        if error.errno == errno.ENOMEM:
            raise TierFull("memory", options.memory, _available_memory(), "open with less memory") from error
        filesystem = os.statvfs(place)
        free = filesystem.f_bavail * filesystem.f_frsize
        advice = (
            f"open with less memory, make {place} larger (Docker: --shm-size), or set KVSTRATA_SHM_DIR to another tmpfs"
        )
        raise TierFull(f"memory ({place})", options.memory, free, advice) from error


def _why_no_huge_pages(options: CacheOptions, error: OSError) -> str:
    """Say what is in the way of huge pages, and what to do about it."""
    if options.memory < 2 * _HUGE_PAGE:
        return f"memory={options.memory:,} bytes is too little for pages of 2 MiB; the least is {2 * _HUGE_PAGE:,}"
    if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
        return (
            "the kernel found no free pieces of 2 MiB; 'echo 1 > /proc/sys/vm/compact_memory' (as root) may make some, "
            "else open with less memory or without huge_pages"
        )
    if re.search(r"THP_enabled:\s+0", Path("/proc/self/status").read_text()):
        return "they are switched off for this process, by prctl(PR_SET_THP_DISABLE); start it without"
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not setting.exists():
        return "this kernel has none for shared memory (CONFIG_TRANSPARENT_HUGEPAGE); open without huge_pages"
    if "[deny]" in setting.read_text():
        return f"{setting} says 'deny'; 'echo advise > {setting}' (as root) allows them"
    return f"it takes Linux 6.1 or newer, and this is {os.uname().release}; open without huge_pages"


def _available_memory() -> int:
    """Return the bytes of memory that the kernel says can be had."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0
