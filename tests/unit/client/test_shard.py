"""What one client takes of its data: each sample once a round, in the sizes that are planned."""

from __future__ import annotations

from itertools import chain
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import zsfl
from zsfl.client.shard import EVALUATION_BATCH, ShardData
from zsfl.learning.batches import batch_sizes, round_order
from zsfl.wire.fields import ShardInfo


def numbers(count: int) -> TensorDataset:
    """Sample i is i, of class i % 3."""
    return TensorDataset(torch.arange(count).float()[:, None], torch.arange(count) % 3)


def shard(train: int, test: Dataset[Any] | None = None, number: int = 0, **options: Any) -> ShardData:
    job = zsfl.Job(
        name="shard",
        model=lambda: zsfl.SplitModel(nn.Identity(), nn.Linear(1, 3)),
        loss=F.cross_entropy,
        data=lambda *_: (numbers(train), test),
        optimizer=zsfl.sgd(lr=0.1),
        shards=4,
        **options,
    )
    return ShardData(job, number)


def taken(batch: tuple[torch.Tensor, torch.Tensor] | None) -> list[int]:
    if batch is None:
        return []
    assert torch.equal(batch[1], batch[0][:, 0].long() % 3)
    return [int(value) for value in batch[0][:, 0]]


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from(["proportional", "equal"]),
)
def test_a_round_is_the_shard_in_its_order_cut_into_batches(
    samples: int, windows: int, steps: int, batch_size: int, batches: Literal["proportional", "equal"]
) -> None:
    data = shard(samples, number=2, batches=batches, steps=steps, batch_size=batch_size, seed=7)
    sizes = batch_sizes(samples, windows * steps, batch_size if batches == "equal" else None)
    for round_ in (0, 5, 0):
        made = [taken(data.batch(round_, number, windows)) for number in range(windows * steps)]
        assert [len(batch) for batch in made] == sizes
        order = round_order(7, 2, round_, samples, shuffle=True).tolist()
        assert list(chain(*made)) == (order if batches == "proportional" else order[: batch_size * windows * steps])
    assert data.batch(0, windows * steps, windows) is None


@given(st.lists(st.integers(0, 20), max_size=8))
def test_a_stream_goes_on_from_one_round_into_the_next(counts: list[int]) -> None:
    data, start, seen = shard(7, number=1), 0, list[int]()
    for count in counts:
        batch = data.stream(start, count)
        assert (batch is None) == (count == 0)
        seen += taken(batch)
        start += count
    rounds = [taken(data.batch(round_, 0, 1)) for round_ in range(start // 7 + 1)]
    assert seen == list(chain(*rounds))[:start]


def test_all_held_out_samples_are_read_in_order_a_batch_at_a_time() -> None:
    count = 2 * EVALUATION_BATCH + 3
    data = shard(5, numbers(count))
    batches = [taken(batch) for batch in data.test_batches()]
    assert [len(batch) for batch in batches] == [EVALUATION_BATCH, EVALUATION_BATCH, 3]
    assert list(chain(*batches)) == list(range(count))
    assert data.info == ShardInfo(shard=0, train_samples=5, test_samples=count)


@pytest.mark.parametrize("test", [None, numbers(0)])
def test_a_shard_may_have_no_held_out_samples(test: Dataset[Any] | None) -> None:
    data = shard(5, test)
    assert list(data.test_batches()) == []
    assert data.info.test_samples == 0


@pytest.mark.parametrize(
    ("options", "tells"),
    [
        ({}, False),
        ({"adjust_logits": "client"}, True),
        ({"adjust_logits": "participants"}, True),
        ({"batches": zsfl.by_speed(mix=1.0)}, True),
        ({"batches": zsfl.by_speed(mix=0.0)}, False),
    ],
)
def test_class_counts_are_told_only_where_they_are_needed(options: dict[str, Any], tells: bool) -> None:
    assert shard(5, **options).info.classes == ((2, 2, 1) if tells else ())
