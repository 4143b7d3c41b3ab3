"""Readers can't damage what others read, and a reservation ends where it ends."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import OpenCache
from support.processes import Process

MIB = 1 << 20


@pytest.mark.parametrize("size", [100, MIB])
def test_writing_through_a_view_raises(open_cache: OpenCache, size: int) -> None:
    cache = open_cache()
    cache.put("a", bytes(size))
    with cache.pin("a") as view:
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 1
        array = np.frombuffer(view, np.uint8)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        del array
    assert cache.get("a") == bytes(size)


@pytest.mark.parametrize("private", [True, False])
def test_writing_to_the_address_of_a_view_ends_that_process_only(
    open_cache: OpenCache, tmp_path: Path, private: bool
) -> None:
    cache = open_cache()
    cache.put("a", bytes(MIB))
    with Process() as process:
        process.run(
            "import ctypes, kvstrata, numpy\n"
            "cache = kvstrata.open(path, memory='8MiB', disk=0 if path else None)\n"
            "path or cache.put('a', bytes(1 << 20))\n"
            "view = cache.pin('a').__enter__()\n"
            "address = numpy.frombuffer(view, numpy.uint8).ctypes.data\n"
            "assert ctypes.string_at(address, 1) == b'\\0'",
            path=None if private else tmp_path / "cache",
        )
        process.start("ctypes.memset(address, 1, 1)")
        assert process.wait() == -signal.SIGSEGV
    assert cache.get("a") == bytes(MIB)
    assert cache.stats()["memory"]["entries"] == 1


def test_a_reservation_takes_no_more_than_its_bytes(open_cache: OpenCache) -> None:
    cache = open_cache()
    with cache.reserve("a", 100) as view:
        with pytest.raises(IndexError):
            view[100] = 1
        with pytest.raises(ValueError, match="different structures"):
            view[:] = bytes(101)
        view[:] = bytes(100)
    assert cache.get("a") == bytes(100)
