from __future__ import annotations

import subprocess
import sys
import warnings

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsfl.errors import BadShape, ConfigError
from zsfl.tensors.codec import SUPPORTED, Codec, negotiate, unpack
from zsfl.tensors.spec import BASES, DTYPES, FLOATS, MAX_NDIM, MAX_TENSOR_BYTES, TensorSpec

ABOVE = BASES[: BASES.index("int8") + 1]
"""What is below int8 has a file of tests of its own, but for what holds for all."""
NAMES = [base + steps for base in ABOVE for steps in ("", "+shuffle", "+lz4", "+shuffle+lz4")]
ALL_NAMES = [base + steps for base in BASES for steps in ("", "+shuffle", "+lz4", "+shuffle+lz4")]
LOSSLESS = ["raw", "raw+shuffle", "raw+lz4", "raw+shuffle+lz4"]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

codecs = st.sampled_from(ALL_NAMES).map(Codec.parse)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def make(dtype: str, shape: tuple[int, ...], seed: int, scale: float = 1.0, zeros: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * scale * (rng.random(shape) >= zeros)
    return torch.as_tensor(np.asarray(values)).to(getattr(torch, dtype))


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns, so that NaN equals NaN and 0.0 differs from -0.0."""
    flat = tensor.contiguous().view(-1)
    return flat.to(torch.uint8) if tensor.dtype is torch.bool else flat.view(BITS[tensor.dtype.itemsize])


def travel(codec: Codec, tensor: Tensor, *, writable: bool = True) -> Tensor:
    """Packs, sends the spec through msgpack, unpacks; checks what holds for every codec."""
    spec, buffer = codec.pack("h", tensor)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=TensorSpec)
    assert received == spec
    assert memoryview(buffer).nbytes == len(buffer) == spec.nbytes
    back = unpack(received, bytearray(buffer) if writable else bytes(buffer))
    assert (back.dtype, back.shape, back.device.type) == (tensor.dtype, tensor.shape, "cpu")
    assert back.is_contiguous()
    return back


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LOSSLESS), st.sampled_from(sorted(DTYPES)), shapes, st.integers(0, 99), st.booleans())
def test_lossless_codecs_return_the_same_bits(
    name: str, dtype: str, shape: tuple[int, ...], seed: int, writable: bool
) -> None:
    tensor = make(dtype, shape, seed, scale=100, zeros=0.5)
    back = travel(Codec.parse(name), tensor, writable=writable)
    assert torch.equal(bits(back), bits(tensor))


@settings(max_examples=60, deadline=None)
@given(codecs, st.sampled_from(sorted(DTYPES.keys() - FLOATS.keys())), shapes, st.integers(0, 99))
def test_integers_and_bools_are_never_lossy(codec: Codec, dtype: str, shape: tuple[int, ...], seed: int) -> None:
    tensor = make(dtype, shape, seed, scale=100)
    assert torch.equal(travel(codec, tensor), tensor)
    assert codec.pack("y", tensor)[0].codec.startswith("raw")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([n for n in NAMES if n.startswith(("fp16", "bf16"))]),
    st.sampled_from(["float32", "float64"]),
    shapes,
    st.integers(0, 99),
    st.integers(-9, 9),
)
def test_16_bit_codecs_round_to_the_nearest(
    name: str, dtype: str, shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    tensor = make(dtype, shape, seed, scale=10.0**exponent)
    before, after = tensor.double().numpy(), travel(Codec.parse(name), tensor).double().numpy()
    mantissa, smallest, largest = (10, -24, 65504.0) if name.startswith("fp16") else (7, -133, 3.38e38)
    kept = np.clip(before, -largest, largest)
    half_ulp = np.maximum(np.abs(kept) * 2.0 ** -(mantissa + 1), 2.0 ** (smallest - 1))
    assert (np.abs(after - kept) <= half_ulp * (1 + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([n for n in NAMES if n.startswith("int8")]),
    st.sampled_from(sorted(FLOATS)),
    shapes,
    st.integers(0, 99),
    st.integers(-3, 4),
)
def test_int8_is_within_half_a_step_of_its_own_sample(
    name: str, dtype: str, shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    tensor = make(dtype, shape, seed, scale=10.0**exponent, zeros=0.2)
    before, after = tensor.double().numpy(), travel(Codec.parse(name), tensor).double().numpy()
    if not before.size:
        return
    flat = before.reshape(shape[0] if len(shape) > 1 else 1, -1)
    largest = np.abs(flat).max(axis=1, keepdims=True)
    step = largest / 127
    nearest = np.rint(flat / np.where(step > 0, step, 1)) * step
    own_rounding = largest * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).smallest_normal
    assert (np.abs(after.reshape(flat.shape) - flat) <= step * (0.5 + 1e-5) + own_rounding).all()
    ties = np.abs(np.abs(flat / np.where(step > 0, step, 1)) % 1 - 0.5) < 1e-4
    close = np.abs(after.reshape(flat.shape) - nearest) <= largest * 1e-6 + own_rounding
    assert (close | ties).all()


def test_int8_scales_are_per_sample_and_zero_rows_stay_zero() -> None:
    tensor = torch.tensor([[1.0, -127.0], [0.0, 0.0], [1e-3, 127e-3]])
    spec, buffer = Codec.parse("int8").pack("h", tensor)
    assert spec.nbytes == 3 * 4 + 6
    assert np.frombuffer(buffer, "<f4", 3)[[0, 2]] == pytest.approx([1.0, 1e-3])
    assert list(np.frombuffer(buffer, np.int8, offset=12)) == [1, -127, 0, 0, 1, 127]
    assert torch.equal(unpack(spec, buffer)[1], torch.zeros(2))


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_input_stays_visible_and_finite_input_stays_finite(name: str, dtype: str) -> None:
    largest = torch.finfo(getattr(torch, dtype)).max
    tiny = torch.finfo(getattr(torch, dtype)).tiny
    rows = [
        [1.0, torch.nan],
        [torch.inf, 2.0],
        [-torch.inf, 0.0],
        [largest, -largest],
        [tiny, -tiny],
        [0.0, 1.0],
    ]
    tensor = torch.tensor(rows, dtype=torch.float64).to(getattr(torch, dtype))
    back = travel(Codec.parse(name), tensor)
    assert not back[~tensor.isfinite()].isfinite().any()
    assert back[3:].isfinite().all()
    assert torch.equal(back[3:].sign(), tensor[3:].sign()) or back[4].abs().max() == 0
    if not name.startswith("int8"):
        assert torch.equal(back.isnan(), tensor.isnan())
        assert torch.equal(back[~tensor.isfinite()].sign(), tensor[~tensor.isfinite()].sign())


def test_fp16_clamps_to_its_range() -> None:
    for big in (65504.0, 65519.0, 65520.0, 1e30):
        back = travel(Codec.parse("fp16"), torch.tensor([big, -big]))
        assert back.tolist() == [65504.0, -65504.0]
    assert travel(Codec.parse("fp16"), torch.tensor([1e300], dtype=torch.float64)).item() == 65504.0
    assert travel(Codec.parse("int8"), torch.tensor([1e300, -1.0], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (0, 4), (1,), (1, 1, 1, 1, 1, 1, 1, 1)])
def test_scalars_and_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    back = travel(Codec.parse(name), torch.ones(shape))
    # The steps of an int2 end below the largest, at 3 of 3.8, so that the others are finer.
    expected = 3 / 3.8 if Codec.parse(name).base == "int2" else 1.0
    assert torch.allclose(back, torch.full(shape, expected), rtol=1e-6)
    travel(Codec.parse(name), torch.ones(shape), writable=False)


@pytest.mark.parametrize("name", NAMES)
def test_views_gradients_and_transposes(name: str) -> None:
    tensor = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    view = tensor.t()[1:, ::2]
    back = travel(Codec.parse(name), view)
    assert not back.requires_grad
    assert torch.allclose(back, view, atol=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL_NAMES)
def test_cuda_tensors_pack_to_the_same_bytes(name: str) -> None:
    tensor = make("float32", (16, 33), 1)
    codec = Codec.parse(name)
    here, there = codec.pack("h", tensor), codec.pack("h", tensor.cuda())
    if codec.base in ("raw", "fp16", "bf16"):
        assert there[0] == here[0]
        assert bytes(there[1]) == bytes(here[1])
    else:  # a GPU divides a little differently, and a value halfway between two steps may become the other one
        step = 2 * codec.cost(tensor).max_error
        assert torch.allclose(unpack(*there), unpack(*here), atol=1.01 * step, rtol=0)


def test_raw_shares_memory_with_the_sender_and_with_a_writable_buffer() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    spec, buffer = Codec.parse("raw").pack("h", tensor)
    tensor[0] = 1
    assert unpack(spec, bytes(buffer))[0] == 1
    received = bytearray(buffer)
    unpack(spec, received)[1] = 1
    assert unpack(spec, received)[1] == 1


@pytest.mark.parametrize("name", ALL_NAMES)
def test_read_only_buffers_are_never_written_and_raise_no_warning(name: str) -> None:
    spec, buffer = Codec.parse(name).pack("h", torch.ones(64, 8))
    assert memoryview(buffer).readonly
    frozen = bytes(buffer)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            unpack(spec, frozen).zero_()
    finally:
        torch.set_warn_always(False)
    assert frozen == bytes(buffer)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_slice_of_a_larger_frame_need_not_be_aligned(name: str) -> None:
    tensor = make("float64", (5, 7), 3)
    spec, buffer = Codec.parse(name).pack("h", tensor)
    frame = bytearray(b"x") + buffer
    back = unpack(spec, memoryview(frame)[1:])
    assert back.data_ptr() % 8 == 0
    assert torch.equal(back, unpack(spec, buffer))


def test_lz4_is_used_where_it_pays_and_the_spec_says_so() -> None:
    codec = Codec.parse("raw+shuffle+lz4")
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 200_000, np.uint8))
    for tensor in (noise, noise[:500], torch.tensor(1.0)):
        spec, buffer = codec.pack("h", tensor)
        assert (spec.codec, len(buffer)) == ("raw", tensor.nbytes)
    for tensor in (torch.ones(8, 16), torch.ones(300, 300)):
        spec, buffer = codec.pack("h", tensor)
        assert spec.codec == "raw+shuffle+lz4"
        assert len(buffer) < tensor.nbytes / 10
        assert torch.equal(unpack(spec, buffer), tensor)
    smooth = torch.linspace(1, 2, 100_000)
    assert codec.pack("h", smooth)[0].nbytes < Codec.parse("raw+lz4").pack("h", smooth)[0].nbytes


def test_steps_that_would_do_nothing_are_left_out() -> None:
    halves, ones = make("bfloat16", (4, 4), 0), make("float32", (40, 40), 0)
    assert Codec.parse("fp16").pack("h", halves)[0].codec == "raw"
    assert Codec.parse("int8+shuffle").pack("h", ones)[0].codec == "int8"
    assert Codec.parse("int8+shuffle").pack("y", torch.ones(9, dtype=torch.uint8))[0].codec == "raw"
    assert Codec.parse("fp16+shuffle").pack("h", ones)[0].codec == "fp16+shuffle"


@pytest.mark.parametrize("name", ALL_NAMES)
def test_spelling(name: str) -> None:
    assert str(Codec.parse(name)) == name
    assert Codec.parse(name) == Codec.parse(name)


def test_spelling_in_any_order_and_unknown_words() -> None:
    assert str(Codec.parse("fp16+lz4+shuffle")) == "fp16+shuffle+lz4"
    for text in ("", "fp8", "lz4", "raw+", "raw+zip", "raw+lz4+lz4", "raw+fp16", "RAW"):
        with pytest.raises(ConfigError, match=r"raw, fp16, bf16, int8, int4, .*, then optionally \+shuffle and \+lz4"):
            Codec.parse(text)


def test_negotiation() -> None:
    for name in ALL_NAMES:
        assert str(negotiate(name, SUPPORTED)) == name
    assert str(negotiate("bf16+shuffle+lz4", ["raw", "bf16", "lz4"])) == "bf16+lz4"
    assert str(negotiate("bf16+shuffle+lz4", ["raw", "bf16", "shuffle"])) == "bf16"
    assert str(negotiate("raw+shuffle", ["raw", "shuffle"])) == "raw+shuffle"
    with pytest.raises(ConfigError, match="needs fp16, the peer offers raw, int8"):
        negotiate("fp16", ["raw", "int8"])
    with pytest.raises(ConfigError, match="needs raw, fp16, the peer offers nothing"):
        negotiate("fp16+lz4", [])


@pytest.mark.parametrize("name", ALL_NAMES)
def test_cost(name: str) -> None:
    tensor = make("float32", (32, 50), 7, zeros=0.7)
    cost = Codec.parse(name).cost(tensor)
    spec, buffer = Codec.parse(name).pack("h", tensor)
    difference = np.abs(unpack(spec, buffer).double().numpy() - tensor.double().numpy()).max()
    assert (cost.bytes, cost.ratio) == (spec.nbytes, spec.nbytes / 6400)
    assert cost.max_error == difference
    assert (cost.max_error == 0) == name.startswith("raw")
    assert cost.encode_s > 0
    assert cost.decode_s > 0


def test_cost_of_odd_tensors() -> None:
    assert Codec.parse("int8").cost(torch.empty(0, 3)).ratio == 1.0
    assert Codec.parse("int8+lz4").cost(torch.tensor([[1.0, torch.inf], [1, 1]])).max_error == torch.inf
    assert Codec.parse("fp16").cost(torch.tensor([1.0, torch.nan])).max_error == 0.0
    assert Codec.parse("fp16").cost(torch.arange(5)).max_error == 0.0


def test_pack_refuses_what_may_not_travel() -> None:
    with pytest.raises(BadShape, match=r"tensor 'z': dtype 'torch.complex64' may not travel; use one of"):
        Codec.parse("raw").pack("z", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(BadShape, match=f"9 dimensions, at most {MAX_NDIM}"):
        Codec.parse("raw").pack("z", torch.zeros((1,) * 9))
    huge = torch.zeros(1, dtype=torch.float16).expand(2**29, 1)  # 2 bytes of memory
    with pytest.raises(BadShape, match=f"takes {5 * 2**29} bytes, at most {MAX_TENSOR_BYTES}"):
        Codec.parse("int8").pack("z", huge)


def test_tensor_specs_load_neither_torch_nor_numpy() -> None:
    code = "import sys, zsfl.tensors.spec; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
