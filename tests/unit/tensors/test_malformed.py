"""Whatever a peer claims, `unpack` answers with a tensor that fits or with BadShape, and allocates little."""

from __future__ import annotations

import tracemalloc
from typing import Any

import lz4.block
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.errors import BadShape
from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.spec import BASES, DTYPES, MAX_TENSOR_BYTES, TensorSpec

NAMES = [base + steps for base in BASES for steps in ("", "+shuffle", "+lz4", "+shuffle+lz4")]
GOOD = TensorSpec("h", "float32", (4, 6), "raw", 96)
LIMIT = 1 << 20
ODD_CODECS = ["", "zip", "raw+raw", "raw+lz4+shuffle", "lz4"]

dims = st.one_of(st.integers(-2, 9), st.sampled_from([2**20, 2**31, 2**32, 2**63 - 1, 2**64 - 1, -(2**63)]))
specs = st.builds(
    TensorSpec,
    name=st.text(max_size=5),
    dtype=st.sampled_from([*DTYPES, "complex64", "object", "", "__class__"]),
    shape=st.lists(dims, max_size=10).map(tuple),
    codec=st.sampled_from([*NAMES, *ODD_CODECS]),
    nbytes=st.one_of(st.integers(-3, 500), st.just(2**63)),
)


def altered(spec: TensorSpec, **changes: Any) -> TensorSpec:
    return msgspec.structs.replace(spec, **changes)


def try_to_unpack(spec: TensorSpec, buffer: bytes | bytearray) -> None:
    try:
        tensor = unpack(spec, buffer, max_bytes=LIMIT)
    except BadShape:
        return
    assert tuple(tensor.shape) == spec.shape
    assert str(tensor.dtype) == f"torch.{spec.dtype}"
    assert tensor.nbytes <= LIMIT


