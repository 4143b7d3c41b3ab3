"""The file of LMDB (data format 1): what can be seen of it before it is mapped, where damage would be a crash."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from kvstrata.errors import CorruptRecord

__all__ = ["PAGE", "check_map"]

PAGE = 4096  # bytes
_META = struct.Struct("<16xII")  # after a page's header: magic, version
_MAGIC, _VERSION = 0xBEEFC0DE, 1


def check_map(path: Path, size: int) -> None:
    """Raise CorruptRecord unless the file has that length and two sound meta pages; OSError if unreadable."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            raise CorruptRecord(f"{path.name} has not its length")
        if os.fstat(file.fileno()).st_blocks * 512 < size:
            raise CorruptRecord(f"{path.name} has holes")
        pages = [file.read(PAGE), file.read(PAGE)]
    for number, page in enumerate(pages):
        pgno, _, flags = struct.unpack_from("<QHH", page)
        if pgno != number or flags != 0x08 or _META.unpack_from(page) != (_MAGIC, _VERSION):
            raise CorruptRecord(f"meta page {number} of {path.name} is damaged")
        # address, map size, 2 x (pad, flags, depth, branch, leaf, overflow, entries, root), last page, transaction
        _, mapped = struct.unpack_from("<QQ", page, 24)
        last, _ = struct.unpack_from("<QQ", page, 136)
        roots = [struct.unpack_from("<IHHQQQQQ", page, 40 + 48 * n) for n in range(2)]
        if mapped > size or not 1 <= last < size // PAGE or roots[0][0] != PAGE:
            raise CorruptRecord(f"meta page {number} of {path.name} is damaged")
        for _, _, depth, *counts, _, root in roots:
            if root != 2**64 - 1 and (not 2 <= root <= last or not 1 <= depth <= 32 or max(counts) > last):
                raise CorruptRecord(f"meta page {number} of {path.name} is damaged")
