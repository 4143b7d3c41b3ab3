"""Small files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["replace_file"]


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
