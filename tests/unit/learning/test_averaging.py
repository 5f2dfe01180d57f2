from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zsfl.errors import RunFailed
from zsfl.ids import Cid, Version
from zsfl.learning.averaging import Contribution, average


def contribution(
    shard: int,
    grads: dict[str, Tensor],
    n: float,
    part: Literal["body", "client"] = "body",
    buffers: dict[str, Tensor] | None = None,
    samples: int = 1,
) -> Contribution:
    return Contribution(
        cid=Cid(f"step-{shard:05d}"),
        part=part,
        version=Version(0),
        n=n,
        loss_sum=None,
        samples=samples,
        grads=grads,
        buffers=buffers or {},
        node="server-0",
    )


def test_uneven_batches_average_to_the_gradient_of_their_union() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(17, 4).double(), torch.randint(0, 3, (17,))
    parts: list[Contribution] = []
    for shard, rows in enumerate(torch.arange(17).split([1, 9, 7])):
        loss = F.cross_entropy(model(x[rows]), y[rows], reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        parts.append(contribution(shard, dict(zip(("weight", "bias"), grads, strict=True)), len(rows)))
    union = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    result = average(parts)
    torch.testing.assert_close((result["weight"], result["bias"]), union, rtol=0, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_order_of_arrival_changes_no_bit_and_inputs_stay(seed: int, count: int) -> None:
    torch.manual_seed(seed)
    parts = [contribution(shard, {"w": torch.randn(5)}, n=shard + 1) for shard in range(count)]
    kept = [part.grads["w"].clone() for part in parts]
    shuffled = random.Random(seed).sample(parts, count)
    assert torch.equal(average(parts)["w"], average(shuffled)["w"])
    assert all(torch.equal(part.grads["w"], before) for part, before in zip(parts, kept, strict=True))


def test_parts_are_divided_by_their_own_weights_and_a_missing_gradient_is_zero() -> None:
    result = average(
        [
            contribution(0, {"body.w": torch.tensor([6.0])}, n=2),
            contribution(1, {}, n=1),
            contribution(0, {"head.w": torch.tensor([6.0])}, n=2, part="client"),
        ]
    )
    assert result == {"body.w": torch.tensor([2.0]), "head.w": torch.tensor([3.0])}


def test_half_precision_is_summed_in_single() -> None:
    parts = [contribution(s, {"w": torch.tensor([256.0 if s == 0 else 1.0]).bfloat16()}, n=1) for s in range(9)]
    assert torch.equal(average(parts)["w"], torch.tensor([264.0]) / 9)


def test_weights_that_sum_to_nothing_fail() -> None:
    with pytest.raises(RunFailed, match="loss_weight"):
        average([contribution(0, {"w": torch.ones(1)}, n=0.0)])


def test_scale_and_damping_count_for_the_gradient_alone() -> None:
    plain = contribution(0, {"w": torch.tensor([6.0])}, n=2)
    late = replace(contribution(1, {"w": torch.tensor([8.0])}, n=4), scale=0.5, damping=0.25)
    assert average([plain, late])["w"].item() == pytest.approx((6 + 0.5 * 0.25 * 8) / (2 + 4))
    assert average([late, plain])["w"].item() == average([plain, late])["w"].item()


def test_weighed_contributions_equal_the_formula_in_any_order() -> None:
    torch.manual_seed(4)
    parts = [
        replace(contribution(s, {"w": torch.randn(9).double()}, n=s + 1), scale=0.3 + s, damping=1 / (1 + s))
        for s in range(5)
    ]
    wanted = sum(p.scale * p.damping * p.grads["w"] for p in parts) / sum(p.n for p in parts)
    torch.testing.assert_close(average(parts)["w"], wanted, rtol=0, atol=1e-14)
    assert torch.equal(average(parts)["w"], average(parts[::-1])["w"])


def test_no_version_moves_further_than_a_mean_gradient_does() -> None:
    parts = [replace(contribution(s, {"w": torch.tensor([3.0 * (s + 1)])}, n=s + 1), scale=2.0 + s) for s in range(3)]
    # Every mean gradient is 3, and so is what comes of them however they are weighed.
    assert average(parts)["w"].item() == pytest.approx(3.0)
    assert average(parts[:1])["w"].item() == pytest.approx(3.0)


def test_a_contribution_that_is_not_weighed_counts_as_before_to_the_last_bit() -> None:
    torch.manual_seed(3)
    parts = [contribution(shard, {"w": torch.randn(50)}, n=3) for shard in range(9)]
    total = parts[0].grads["w"].clone()
    for part in parts[1:]:
        total += part.grads["w"]
    assert torch.equal(average(parts)["w"], total / 27)
