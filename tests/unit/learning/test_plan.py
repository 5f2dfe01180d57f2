"""Which samples each window of a round has, as the aggregator plans it and as the clients take it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import zsfl
from zsfl.client.shard import ShardData
from zsfl.learning.plan import Plan


def job(sizes: list[int], **options: Any) -> zsfl.Job:
    return zsfl.Job(
        name="plan",
        model=lambda: zsfl.SplitModel(nn.Identity(), nn.Linear(1, 2)),
        loss=F.cross_entropy,
        data=lambda shard, _: (
            TensorDataset(torch.arange(sizes[shard]).float()[:, None], torch.arange(sizes[shard]) % 2),
            None,
        ),
        optimizer=zsfl.sgd(lr=0.1),
        shards=len(sizes),
        **options,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 3),
    st.sampled_from(["proportional", "equal"]),
)
def test_a_round_has_every_sample_once_and_clients_take_what_is_planned(
    sizes: list[int], batch_size: int, steps: int, batches: Literal["proportional", "equal"]
) -> None:
    told = job(sizes, batch_size=batch_size, steps=steps, batches=batches)
    samples = dict(enumerate(sizes))
    plan = Plan.of(told, samples)
    for shard, size in samples.items():
        data, seen = ShardData(told, shard), list[float]()
        for window in range(plan.windows):
            for k, planned in enumerate(plan.sizes(samples, window)[shard]):
                batch = data.batch(3, window * steps + k, plan.windows)
                assert (0 if batch is None else len(batch[1])) == planned
                seen += [] if batch is None else batch[0][:, 0].tolist()
        assert sorted(seen) == list(range(size))


def test_proportional_batches_end_together_and_equal_ones_with_the_largest_shard() -> None:
    sizes = dict(enumerate([100, 20, 60]))
    even = Plan.of(job([100, 20, 60], batch_size=20), sizes)
    assert even.windows == 3
    assert [even.sizes(sizes, window) for window in range(3)] == [
        {0: [33], 1: [6], 2: [20]},
        {0: [33], 1: [7], 2: [20]},
        {0: [34], 1: [7], 2: [20]},
    ]
    equal = Plan.of(job([100, 20, 60], batch_size=20, batches="equal"), sizes)
    assert equal.windows == 5
    assert [equal.sizes(sizes, window)[1] for window in range(5)] == [[20], [0], [0], [0], [0]]


def test_several_steps_make_one_window() -> None:
    sizes = {0: 50, 1: 50}
    plan = Plan.of(job([50, 50], batch_size=10, steps=2, batches="equal"), sizes)
    assert plan.windows == 3
    assert plan.sizes(sizes, 2) == {0: [10, 0], 1: [10, 0]}


def test_a_stream_and_the_classes_of_a_shard() -> None:
    told = job([5], batches=zsfl.by_speed(), shuffle=False)
    data = ShardData(told, 0)
    batch = data.stream(3, 4)
    assert batch is not None
    assert batch[0][:, 0].tolist() == [3, 4, 0, 1]
    assert data.stream(3, 0) is None
    assert data.info.classes == (3, 2)
    assert ShardData(job([5]), 0).info.classes == ()


def test_labels_that_are_no_classes_cannot_be_adjusted_to() -> None:
    told = job([5], adjust_logits="client")
    floats = TensorDataset(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(zsfl.ConfigError, match="not class indices"):
        ShardData(
            zsfl.Job(**{**{f: getattr(told, f) for f in told.__dataclass_fields__}, "data": lambda *_: (floats, None)}),
            0,
        )


@pytest.mark.parametrize("batches", ["proportional", "equal"])
@pytest.mark.parametrize("defence", [{"average": zsfl.Median()}, {"norm_bound": 1.0}])
def test_no_client_makes_a_round_as_long_as_it_likes_where_clients_are_not_trusted(
    batches: Literal["proportional", "equal"], defence: dict[str, Any]
) -> None:
    claimed = {0: 100, 1: 120, 2: 100, 3: 1 << 40}
    assert Plan.of(job([1] * 4, batch_size=10, batches=batches), claimed).windows > 1 << 30
    plan = Plan.of(job([1] * 4, batch_size=10, batches=batches, **defence), claimed)
    assert plan.windows == 12
    assert sum(sizes[0] > 0 for sizes in (plan.sizes(claimed, window)[0] for window in range(12))) >= 10