@settings(max_examples=250, deadline=None)
@given(specs, st.binary(max_size=300), st.booleans())
def test_random_specs_and_bytes(spec: TensorSpec, buffer: bytes, told: bool) -> None:
    try_to_unpack(altered(spec, nbytes=len(buffer)) if told else spec, buffer)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["float64", "float32", "bfloat16", "int16", "bool"]),
    st.data(),
)
def test_one_wrong_thing_about_a_good_tensor(name: str, dtype: str, data: st.DataObject) -> None:
    tensor = torch.ones(12, 20).to(getattr(torch, dtype))
    spec, packed = Codec.parse(name).pack("h", tensor)
    buffer = bytearray(packed)
    match data.draw(st.sampled_from(["flip", "cut", "longer", "dtype", "shape", "codec"])):
        case "flip":
            buffer[data.draw(st.integers(0, len(buffer) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            buffer = buffer[: data.draw(st.integers(0, len(buffer) - 1))]
        case "longer":
            buffer += data.draw(st.binary(min_size=1, max_size=20))
        case "dtype":
            spec = altered(spec, dtype=data.draw(st.sampled_from(sorted(DTYPES))))
        case "shape":
            spec = altered(spec, shape=data.draw(st.lists(st.integers(0, 40), max_size=3).map(tuple)))
        case _:
            spec = altered(spec, codec=data.draw(st.sampled_from(NAMES)))
    try_to_unpack(spec, buffer)
    try_to_unpack(altered(spec, nbytes=len(buffer)), buffer)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"dtype": "complex64"}, 96, "dtype 'complex64' may not travel; use one of float64"),
        ({"dtype": "float64"}, 96, r"float64 \(4, 6\) as raw takes 192 bytes, 96 were announced"),
        ({"shape": (4, 7)}, 96, r"float32 \(4, 7\) as raw takes 112 bytes, 96 were announced"),
        ({"shape": (-4, -6)}, 96, "a dimension is outside 0.."),
        ({"shape": (0, 2**64 - 1)}, 0, "a dimension is outside 0.."),
        ({"shape": (0, 2**20, 2**20), "nbytes": 0}, 0, "takes 1099511627776 bytes, at most"),
        ({"shape": (1,) * 9}, 96, "9 dimensions, at most 8"),
        ({"codec": "gzip"}, 96, "codec 'gzip' is not one of raw, raw"),
        ({"codec": "fp16", "dtype": "int64"}, 48, "codec fp16 does not apply to int64"),
        ({"codec": "int8+shuffle"}, 40, r"codec int8\+shuffle does not apply to float32 \(4, 6\), int8 does"),
        ({"nbytes": 95}, 96, r"float32 \(4, 6\) as raw takes 96 bytes, 95 were announced"),
        ({}, 95, "95 bytes came, 96 were announced"),
        ({"codec": "raw+lz4"}, 96, "96 bytes of lz4 cannot stand for the 96"),
        ({"codec": "raw+lz4", "nbytes": 50}, 50, "its 50 bytes are no lz4 block of 96 bytes"),
        ({"dtype": "bool", "shape": (96,)}, 96, "a bool is neither 0 nor 1"),
    ],
)
def test_message_says_which_tensor_and_which_figures(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(BadShape, match=f"tensor 'h': .*{message}"):
        unpack(altered(GOOD, **changes), bytes([255]) * size)


def test_buffers_with_gaps_are_refused() -> None:
    with pytest.raises(BadShape):
        unpack(GOOD, memoryview(bytes(192))[::2])


def test_lz4_block_of_another_size_is_refused() -> None:
    block = lz4.block.compress(bytes(96), store_size=False)
    for count in (23, 25):
        spec = TensorSpec("h", "float32", (count,), "raw+lz4", len(block))
        with pytest.raises(BadShape, match="no lz4 block"):
            unpack(spec, block)


def test_bombs_are_refused_before_anything_is_allocated() -> None:
    bomb = lz4.block.compress(bytes(1 << 24), store_size=False)
    claims = [
        TensorSpec("h", "uint8", (1 << 24,), "raw+lz4", len(bomb)),  # honest, but above max_bytes
        TensorSpec("h", "uint8", (1000,), "raw+lz4", len(bomb)),  # small shape, large content
        TensorSpec("h", "float64", (1 << 17,), "raw+lz4", 10),  # large shape, too few bytes for it
        TensorSpec("h", "float64", (1 << 17,), "bf16+shuffle+lz4", 10),
        TensorSpec("h", "float64", (1 << 17,), "raw", 10),
        TensorSpec("h", "float64", (1 << 50,), "raw", 10),
    ]
    tracemalloc.start()
    try:
        for spec in claims:
            with pytest.raises(BadShape):
                unpack(spec, bomb[: spec.nbytes], max_bytes=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1 << 17
    finally:
        tracemalloc.stop()


def test_max_bytes_bounds_tensor_and_payload_and_cannot_exceed_the_global_bound() -> None:
    spec, buffer = Codec.parse("int8").pack("h", torch.ones(64, 1, dtype=torch.float16))
    assert spec.nbytes == 320
    assert unpack(spec, buffer, max_bytes=320).shape == (64, 1)
    with pytest.raises(BadShape, match="takes 320 bytes, at most 319"):
        unpack(spec, buffer, max_bytes=319)
    wide, packed = Codec.parse("fp16").pack("h", torch.ones(100, dtype=torch.float64))
    with pytest.raises(BadShape, match="takes 800 bytes, at most 799"):
        unpack(wide, packed, max_bytes=799)
    with pytest.raises(BadShape, match=f"at most {MAX_TENSOR_BYTES}"):
        unpack(altered(GOOD, shape=(1 << 29,)), b"", max_bytes=1 << 62)


def test_unknown_fields_and_wrong_types_do_not_decode() -> None:
    good = msgspec.to_builtins(GOOD)
    for wrong in ({"path": "/x"}, {"shape": ["4"]}, {"shape": [1.5]}, {"nbytes": None}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(good | wrong), type=TensorSpec)


def test_numpy_sees_the_documented_layout() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    _, raw = Codec.parse("raw").pack("h", tensor)
    _, shuffled = Codec.parse("raw+shuffle").pack("h", tensor)
    assert np.array_equal(np.frombuffer(raw, "<f4").reshape(2, 3), tensor.numpy())
    planes = np.frombuffer(shuffled, np.uint8).reshape(4, 6)
    assert np.array_equal(planes.T.copy().view("<f4").reshape(2, 3), tensor.numpy())
