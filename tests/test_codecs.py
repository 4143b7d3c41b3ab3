"""What all codecs have in common: what is encoded comes back, whatever its size, and damage is noticed or harmless."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata import KVLayout, _core
from kvstrata.codecs import AXES, CODECS, Codec, TensorInfo, codec, decoder, encode
from kvstrata.errors import ConfigError, CorruptRecord, FormatError, InvalidValue, UnknownOption

LOSSLESS = ["raw", "lz4", "lz4:9", "zstd", "zstd:-5", "planes", "planes:width=4"]
LOSSY = ["int8", "int4", "int4:group=8,scales=f32,keys=token,hadamard=kv", "fp8-e4m3"]
CHUNKED = [name for name in LOSSLESS + LOSSY if name != "raw"]
HEADER = 24
DTYPES = ["float32", "float16", "bfloat16"]

each_codec = pytest.mark.parametrize("spec", LOSSLESS + LOSSY)
each_chunked = pytest.mark.parametrize("spec", CHUNKED)


def elements(floats: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """The same numbers as elements of a tensor; bfloat16 as its words."""
    if dtype == "bfloat16":
        return (floats.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype(dtype)


def kv(dtype: str = "bfloat16", shape: tuple[int, ...] = (3, 2, 2, 20, 16), seed: int = 0) -> npt.NDArray[Any]:
    """KV-like numbers, a channel of which is larger than the others."""
    floats = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    floats[..., 3] *= 20
    return elements(floats, dtype)


def info(array: npt.NDArray[Any], dtype: str = "bfloat16") -> TensorInfo:
    return TensorInfo(dtype, array.shape, AXES if array.ndim == 5 else ())


@pytest.fixture
def kernels() -> Iterator[list[str]]:
    """The names of all kernels; the best ones are in use again afterwards."""
    before = _core.codec_kernels_in_use()
    yield _core.codec_kernels()
    assert _core.use_codec_kernels(before)


# ---- The contract


@each_codec
def test_a_codec_says_what_it_is(spec: str) -> None:
    made = codec(spec)
    assert isinstance(made, Codec)
    assert made.name == spec.partition(":")[0]
    assert made.lossy == (spec in LOSSY)
    assert CODECS[made.name].id == made.id
    assert type(decoder(made.id)) is type(made)
    assert made.name in repr(made)


def test_the_numbers_of_codecs_are_those_of_the_format() -> None:
    numbers = {name: kind.id for name, kind in CODECS.items()}
    assert numbers == {"raw": 0, "lz4": 1, "zstd": 2, "planes": 3, "int8": 4, "int4": 5, "fp8-e4m3": 6}


@each_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_comes_back_in_its_size_and_from_its_payload_alone(spec: str, dtype: str) -> None:
    value = kv(dtype)
    made = codec(spec)
    payload = made.encode(value, info(value, dtype))
    out = np.zeros_like(value)
    decoder(made.id).decode_into(payload, out)
    assert decoder(made.id).value_len(payload) == value.nbytes
    assert bytes(decoder(made.id).decode(payload)) == out.tobytes()
    if made.lossy:
        assert 0 < made.error(value, info(value, dtype)).rms_relative < 0.2  # type: ignore[attr-defined]
    else:
        assert out.tobytes() == value.tobytes()


@each_codec
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1023, 1024, 1025, 4096, 10_001])
def test_sizes_that_are_no_multiple_of_anything_come_back(spec: str, size: int) -> None:
    if "hadamard" in spec and size & (size - 1) | (size == 0):
        pytest.skip("a rotation needs a power of two")
    made = codec(spec, **({} if spec == "raw" else {"chunk": 1024}))
    value = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    tensor = TensorInfo("float32", value.shape)
    payload = made.encode(value, tensor)
    found = np.frombuffer(made.decode(payload), np.float32)
    assert found.shape == value.shape
    np.testing.assert_allclose(found, value, atol=2.0 if made.lossy else 0, rtol=0)


@each_codec
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 2, 2, 0, 16), (0, 2, 2, 4, 16), (1, 1), (7,), ()])
def test_shapes_with_nothing_in_them_or_a_single_axis_come_back(spec: str, shape: tuple[int, ...]) -> None:
    if "hadamard" in spec and shape and shape[-1] & (shape[-1] - 1) | (shape[-1] == 0):
        pytest.skip("a rotation needs a power of two")
    value = np.ones(shape, np.float32)
    made = codec(spec)
    found = np.frombuffer(made.decode(made.encode(value, info(value, "float32"))), np.float32)
    np.testing.assert_allclose(found.reshape(shape), value, rtol=0.05)


@each_codec
def test_what_is_no_contiguous_buffer_is_refused(spec: str) -> None:
    made = codec(spec)
    for value in (np.zeros((4, 4), np.float32).T, np.zeros(8, np.float32)[::2], "text", 5):
        with pytest.raises(InvalidValue, match="contiguous"):
            made.encode(value, TensorInfo("float32", (4, 4)))  # type: ignore[arg-type]


@each_codec
def test_a_value_that_is_not_of_the_tensor_is_refused(spec: str) -> None:
    with pytest.raises(InvalidValue, match="12 bytes"):
        codec(spec).encode(bytes(12), TensorInfo("float32", (4,)))


@each_codec
def test_an_out_of_another_size_or_that_is_read_only_is_refused(spec: str) -> None:
    value = kv()
    made = codec(spec)
    payload = made.encode(value, info(value))
    for out in (bytearray(value.nbytes - 1), bytearray(value.nbytes + 1), bytearray()):
        with pytest.raises(InvalidValue, match="out has"):
            made.decode_into(payload, out)
    with pytest.raises(InvalidValue, match="writable"):
        made.decode_into(payload, bytes(value.nbytes))


@pytest.mark.parametrize("spec", LOSSY)
def test_a_lossy_codec_says_what_to_do_without_a_tensor(spec: str) -> None:
    with pytest.raises(InvalidValue, match=r"give tensor=.*lossless"):
        codec(spec).encode(bytes(64))


@given(value=st.binary(max_size=5000), spec=st.sampled_from(LOSSLESS), repeats=st.integers(1, 5))
def test_any_bytes_come_back_exactly_from_a_lossless_codec(value: bytes, spec: str, repeats: int) -> None:
    made = codec(spec, **({} if spec == "raw" else {"chunk": 1024}))
    assert bytes(made.decode(made.encode(value * repeats))) == value * repeats


def test_numbers_that_hardly_vary_come_back_bit_for_bit_with_every_odd_one_among_them() -> None:
    for words in (np.arange(65536, dtype=np.uint16), np.full(9001, 0x7FC1, np.uint16)):
        for dtype in ("float16", "bfloat16"):
            made = codec("planes")
            found = made.decode(made.encode(words, TensorInfo(dtype, words.shape)))
            assert bytes(found) == words.tobytes()


@each_chunked
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunks_and_threads_change_nothing_of_what_comes_back(spec: str, threads: int) -> None:
    value = kv(shape=(9, 2, 2, 20, 16))
    whole = codec(spec)
    expected = whole.decode(whole.encode(value, info(value)))
    pieces = codec(spec, chunk="2KiB", threads=threads)
    payload = pieces.encode(value, info(value))
    assert payload == codec(spec, chunk="2KiB", threads=1).encode(value, info(value))
    assert pieces.decode(payload) == whole.decode(payload) == expected


@each_chunked
def test_one_codec_serves_many_threads_at_once(spec: str) -> None:
    made = codec(spec, chunk="2KiB", threads=2)
    values = [kv(seed=seed) for seed in range(8)]
    expected = [made.encode(value, info(value)) for value in values]
    start = threading.Barrier(4)

    def work(first: int) -> bool:
        start.wait()
        order = [*range(first, 8), *range(first)]
        return all(
            made.encode(values[i], info(values[i])) == expected[i] and len(made.decode(expected[i])) == values[i].nbytes
            for i in order
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_child_process_has_threads_of_its_own() -> None:
    script = """
