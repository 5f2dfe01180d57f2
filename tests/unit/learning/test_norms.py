"""Batch norm over many clients: frozen, of each client's batch, of the merged batch; and the running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zsfl.ids import RunId, Version, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.learning.norms import VALUES, norm_rules, pool_buffers, uncounted
from zsfl.learning.part import Part

CPU = torch.device("cpu")


def contribution(shard: int, buffers: dict[str, Tensor], samples: int) -> Contribution:
    return Contribution(
        cid=step_cid(RunId("abcdef"), shard, Version(0)),
        part="body",
        version=Version(0),
        n=99.0,
        loss_sum=None,
        samples=samples,
        grads={},
        buffers=buffers,
        node="server-0",
    )


def after_batches(norm: nn.Module, batches: Sequence[Tensor], **options: Any) -> list[Contribution]:
    """What clients report that each run a batch of their own."""
    body = nn.Sequential()
    body.add_module("bn", norm)
    part = Part(body, "body", CPU, **options)
    weights = part.load({f"body.{name}": tensor for name, tensor in body.state_dict().items()})
    return [
        contribution(shard, dict(part.forward(weights, batch, seed=0, train=True).buffers), len(batch))
        for shard, batch in enumerate(batches)
    ]


def base(norm: nn.Module) -> dict[str, Tensor]:
    return {f"body.bn.{name}": tensor.clone() for name, tensor in norm.named_buffers()}


CASES = {
    "flat": (nn.BatchNorm1d, ()),
    "sequences": (nn.BatchNorm1d, (5,)),
    "images": (nn.BatchNorm2d, (4, 3)),
    "volumes": (nn.BatchNorm3d, (2, 2, 3)),
}


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, None])
@pytest.mark.parametrize("case", CASES)
def test_pooled_statistics_are_those_of_the_merged_batch(case: str, momentum: float | None) -> None:
    torch.manual_seed(1)
    kind, inner = CASES[case]
    norm = kind(3, momentum=momentum).double()
    for _ in range(2):
        norm(torch.randn(20, 3, *inner).double() * 3 - 1)
    sizes = (2, 7, 12) if not inner else (1, 7, 12)
    batches = [
        torch.randn(size, 3, *inner).double() * scale + scale for size, scale in zip(sizes, (1, 4, 2), strict=True)
    ]
    rules = {"body.bn": norm_rules(norm)[""]}
    before = base(norm)
    pooled = pool_buffers(before, after_batches(norm, batches), rules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base(norm).items())
    norm(torch.cat(batches))
    torch.testing.assert_close(pooled, base(norm), rtol=1e-12, atol=1e-12)


def test_a_frozen_norm_uses_the_running_statistics_and_leaves_them_alone() -> None:
    torch.manual_seed(2)
    norm = nn.BatchNorm1d(3).double()
    norm(torch.randn(20, 3).double() * 3 - 1)
    part = Part(norm, "body", CPU, batch_norm="frozen")
    weights = part.load({f"body.{name}": tensor for name, tensor in norm.state_dict().items()})
    x = torch.randn(6, 3).double()
    forward = part.forward(weights, x, seed=0, train=True)
    assert torch.equal(forward.output, norm.eval()(x))
    assert forward.output.requires_grad  # its weight and bias are still trained
    assert all(torch.equal(forward.buffers[f"body.{name}"], tensor) for name, tensor in norm.named_buffers())
    rules = {"body": norm_rules(norm)[""]}
    before = {f"body.{name}": tensor for name, tensor in norm.named_buffers()}
    assert pool_buffers(before, [contribution(0, dict(forward.buffers), 6)], rules) == {}
    assert part.warnings() == []


def test_momentum_zero_only_counts() -> None:
    still = nn.BatchNorm1d(2, momentum=0.0)
    pooled = pool_buffers(
        base(still), after_batches(still, [torch.randn(4, 2), torch.randn(3, 2)]), {"body.bn": norm_rules(still)[""]}
    )
    assert pooled == {"body.bn.num_batches_tracked": torch.tensor(1)}


def test_values_are_counted_in_training_only() -> None:
    part = Part(nn.Sequential(nn.BatchNorm2d(2)), "body", CPU)
    weights = part.load({f"body.{name}": tensor for name, tensor in part.module.state_dict().items()})
    x = torch.randn(3, 2, 5, 4)
    assert part.forward(weights, x, seed=0, train=True).buffers[f"body.0.{VALUES}"].item() == 60
    assert not part.forward(weights, x, seed=0, train=False).buffers


@pytest.mark.parametrize(
    ("prefix", "choice", "said"),
    [
        ("body", "per-client", r"body\.0; batch_norm='merged', batch_norm='frozen' or group norm would not"),
        ("head", "per-client", r"head\.0; batch_norm='frozen' or group norm would not"),
        ("head", "merged", r"head\.0; batch_norm='frozen'"),
        ("tail", "merged", r"tail\.0; batch_norm='frozen'"),
        ("body", "merged", None),
        ("head", "frozen", None),
    ],
)
def test_what_makes_a_run_inexact_is_named(prefix: str, choice: Any, said: str | None) -> None:
    import re

    warnings = Part(nn.Sequential(nn.BatchNorm1d(2)), prefix, CPU, batch_norm=choice).warnings()
    assert len(warnings) == (said is not None)
    if said is not None:
        assert re.search(said, warnings[0])


def test_merged_batches_of_several_steps_are_not_one_batch() -> None:
    part = Part(nn.Sequential(nn.BatchNorm1d(2)), "body", CPU, batch_norm="merged")
    (warning,) = part.warnings(steps=3)
    assert "one of the 3 merged batches of a version" in warning
    assert warning.endswith("body.0; steps=1, batch_norm='frozen' or group norm would not")


def test_frozen_is_no_remedy_for_a_norm_without_running_statistics() -> None:
    norm = nn.BatchNorm1d(2, track_running_stats=False)
    (warning,) = Part(nn.Sequential(norm), "tail", CPU, batch_norm="frozen").warnings()
    assert warning.endswith("tail.0; group norm would not")


def test_rules_are_found_by_full_name() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=None), nn.Sequential(nn.BatchNorm2d(2)))
    model.append(nn.BatchNorm1d(2, track_running_stats=False)).append(nn.InstanceNorm1d(2))
    rules = norm_rules(model)
    assert {name: rule.momentum for name, rule in rules.items()} == {"0": None, "1.0": 0.1}


def test_frozen_statistics_stay_whatever_a_contribution_says() -> None:
    before = {"ema": torch.zeros(1)} | base(norm := nn.BatchNorm1d(2))
    said = {"ema": torch.ones(1), "body.bn.running_mean": torch.full((2,), 9.0), "body.bn.running_var": torch.ones(2)}
    said |= {"body.bn.num_batches_tracked": torch.tensor(1), f"body.bn.{VALUES}": torch.tensor(8)}
    rules = {f"body.{name}": rule for name, rule in norm_rules(nn.ModuleDict({"bn": norm})).items()}
    parts = [contribution(0, said, 4)]
    assert pool_buffers(before, parts, rules, frozen=True) == {"ema": torch.ones(1)}
    assert set(pool_buffers(before, parts, rules)) == set(before)


@pytest.mark.parametrize("values", [None, -1, 0, 1, 1 << 62])
def test_a_number_of_values_without_a_variance_counts_for_nothing(values: int | None) -> None:
    before = base(norm := nn.BatchNorm1d(2))
    said = {name: tensor + 1 for name, tensor in before.items()}
    said |= {} if values is None else {f"body.bn.{VALUES}": torch.tensor(values)}
    rules = {f"body.{name}": rule for name, rule in norm_rules(nn.ModuleDict({"bn": norm})).items()}
    assert uncounted(before, contribution(0, said, 4), rules) == "body.bn"
    assert uncounted(before, contribution(0, {**said, f"body.bn.{VALUES}": torch.tensor(2)}, 4), rules) is None


def test_other_buffers_are_averaged_by_samples_or_take_the_highest() -> None:
    before = {
        "ema": torch.zeros(1),
        "seen": torch.tensor(4),
        "flag": torch.tensor(False),
        "idle": torch.ones(1),
    }
    parts = [
        contribution(0, {"ema": torch.ones(1), "seen": torch.tensor(6), "flag": torch.tensor(True)}, 1),
        contribution(1, {**before, "ema": torch.full((1,), 5.0)}, 3),
    ]
    pooled = pool_buffers({**before, "absent": torch.ones(1)}, parts, {})
    assert pooled == {
        "ema": torch.tensor([4.0]),
        "seen": torch.tensor(6),
        "flag": torch.tensor(True),
        "idle": torch.ones(1),
    }
