"""Small files of a cache's directory, which are replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstrata.errors import ConfigError

__all__ = ["replace_file", "usable"]


@contextmanager
def usable(directory: Path) -> Iterator[None]:
    """Turn a refusal of the file system into the error that names the directory."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"can't use {directory} as a cache: {error.strerror or error}") from error


def replace_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Put a file of these bytes in place of another, all or nothing, for its user alone; raises OSError.

    With `sync` a power cut finds the old file or the new one, too.
    """
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)  # left by somebody who was killed, and perhaps for others to read
    with open(draft, "xb", opener=_for_its_user) as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    draft.replace(path)


def _for_its_user(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