import os, warnings
warnings.simplefilter("ignore")
from kvstrata.codecs import codec
made = codec("zstd", chunk=1024, threads=2)
value = bytes(100_000)
payload = made.encode(value)
child = os.fork()
if child == 0:
    os._exit(0 if made.decode(payload) == value else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("spec", ["zstd:1", "planes", "int8", "int4"])
def test_a_large_value_takes_little_more_memory_than_value_and_payload(spec: str) -> None:
    size = 64 << 20
    value = elements(np.random.default_rng(0).standard_normal(size // 2, np.float32), "bfloat16").reshape(-1, 32, 64)
    made = codec(spec, threads=2)
    out = bytearray(size)
    tracemalloc.start()
    try:
        payload = made.encode(value, info(value))
        _, encoding = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        made.decode_into(payload, out)
        _, decoding = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert encoding < len(memoryview(payload)) * 1.2 + (8 << 20)  # a growing buffer takes an eighth more than it holds
    assert decoding - before < 8 << 20


# ---- Damage


def damaged_values(made: Codec, payload: bytearray, size: int) -> Iterator[tuple[int, bytes]]:
    """What comes of each flipped byte that isn't noticed."""
    for at in range(len(payload)):
        for flip in (0x01, 0x80, 0xFF):
            payload[at] ^= flip
            try:
                yield at, bytes(made.decode(payload))
            except CorruptRecord:
                pass
            finally:
                payload[at] ^= flip
    out = bytearray(size)
    made.decode_into(payload, out)  # it is whole again


@each_chunked
@pytest.mark.parametrize("regular", [True, False])
def test_a_flipped_byte_is_noticed_or_gives_another_value_of_the_same_size(spec: str, regular: bool) -> None:
    value = kv(shape=(1, 2, 1, 7, 16))
    if regular:
        value[...] = value[0, 0, 0, :1]
    made = codec(spec, chunk=1024, threads=1)
    payload = bytearray(made.encode(value, info(value)))
    head = HEADER + int.from_bytes(payload[2:4], "little") + 4 * int.from_bytes(payload[4:8], "little")
    for at, found in damaged_values(made, payload, value.nbytes):
        assert at >= head, "damage to the header goes unnoticed"
        assert len(found) == value.nbytes


@each_chunked
def test_a_payload_cut_short_or_with_more_behind_it_is_corrupt(spec: str) -> None:
    value = kv(shape=(1, 2, 1, 7, 16))
    made = codec(spec)
    payload = bytes(made.encode(value, info(value)))
    for end in range(len(payload)):
        with pytest.raises(CorruptRecord):
            made.decode(payload[:end])
    with pytest.raises(CorruptRecord):
        made.decode(payload + b"\0")


@each_chunked
@given(noise=st.binary(max_size=200))
def test_bytes_that_are_no_payload_are_corrupt(spec: str, noise: bytes) -> None:
    with pytest.raises(CorruptRecord, match=spec.partition(":")[0]):
        codec(spec).decode(noise)


def test_a_payload_of_another_codec_is_corrupt() -> None:
    payload = codec("zstd").encode(bytes(100))
    with pytest.raises(CorruptRecord, match="codec with number 2"):
        codec("lz4").decode(payload)


@each_chunked
@given(data=st.data())
def test_noise_in_the_place_of_a_chunk_is_noticed_or_gives_a_value_of_the_same_size(spec: str, data: Any) -> None:
    value = kv(shape=(1, 2, 1, 7, 16))
    made = codec(spec)
    payload = bytearray(made.encode(value, info(value)))
    start = HEADER + int.from_bytes(payload[2:4], "little") + 4
    payload[start:] = data.draw(st.binary(min_size=len(payload) - start, max_size=len(payload) - start))
    with suppress(CorruptRecord):
        assert len(made.decode(payload)) == value.nbytes


# ---- Instruction sets


@pytest.mark.parametrize("spec", ["planes", "planes:width=4", *LOSSY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_makes_the_same_payload_and_the_same_value(
    kernels: list[str], spec: str, dtype: str
) -> None:
    value = kv(dtype, (3, 2, 2, 21, 16))
    made = codec(spec)
    results = set()
    for name in kernels:
        assert _core.use_codec_kernels(name)
        payload = bytes(made.encode(value, info(value, dtype)))
        results.add((payload, bytes(made.decode(payload))))
    assert len(results) == 1


def test_the_environment_chooses_the_portable_kernels() -> None:
    script = "from kvstrata import _core; print(_core.codec_kernels_in_use())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "KVSTRATA_SIMD": "portable"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "portable"
    assert not _core.use_codec_kernels("abacus")


# ---- By name and by number


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zstdd", "did you mean 'zstd'"),
        ("", "unknown codec"),
        ("int4:grup=8", "did you mean 'group'"),
        ("zstd:level=3,dictionary=x", "unknown option of codec zstd 'dictionary'"),
        ("raw:3", "unknown option of codec raw '3'"),
        ("int4:8,9", "unknown option of codec int4 '9'"),
        ("int8:scales=f64", "unknown type of scales 'f64'"),
        ("int8:scales=f16/f9", "unknown type of scales 'f9'"),
        ("int8:scales=/f16", "unknown type of scales"),
        ("int8:keys=tokens", "did you mean 'token'"),
        ("int8:hadamard=q", "unknown part to rotate"),
    ],
)
def test_a_name_that_does_not_exist_is_an_error_that_names_the_nearest(spec: str, message: str) -> None:
    with pytest.raises(UnknownOption, match=message):
        codec(spec)


@pytest.mark.parametrize(
    "spec",
    ["zstd:23", "zstd:x", "zstd:-23", "lz4:13", "lz4:-1", "planes:width=3", "int4:0", "int4:group=70000", "int8:1.5",
     "zstd:chunk=10", "zstd:chunk=much", "zstd:threads=0", "lz4:chunk=4GiB"],
)  # fmt: skip
def test_a_value_that_an_option_can_not_have_is_an_error(spec: str) -> None:
    with pytest.raises(ConfigError):
        codec(spec)


def test_what_is_no_name_of_a_codec_is_an_error() -> None:
    for wrong in (None, 3, b"zstd"):
        with pytest.raises(ConfigError, match="zstd:3"):
            codec(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="colour"):
        codec("zstd", colour="red")
    made = codec("zstd : level = 5 ")
    assert codec(made) is made


def test_a_number_of_a_newer_release_is_a_format_error() -> None:
    with pytest.raises(FormatError, match="codec 99"):
        decoder(99)


def test_what_does_not_get_smaller_is_stored_raw() -> None:
    noise = np.random.default_rng(0).bytes(5000)
    assert encode(codec("zstd"), noise) == (0, noise)
    number, payload = encode(codec("zstd"), bytes(5000))
    assert number == 2
    assert len(memoryview(payload)) < 100
    assert encode(codec("raw"), b"value") == (0, b"value")


def test_what_does_not_get_smaller_costs_a_header_only() -> None:
    noise = np.random.default_rng(0).bytes(5000)
    for name in ("lz4", "zstd", "planes"):
        payload = codec(name, chunk=1024).encode(noise)
        assert len(memoryview(payload)) <= 5000 + HEADER + 4 + 4 * 5
        assert codec(name).decode(payload) == noise


# ---- What a codec is told


def test_a_block_of_a_layout_is_described() -> None:
    layout = KVLayout(model="m", dtype="bfloat16", layers=3, kv_heads=2, head_dim=16, block_tokens=8)
    tensor = TensorInfo.of_block(layout)
    assert (tensor.shape, tensor.nbytes, tensor.run) == (layout.block_shape, layout.block_bytes, 2)
    assert (tensor.tokens, tensor.channels, tensor.has_kv) == (8, 16, True)
    with pytest.raises(InvalidValue, match="float8"):
        TensorInfo.of_block(KVLayout(model="m", dtype="float8_e4m3fn", layers=1, kv_heads=1, head_dim=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float64", (1,)), "float64"),
        (("float32", (-1,)), "sizes"),
        (("float32", (True,)), "sizes"),
        (("float32", (2, 3), ("tokens",)), "1 names for the 2 axes"),
        (("float32", (2, 3, 4), ("tokens", "heads", "channels")), "permute"),
        (("float32", (3, 4, 5), ("kv", "tokens", "channels")), "keys and values"),
        (("float32", (4, 5), (), "both"), "neither"),
    ],
)
def test_a_tensor_that_can_not_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        TensorInfo(*arguments)
