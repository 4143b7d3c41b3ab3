"""How far lossy codecs are off, and what they do with numbers that can't be quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_codecs import DTYPES, elements, info, kv

from kvstrata.codecs import AXES, TensorInfo, codec
from kvstrata.codecs.base import floats_of
from kvstrata.errors import InvalidValue

LEVELS = {"int8": 255, "int4": 15}

floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=24),
    elements=st.floats(-(2.0**60), 2.0**60, width=32),
)


def round_trip(spec: str, value: npt.NDArray[Any], tensor: TensorInfo) -> npt.NDArray[np.float32]:
    made = codec(spec)
    return floats_of(made.decode(made.encode(value, tensor)), tensor)


@given(value=floats, name=st.sampled_from(sorted(LEVELS)), group=st.integers(1, 30), keys=st.booleans())
def test_no_element_is_further_off_than_half_a_step_of_its_group(
    value: npt.NDArray[np.float32], name: str, group: int, keys: bool
) -> None:
    tensor = TensorInfo("float32", value.shape, part="keys" if keys else "values")
    found = round_trip(f"{name}:{group},scales=f32", value, tensor)
    exact = value.astype(np.float64)
    axis = -2 if keys else -1  # along which a group runs
    for start in range(0, value.shape[axis], group):
        part = np.take(exact, range(start, min(start + group, value.shape[axis])), axis)
        off = np.abs(part - np.take(found, range(start, min(start + group, value.shape[axis])), axis))
        span = part.max(axis, keepdims=True) - part.min(axis, keepdims=True)
        rounding = 1e-6 * (span + np.abs(part).max(axis, keepdims=True)) + 1e-35
        assert (off <= span / LEVELS[name] / 2 + rounding).all()


@given(value=floats)
def test_an_8_bit_float_is_within_a_sixteenth_or_a_step_of_the_smallest(value: npt.NDArray[np.float32]) -> None:
    found = round_trip("fp8-e4m3", value, TensorInfo("float32", value.shape))
    most = np.abs(value).max(axis=(-2, -1), keepdims=True).astype(np.float64)
    off = np.abs(found.astype(np.float64) - value)
    assert (off <= np.maximum(np.abs(value) / 16, most / 224 * 2.0**-10) + 1e-38).all()


@pytest.mark.parametrize("spec", ["int8", "int4", "int4:scales=f8", "int4:scales=bf16", "fp8-e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_equal_numbers_comes_back_as_it_was(spec: str, dtype: str) -> None:
    value = elements(np.repeat(np.array([0.0, 1.0, -2.5, 448.0], np.float32), 64).reshape(4, 64), dtype)
    assert (round_trip(spec, value, info(value, dtype)) == floats_of(value, info(value, dtype))).all()


@pytest.mark.parametrize("spec", ["int8", "int4", "fp8-e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_chunk_with_what_is_not_finite_is_kept_bit_for_bit_and_others_are_not(
    spec: str, dtype: str, odd: float
) -> None:
    value = kv(dtype, (2, 2, 1, 32, 16))
    value[0, 0, 0, 5, 3] = elements(np.array([odd], np.float32), dtype)[0]
    plane = 32 * 16 * value.itemsize
    made = codec(spec, chunk=max(1024, plane))
    found = bytes(made.decode(made.encode(value, info(value, dtype))))
    assert found[:plane] == value.tobytes()[:plane]
    assert found[plane:] != value.tobytes()[plane:]


def test_numbers_too_large_for_their_scales_are_kept_bit_for_bit() -> None:
    value = np.array([[1e30, -1e30, 1.0, 2.0]], np.float32)
    tensor = TensorInfo("float32", value.shape)
    assert (round_trip("int8:scales=f16", value, tensor) == value).all()
    assert (round_trip("int8:scales=bf16", value, tensor) != value).any()


def test_keys_are_grouped_by_channel_and_values_by_token() -> None:
    # Each channel has a size of its own, and all its tokens the same: exact by channel, and not by token.
    tokens = np.tile(np.arange(1, 17, dtype=np.float32) ** 2, (32, 1))
    value = np.stack([tokens, tokens])[None, :, None]
    stats = codec("int4:scales=f16").error(value, TensorInfo("float32", value.shape, AXES))  # type: ignore[attr-defined]
    assert stats.keys.max_abs == 0
    assert stats.values.max_abs > 1
    by_token = codec("int4:scales=f16,keys=token").error(value, TensorInfo("float32", value.shape, AXES))  # type: ignore[attr-defined]
    assert by_token.keys == by_token.values == stats.values
    assert stats.max_abs == stats.values.max_abs


def test_a_tensor_of_one_part_is_told_which() -> None:
    tokens = np.tile(np.arange(1, 17, dtype=np.float32) ** 2, (32, 1))
    for part, exact in (("keys", True), ("values", False)):
        stats = codec("int4").error(tokens, TensorInfo("float32", tokens.shape, part=part))  # type: ignore[attr-defined, arg-type]
        assert (stats.max_abs == 0) == exact
        assert getattr(stats, part) is not None
        assert (stats.keys is None) != (stats.values is None)


def test_a_rotation_helps_where_few_channels_are_large_and_hurts_no_exact_size() -> None:
    floats = np.random.default_rng(0).standard_normal((4, 32, 64)).astype(np.float32)
    floats[..., 7] *= 50
    tensor = TensorInfo("float32", floats.shape)
    plain = codec("int4").error(floats, tensor)  # type: ignore[attr-defined]
    rotated = codec("int4:hadamard=v").error(floats, tensor)  # type: ignore[attr-defined]
    assert rotated.rms_relative < plain.rms_relative
    assert len(codec("int4:hadamard=v").encode(floats, tensor)) == len(codec("int4").encode(floats, tensor))  # type: ignore[arg-type]


def test_a_rotation_of_what_is_no_power_of_two_is_refused() -> None:
    value = np.zeros((4, 96), np.float32)
    with pytest.raises(InvalidValue, match="power of two"):
        codec("int4:hadamard=v").encode(value, TensorInfo("float32", value.shape))


def test_a_group_too_large_to_be_worked_on_is_refused() -> None:
    tensor = TensorInfo("float32", (65536, 2048), part="keys")
    with pytest.raises(InvalidValue, match="smaller group"):
        codec("int4:group=65536").encode(np.zeros(tensor.shape, np.float32), tensor)


@pytest.mark.parametrize(
    ("spec", "part", "bits"),
    [
        ("int8:64", "values", 8 + 32 / 64),
        ("int4:64,scales=f8", "values", 4 + 24 / 64),
        ("int4:32,scales=f8", "keys", 4 + 24 / 32),
        ("int4:64,scales=f32", "values", 4 + 64 / 64),
        ("int4:32,scales=f16/f8", "keys", 4 + 32 / 32),
        ("int4:32,scales=f16/f8", "values", 4 + 24 / 32),
        ("fp8-e4m3", "values", 8),
    ],
)
def test_a_payload_is_as_small_as_its_settings_say(spec: str, part: Any, bits: float) -> None:
    value = kv(shape=(64, 32, 64))
    payload = codec(spec).encode(value, TensorInfo("bfloat16", value.shape, part=part))
    planes = 4 * 64 if spec == "fp8-e4m3" else 0
    assert abs(len(memoryview(payload)) - value.size * bits / 8 - planes) < 100


def test_decoding_again_what_was_decoded_changes_nothing() -> None:
    # Quantized numbers are met exactly by the same steps: nothing drifts when a block is stored again and again.
    value = kv("float32", (2, 2, 1, 32, 64))
    for spec in ("int8:scales=f32", "fp8-e4m3"):
        once = round_trip(spec, value, info(value, "float32"))
        twice = round_trip(spec, once, info(value, "float32"))
        np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-5)
