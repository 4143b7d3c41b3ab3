"""The file that a filter of names lies in, beside an engine: from one opening to the next, unless it may lack names."""

from __future__ import annotations

import os
from mmap import mmap
from pathlib import Path

from kvstrata import _core
from kvstrata.tiers.engines.directory import boot_id
from kvstrata.tiers.small_files import replace_file

__all__ = ["FilterFile"]

_FP_RATE = 0.01
_SIZES = (1024, 128)  # bytes of disk for each name that a filter has room for, and that the largest one has
_LEAST_NAMES = 1 << 16


class FilterFile:
    """The file `names` in the directory of an engine with `cap` bytes of disk, and its mark.

    The mark says what the file's checksum is, or that it is in use since the machine was booted. After a machine
    went down, or where a checksum is another one, nobody knows whether names are missing: then it is begun anew.
    `open` is for who is alone in the directory, `join` for others while somebody has it open.
    """

    def __init__(self, directory: Path, cap: int) -> None:
        self._file = directory / "names"
        self._mark = directory / "names.mark"
        self._sizes = [max(_LEAST_NAMES, cap // bytes_each) for bytes_each in _SIZES]
        self._size = self.size(cap)
        self.bloom: _core.MappedBloom
        self._memory: mmap

    @staticmethod
    def size(cap: int) -> int:
        """Return how many bytes the file takes."""
        return (_core.MappedBloom.bytes_for(max(_LEAST_NAMES, cap // _SIZES[-1]), _FP_RATE) + 4095) & ~4095

    def open(self, *, empty: bool) -> None:
        """Map it; `empty` says that the engine has no names. Raises OSError."""
        if empty or not self._trusted():
            self._file.unlink(missing_ok=True)
            with self._file.open("xb") as made:
                os.posix_fallocate(made.fileno(), 0, self._size)
        with self._mark.open("w") as mark:  # before any name comes in
            mark.write(_in_use())
            mark.flush()
            os.fsync(mark.fileno())
        self.join()
        if empty:
            self.bloom.complete(self.begin(0))

    def join(self) -> None:
        """Map it as it is. Raises OSError."""
        with self._file.open("r+b") as file:
            self._memory = mmap(file.fileno(), self._size)
        self.bloom = _core.MappedBloom(self._memory)

    def begin(self, names: int) -> int:
        """Take everything out, and make room for `names`; returns what `bloom.complete` wants."""
        size = next((size for size in self._sizes if size >= names), self._sizes[-1])
        return self.bloom.begin(size, _FP_RATE)

    def close(self) -> None:
        """Write down that all is in it; for the last one, who changes nothing any more. Raises OSError."""
        self._memory.flush()
        replace_file(self._mark, _closed(self._memory).encode(), sync=False)

    def _trusted(self) -> bool:
        try:
            said = self._mark.read_text()
            with self._file.open("r+b") as file:
                if os.fstat(file.fileno()).st_size != self._size:
                    return False
                return said == _in_use() or said == _closed(mmap(file.fileno(), self._size))
        except (OSError, ValueError):
            return False


def _in_use() -> str:
    return f"in use since boot {boot_id()}"


def _closed(memory: mmap) -> str:
    used = memoryview(memory)[: _core.MappedBloom(memory).nbytes]
    return f"closed with CRC-32C {_core.crc32c(used):08x}"
