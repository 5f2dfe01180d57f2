"""Payloads of less than a byte for each element: how large, how exact, and what of them is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsfl.errors import BadShape
from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.spec import FLOATS, ONE_OF, RANK, Base, TensorSpec

STEPS = ("int4", "int2", "rand2")
TOP_K = tuple(ONE_OF)
LOW = (*STEPS, *TOP_K, "rank6")

dtypes = st.sampled_from(sorted(FLOATS))
shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


def values(shape: tuple[int, ...], seed: int, dtype: str = "float32", scale: float = 1.0, relu: bool = False) -> Tensor:
    made = np.random.default_rng(seed).normal(size=shape) * scale
    return torch.as_tensor(np.asarray(made.clip(0) if relu else made)).to(getattr(torch, dtype))


def travel(base: str, tensor: Tensor) -> Tensor:
    spec, buffer = Codec.parse(base).pack("h", tensor)
    assert spec.codec == base
    return unpack(spec, buffer)


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.double().reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)


@pytest.mark.parametrize(
    ("base", "nbytes"),
    [
        ("int4", 4 + 64 + 2048),
        ("int2", 4 + 64 + 1024),
        ("rand2", 4 + 64 + 1024),
        ("topk4", 4 + 64 * (1 + 8 + 16)),
        ("topk8", 4 + 64 * (1 + 8 + 8)),
        ("topk16", 4 + 64 * (1 + 4 + 4)),
        ("rank6", 4 + 12 + 2 * 6 * 64),
    ],
)
def test_bytes_of_a_tensor_of_64_by_64(base: str, nbytes: int) -> None:
    assert Codec.parse(base).pack("h", values((64, 64), 0))[0].nbytes == nbytes


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LOW), dtypes, shapes, st.integers(0, 99), st.integers(-4, 4), st.booleans())
def test_any_shape_and_dtype_comes_back_finite_and_the_same_each_time(
    base: str, dtype: str, shape: tuple[int, ...], seed: int, exponent: int, relu: bool
) -> None:
    tensor = values(shape, seed, dtype, 10.0**exponent, relu)
    codec = Codec.parse(base)
    spec, buffer = codec.pack("h", tensor)
    back = unpack(msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=TensorSpec), bytes(buffer))
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    assert back.isfinite().all()
    assert bytes(codec.pack("h", tensor.clone())[1]) == bytes(buffer)
    largest = tensor.double().abs().max()
    assert (back.double() - tensor.double()).abs().max() <= 1.6 * largest


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(STEPS), shapes, st.integers(0, 99), st.booleans())
def test_steps_are_near(base: str, shape: tuple[int, ...], seed: int, relu: bool) -> None:
    tensor = values(shape, seed, relu=relu)
    before, after = rows_of(tensor), rows_of(travel(base, tensor))
    largest = before.abs().amax(1, keepdim=True)
    most = (15 if base == "int4" else 3) if bool((before >= 0).all()) else {"int4": 7}.get(base, 1.5)
    step = largest / most * 2 ** (1 / 8) * (1 + 1e-6)  # a scale is up to an eighth of an octave wider than it need be
    error = (after - before).abs()
    if base == "int2" and most == 1.5:  # large ones are cut off
        rms = before.square().mean(1, keepdim=True).sqrt() * 2 ** (1 / 8) * (1 + 1e-6)
        inside = before.abs() <= 1.9 * before.square().mean(1, keepdim=True).sqrt()
        assert (error <= rms / 2)[inside].all()
    else:
        assert (error <= step * {"rand2": 1, "int2": 0.65}.get(base, 0.5) + 1e-30).all()


def test_what_is_never_below_zero_keeps_its_zeros() -> None:
    tensor = values((64, 64), 0, relu=True)
    for base in (*STEPS, *TOP_K):
        back = travel(base, tensor)
        assert (back[tensor == 0] == 0).all()
        assert (back >= 0).all()


def test_rand2_is_right_in_the_mean() -> None:
    tensor = values((64, 64), 1)
    # Each is a little different, so each begins elsewhere among the random numbers.
    mean = torch.stack([travel("rand2", tensor * (1 + 1e-3 * number)) for number in range(400)]).mean(0) / 1.2
    assert (mean - tensor).square().mean() < 0.02
    assert abs((mean - tensor).mean()) < 0.01
    nearest = travel("int2", tensor)
    assert (nearest - tensor).square().mean() < 0.13  # what four steps can do for a bell curve is 0.119


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TOP_K), st.integers(1, 6), st.integers(1, 600), st.integers(0, 99))
def test_top_k_keeps_so_many_and_those_to_within_half_a_step(base: Base, rows: int, width: int, seed: int) -> None:
    tensor = values((rows, width), seed)
    back = travel(base, tensor)
    kept = -(-width // ONE_OF[base])
    assert ((back != 0).sum(1) <= kept).all()
    step = tensor.abs().amax(1, keepdim=True) / 127 * 2 ** (1 / 8)
    assert ((back - tensor).abs() <= step * 0.501)[back != 0].all()


def test_top_k_takes_mostly_the_largest_and_some_of_the_others() -> None:
    tensor = values((512, 64), 3)
    chosen = travel("topk8", tensor) != 0
    largest = torch.zeros_like(tensor).scatter_(1, tensor.abs().topk(8, 1).indices, 1.0).bool()
    share = float((chosen & largest).sum() / chosen.sum())
    assert 0.85 < share < 0.97


def test_a_matrix_of_low_rank_comes_back_whole() -> None:
    left, right = values((64, RANK), 4), values((RANK, 48), 5)
    for scale in (1e-15, 1.0, 1e15):
        tensor = left @ right * scale
        assert (travel("rank6", tensor) - tensor).norm() < 0.02 * tensor.norm()


@pytest.mark.parametrize("base", LOW)
@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_non_finite_samples_become_nan_and_no_others(base: str, dtype: str) -> None:
    most = torch.finfo(getattr(torch, dtype)).max
    rows = [[1.0, torch.nan], [torch.inf, 2.0], [-torch.inf, 0.0], [most, -most], [0.0, 0.0], [most / 3, most / 2]]
    tensor = torch.tensor(rows, dtype=torch.float64).to(getattr(torch, dtype))
    back = travel(base, tensor)
    assert back[:3].isnan().all()
    if base != "rank6":  # one matrix product
        assert back[3:].isfinite().all()
        assert (back[4] == 0).all()
    finite = tensor[3:]
    assert travel(base, finite).isfinite().all()


def test_zeros_stay_zeros() -> None:
    for base in LOW:
        for shape in ((3, 5), (7,), ()):
            assert not travel(base, torch.zeros(shape)).any()


@pytest.mark.parametrize("base", LOW)
def test_views_and_gradients(base: str) -> None:
    tensor = values((16, 24), 6).requires_grad_()
    view = tensor.t()[1:, ::2]
    assert torch.equal(travel(base, view), travel(base, view.detach().contiguous()))


def refused(base: str, width: int, changes: dict[int, int]) -> None:
    """Unpack two rows whose places, which begin after top and two scales, are changed."""
    spec, packed = Codec.parse(base).pack("h", values((2, width), 7))
    buffer = bytearray(packed)
    for position, change in changes.items():
        buffer[4 + 2 + position] = (buffer[4 + 2 + position] ^ change) if base == "topk8" else change
    with pytest.raises(BadShape, match="which elements"):
        unpack(spec, buffer)


def test_top_k_of_elements_that_are_not_there_is_refused() -> None:
    refused("topk8", 64, {0: 1})  # one more or one less than are kept
    refused("topk8", 60, {7: 0x0F})  # bits beyond the width
    refused("topk16", 200, {12: 255})  # a place beyond the width
    refused("topk16", 200, {1: 0})  # places out of order


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LOW), shapes, st.data())
def test_any_bytes_of_the_right_number_are_a_tensor_or_refused(
    base: str, shape: tuple[int, ...], data: st.DataObject
) -> None:
    spec, _ = Codec.parse(base).pack("h", torch.ones(shape))
    buffer = data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
    try:
        assert unpack(spec, buffer).shape == shape
    except BadShape:
        assert base in TOP_K


def test_cached_checks_do_not_let_through_what_was_refused_before() -> None:
    spec, buffer = Codec.parse("int2").pack("h", torch.ones(4, 8))
    assert unpack(spec, buffer).shape == (4, 8)
    for changes in ({"shape": (4, 9)}, {"nbytes": 15}, {"codec": "int4"}, {"dtype": "int64"}):
        wrong: dict[str, Any] = dict(changes)
        for _ in range(2):
            with pytest.raises(BadShape, match="tensor 'h'"):
                unpack(msgspec.structs.replace(spec, **wrong), buffer)
    for _ in range(2):
        with pytest.raises(BadShape, match="at most 100 are allowed"):
            unpack(spec, buffer, max_bytes=100)
