"""Error feedback: nothing that was left out is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.feedback import ErrorFeedback


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["fp16", "bf16+lz4", "int8", "int4", "rand2", "topk8", "rank6"]), st.integers(0, 99))
def test_what_is_sent_adds_up_to_what_was_given_but_for_the_last_rest(name: str, seed: int) -> None:
    feedback, plain = ErrorFeedback(Codec.parse(name)), Codec.parse(name)
    generator = torch.Generator().manual_seed(seed)
    given_sum, sent_sum, worst = torch.zeros(8, 16), torch.zeros(8, 16), 0.0
    for _ in range(60):
        tensor = torch.randn(8, 16, generator=generator) * 1e-3
        given_sum += tensor
        sent_sum += unpack(*feedback.pack("w", "w", tensor))
        worst = max(worst, float((unpack(*plain.pack("w", tensor)) - tensor).norm()))
    assert (sent_sum - given_sum).norm() <= 12 * worst + 1e-6


def test_a_constant_too_small_for_the_codec_still_comes_through() -> None:
    tensor = torch.zeros(1, 100)
    tensor[0, 0], tensor[0, 1:] = 1.0, 1e-3  # of int8 steps of 1/127, the small ones are none
    feedback = ErrorFeedback(Codec.parse("int8"))
    sent = torch.stack([unpack(*feedback.pack("w", "w", tensor)) for _ in range(100)]).mean(0)
    assert not unpack(*Codec.parse("int8").pack("w", tensor))[0, 1:].any()
    assert sent[0, 1:].mean() == pytest.approx(1e-3, rel=0.1)


def test_keys_are_apart_and_can_be_forgotten() -> None:
    feedback, tensor = ErrorFeedback(Codec.parse("int2")), torch.tensor([[0.3, 1.0, -0.2]])
    first = bytes(feedback.pack(("body", 1), "w", tensor)[1])
    assert bytes(feedback.pack(("body", 2), "w", tensor)[1]) == first
    assert bytes(feedback.pack(("body", 1), "w", tensor)[1]) != first
    feedback.forget(("body", 1))
    assert bytes(feedback.pack(("body", 1), "w", tensor)[1]) == first


def test_other_shapes_and_non_finite_values_begin_anew() -> None:
    feedback, tensor = ErrorFeedback(Codec.parse("int4")), torch.tensor([[0.3, 1.0, -0.2]])
    first = bytes(feedback.pack("w", "w", tensor)[1])
    feedback.pack("w", "w", torch.tensor([[torch.nan, 1.0, 0.0]]))
    assert bytes(feedback.pack("w", "w", tensor)[1]) == first
    feedback.pack("w", "w", torch.ones(2, 2) / 3)
    assert bytes(feedback.pack("w", "w", tensor)[1]) == first


def test_only_so_many_rests_are_kept() -> None:
    feedback, tensor = ErrorFeedback(Codec.parse("int4"), most=2), torch.tensor([[0.3, 1.0, -0.2]])
    first = bytes(feedback.pack(0, "w", tensor)[1])
    for key in (1, 2):
        feedback.pack(key, "w", tensor)
    assert bytes(feedback.pack(0, "w", tensor)[1]) == first


def test_integers_travel_as_they_are() -> None:
    feedback, count = ErrorFeedback(Codec.parse("int2")), torch.tensor([3, 4])
    for _ in range(2):
        assert torch.equal(unpack(*feedback.pack("n", "n", count)), count)
