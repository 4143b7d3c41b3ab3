"""The native part of the codecs: what it refuses, so that nothing is read or written beyond a buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstrata import _core
from kvstrata.errors import InvalidValue


def quantizer(**changes: Any) -> _core.Quantizer:
    options: dict[str, Any] = {
        "dtype": 1, "code": 1, "scales_of_keys": 1, "scales_of_values": 1, "kind": 2, "inner": 2, "group": 8, "rows": 4,
        "cols": 16, "keys_by_channel": True, "rotate_keys": False, "rotate_values": False,
    }  # fmt: skip
    return _core.Quantizer(**options | changes)


@pytest.mark.parametrize("width", [2, 4])
def test_planes_hold_the_bytes_of_rotated_elements(width: int) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 8 * width, 1000, dtype=f"u{width}")
    planes = np.empty((width, 1000), np.uint8)
    _core.split_planes(words, planes, width)
    rotated = words << 1 | words >> 8 * width - 1
    assert (planes == rotated.view(np.uint8).reshape(1000, width).T).all()
    back = np.empty_like(words)
    _core.join_planes(list(planes), back, width)
    assert (back == words).all()


def test_planes_of_other_sizes_are_refused() -> None:
    data, out = bytes(16), bytearray(16)
    for arguments in (
        (data, out, 3),
        (data, bytearray(15), 2),
        (bytes(15), bytearray(15), 2),
        (data, bytearray(32), 4),
    ):
        with pytest.raises(InvalidValue):
            _core.split_planes(*arguments)
    for planes, target, width in (
        ([data], out, 2),
        ([data] * 3, bytearray(48), 2),
        ([bytes(8), bytes(7)], out, 2),
        ([bytes(8), bytes(9)], out, 2),
        ([bytes(8)] * 2, bytearray(15), 2),
        ([bytes(8)] * 2, out, 1),
    ):
        with pytest.raises(InvalidValue):
            _core.join_planes(planes, target, width)
    with pytest.raises((BufferError, TypeError)):
        _core.split_planes(data, bytes(16), 2)


def test_a_rotation_twice_is_none() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    rotated = rows.copy()
    _core.hadamard(rotated)
    assert not np.allclose(rotated, rows)
    np.testing.assert_allclose((rotated**2).sum(1), (rows**2).sum(1), rtol=1e-5)
    _core.hadamard(rotated)
    np.testing.assert_allclose(rotated, rows, atol=1e-5)


def test_a_rotation_of_another_size_or_type_is_refused() -> None:
    for cols in (0, 3, 96):
        with pytest.raises(InvalidValue, match="power of two"):
            _core.hadamard(np.zeros((2, cols), np.float32))
    for rows in (np.zeros((2, 4)), np.zeros((4, 2), np.float32).T, np.zeros(4, np.float32)):
        with pytest.raises(TypeError):
            _core.hadamard(rows)


def test_buffers_of_other_sizes_are_refused() -> None:
    made = quantizer()
    plane = made.plane_bytes
    assert plane == 4 * 16 * 4
    assert made.coded_bytes(0, 2) == 2 * (64 + 16 * 8)  # keys: a group of 4 tokens for each of 16 channels
    assert made.coded_bytes(2, 2) == 2 * (64 + 8 * 8)  # values: 2 groups of 8 channels for each of 4 tokens
    good = bytearray(made.coded_bytes(0, 2))
    assert made.encode(bytes(2 * plane), good)
    for source, target in ((bytes(2 * plane - 4), good), (bytes(plane), good), (bytes(2 * plane), good[:-1])):
        with pytest.raises(InvalidValue):
            made.encode(source, target)
        with pytest.raises(InvalidValue):
            made.decode(target, bytearray(source))
    with pytest.raises(InvalidValue):
        made.decode(good, bytearray(2 * plane), first=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": 0}, {"dtype": 4}, {"code": 0}, {"code": 4}, {"scales_of_keys": 0}, {"scales_of_values": 5},
        {"kind": 3}, {"inner": 0}, {"group": 0}, {"cols": 1 << 31}, {"rotate_keys": True, "cols": 24},
        {"rotate_values": True, "cols": 0},
    ],
)  # fmt: skip
def test_a_tensor_that_can_not_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        quantizer(**changes)
