"""Differences of bits lose nothing, whatever the tensors are, and say when two tensors have none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsfl.errors import BadShape
from zsfl.tensors.bits import are_like, xor
from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.spec import DTYPES

CODECS = ("raw", "raw+lz4", "raw+shuffle+lz4")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def wild(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Of random bits, NaNs and infinities among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return torch.as_tensor(np.asarray(rng.integers(0, 2, shape, dtype=np.uint8))).bool()
    raw = bytearray(rng.bytes(math.prod(shape) * DTYPES[dtype]))
    of = getattr(torch, dtype)
    return torch.frombuffer(raw, dtype=of).view(shape) if raw else torch.empty(shape, dtype=of)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CODECS), st.sampled_from(sorted(DTYPES)), shapes, st.integers(0, 99), st.booleans())
def test_a_difference_travels_and_gives_the_same_bits(
    codec: str, dtype: str, shape: tuple[int, ...], seed: int, is_still: bool
) -> None:
    before = wild(dtype, shape, seed)
    after = before.clone() if is_still else wild(dtype, shape, seed + 1)
    kept = bits(before), bits(after)
    spec, buffer = Codec.parse(codec).pack("w", xor(after, before))
    back = xor(unpack(spec, buffer), before)
    assert (back.dtype, back.shape, bits(back)) == (after.dtype, after.shape, kept[1])
    assert (bits(before), bits(after)) == kept
    assert are_like([spec], {"w": before})


def test_what_does_not_lie_in_one_piece_or_has_a_gradient_is_no_other_thing() -> None:
    before, after = torch.randn(4, 6, requires_grad=True), torch.randn(6, 4).T
    assert torch.equal(xor(xor(after, before), before), after)
    assert not xor(after, before).requires_grad
    assert bits(xor(after[:, ::2], before[:, 1::2])) == bits(xor(after, before.roll(-1, 1))[:, ::2])


def test_weights_that_moved_a_little_are_shorter_as_a_difference() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(100_000, generator=generator)
    after = before + 1e-4 * torch.randn(100_000, generator=generator)
    codec = Codec.parse("raw+shuffle+lz4")
    whole, _ = codec.pack("w", after)
    differs, _ = codec.pack("w", xor(after, before))
    still, _ = codec.pack("w", xor(before, before))
    assert differs.nbytes < 0.8 * whole.nbytes
    assert still.nbytes < 0.01 * whole.nbytes


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32)])
def test_unlike_tensors_have_no_difference(other: Tensor) -> None:
    with pytest.raises(BadShape, match=r"torch.float32 \(2,\) cannot differ in bits from"):
        xor(torch.zeros(2), other)


def test_what_a_state_is_like() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}
    specs = [Codec().pack(name, tensor)[0] for name, tensor in state.items()]
    assert are_like(specs, state)
    for others in (specs[:1], specs[::-1], [*specs, specs[0]], [specs[0], specs[0]]):
        assert not are_like(others, state)
    for changed in ({"b": torch.tensor(0.0)}, {"a": torch.zeros(3, 2)}, {"b": torch.zeros(1, dtype=torch.int64)}):
        assert not are_like(specs, state | changed)
