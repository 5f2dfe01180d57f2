from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from zsfl.errors import ConfigError
from zsfl.learning.batches import Batches, batch_sizes, by_speed, round_order, stream_rows


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 80))
def test_batches_have_all_samples_and_are_equal_or_even(samples: int, batches: int, batch_size: int) -> None:
    even = batch_sizes(samples, batches, None)
    assert (len(even), sum(even)) == (batches, samples)
    assert max(even) - min(even) <= 1
    windows = -(-samples // batch_size)
    equal = batch_sizes(samples, windows + 3, batch_size)
    assert sum(equal) == samples
    assert set(equal[: windows - 1]) <= {batch_size}
    assert equal[windows:] == [0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 99), st.integers(1, 200))
def test_every_sample_once_in_a_round(seed: int, shard: int, round: int, samples: int) -> None:
    assert round_order(seed, shard, round, samples, shuffle=True).sort().values.tolist() == list(range(samples))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(1, 40), max_size=8))
def test_a_stream_goes_through_one_round_after_another(samples: int, takes: list[int]) -> None:
    start, taken = 0, list[int]()
    for take in takes:
        taken += stream_rows(5, 1, start, take, samples, shuffle=True).tolist()
        start += take
    rounds = [round_order(5, 1, round_, samples, shuffle=True).tolist() for round_ in range(start // samples + 1)]
    assert taken == [row for rows in rounds for row in rows][:start]


def test_order_is_the_documented_one() -> None:
    seed = int.from_bytes(hashlib.sha256(b"7/3/2").digest()[:4], "little")
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(0)
    drawn_before = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(round_order(7, 3, 2, 10, shuffle=True), expected)
    assert torch.equal(torch.rand(1), drawn_before)  # the global generator is left alone


def test_rounds_shards_and_seeds_differ_and_no_shuffle_keeps_the_order() -> None:
    orders = {
        tuple(round_order(seed, shard, round, 50, shuffle=True).tolist())
        for seed in (0, 2**32)
        for shard in (0, 1)
        for round in (0, 1)
    }
    assert len(orders) == 8
    assert round_order(0, 0, 5, 50, shuffle=False).tolist() == list(range(50))


@pytest.mark.parametrize("options", [{"least": 0}, {"least": 9, "most": 8}, {"mix": -1.0}, {"mix": float("inf")}])
def test_refuses_bounds_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="by_speed"):
        by_speed(**options)


class _Pairs(Dataset[Any]):
    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        assert type(index) is int
        return self.x[index].numpy(), int(self.y[index])


def test_all_kinds_of_datasets_give_the_same_batches() -> None:
    x, y = torch.randn(20, 3), torch.randint(0, 5, (20,), dtype=torch.uint8)
    chosen = [3, 1, 4, 15, 9, 2]
    nested = Subset(Subset(TensorDataset(x, y), range(0, 20, 2)), [5, 0, 1])
    wanted = torch.tensor([2, 0])
    for dataset, rows in [
        (TensorDataset(x, y), [2, 0]),
        (_Pairs(x, y), [2, 0]),
        (Subset(TensorDataset(x, y), chosen), [4, 3]),
        (Subset(_Pairs(x, y), chosen), [4, 3]),
        (nested, [2, 10]),
    ]:
        batches = Batches(dataset)
        got_x, got_y = batches[wanted]
        assert torch.equal(got_x, x[rows])
        assert torch.equal(got_y, y[rows].long())
        assert got_y.dtype == torch.int64
    assert len(Batches(nested)) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_other_targets_keep_their_type(dtype: torch.dtype) -> None:
    _, y = Batches(TensorDataset(torch.zeros(4, 2), torch.ones(4, dtype=dtype)))[torch.tensor([1])]
    assert y.dtype == dtype


class _Doubling(TensorDataset):
    def __getitem__(self, index: Any) -> tuple[torch.Tensor, ...]:
        return tuple(2 * tensor for tensor in super().__getitem__(index))


def test_a_subclass_computes_its_own_samples() -> None:
    x, _ = Batches(_Doubling(torch.ones(4, 2), torch.ones(4)))[torch.tensor([0, 1])]
    assert torch.equal(x, torch.full((2, 2), 2.0))


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("dataset", "said"),
    [(_Stream(), "__len__"), (TensorDataset(torch.zeros(0, 2), torch.zeros(0)), "no samples")],
)
def test_refuses_datasets_without_length_or_samples(dataset: Dataset[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Batches(dataset)


def test_refuses_samples_that_are_no_pairs() -> None:
    batches = Batches(TensorDataset(torch.zeros(4, 2)))
    with pytest.raises(ConfigError, match="not a pair"):
        batches[torch.tensor([0])]
