from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zsfl.errors import RunFailed
from zsfl.ids import Cid, Version
from zsfl.learning.averaging import Contribution, average, norm_rules, pool_buffers


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


def _after_batches(norm: nn.Module, batches: Sequence[Tensor]) -> list[Contribution]:
    """What each client's own copy stores from its own batch."""
    parts: list[Contribution] = []
    for shard, batch in enumerate(batches):
        own = copy.deepcopy(norm)
        own(batch)
        buffers = {f"bn.{name}": tensor for name, tensor in own.state_dict().items() if "bias" not in name}
        parts.append(contribution(shard, {}, n=99.0, buffers=buffers, samples=len(batch)))
    return parts


def _base(norm: nn.Module) -> dict[str, Tensor]:
    return {f"bn.{name}": tensor.clone() for name, tensor in norm.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, None])
def test_pooled_statistics_are_those_of_the_merged_batch(momentum: float | None) -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(3, momentum=momentum).double()
    for _ in range(2):
        norm(torch.randn(20, 3).double() * 3 - 1)
    batches = [torch.randn(size, 3).double() * scale + scale for size, scale in ((2, 1), (7, 4), (12, 2))]
    rules = {"bn": norm_rules(norm)[""]}
    pooled = pool_buffers(_base(norm), _after_batches(norm, batches), rules)
    norm(torch.cat(batches))
    torch.testing.assert_close(pooled, _base(norm), rtol=1e-12, atol=1e-12)


def test_images_are_pooled_to_within_one_over_the_pixels() -> None:
    torch.manual_seed(2)
    norm = nn.BatchNorm2d(2).double()
    batches = [torch.randn(size, 2, 8, 8).double() + size for size in (1, 4)]
    pooled = pool_buffers(_base(norm), _after_batches(norm, batches), {"bn": norm_rules(norm)[""]})
    norm(torch.cat(batches))
    merged = _base(norm)
    torch.testing.assert_close(pooled["bn.running_mean"], merged["bn.running_mean"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled["bn.running_var"], merged["bn.running_var"], rtol=1 / 64, atol=0)
    assert pooled["bn.num_batches_tracked"] == 1


def test_a_frozen_norm_stays_as_it_is_and_momentum_zero_only_counts() -> None:
    frozen = nn.BatchNorm1d(2).eval()
    batches = [torch.randn(4, 2), torch.randn(3, 2)]
    assert pool_buffers(_base(frozen), _after_batches(frozen, batches), {"bn": norm_rules(frozen)[""]}) == {}
    still = nn.BatchNorm1d(2, momentum=0.0)
    pooled = pool_buffers(_base(still), _after_batches(still, batches), {"bn": norm_rules(still)[""]})
    assert pooled == {"bn.num_batches_tracked": torch.tensor(1)}


def test_rules_are_found_by_full_name() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=None), nn.Sequential(nn.BatchNorm2d(2)))
    model.append(nn.BatchNorm1d(2, track_running_stats=False)).append(nn.InstanceNorm1d(2))
    rules = norm_rules(model)
    assert {name: (rule.momentum, rule.flat) for name, rule in rules.items()} == {
        "0": (None, True),
        "1.0": (0.1, False),
    }


def test_other_buffers_are_averaged_by_samples_or_take_the_highest() -> None:
    base = {
        "ema": torch.zeros(1),
        "seen": torch.tensor(4),
        "flag": torch.tensor(False),
        "idle": torch.ones(1),
    }
    parts = [
        contribution(
            0,
            {},
            n=5,
            samples=1,
            buffers={"ema": torch.ones(1), "seen": torch.tensor(6), "flag": torch.tensor(True)},
        ),
        contribution(1, {}, n=5, samples=3, buffers={**base, "ema": torch.full((1,), 5.0)}),
    ]
    pooled = pool_buffers({**base, "absent": torch.ones(1)}, parts, {})
    assert pooled == {
        "ema": torch.tensor([4.0]),
        "seen": torch.tensor(6),
        "flag": torch.tensor(True),
        "idle": torch.ones(1),
    }
