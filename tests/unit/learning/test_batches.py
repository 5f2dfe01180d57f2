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
from zsfl.learning.batches import Batches, batch_indices, windows


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 99), st.integers(1, 200), st.integers(1, 80))
def test_every_sample_once_and_as_many_batches_as_windows(
    seed: int, shard: int, round: int, samples: int, batch_size: int
) -> None:
    batches = batch_indices(seed, shard, round, samples, batch_size, shuffle=True)
    assert torch.cat(batches).sort().values.tolist() == list(range(samples))
    assert len(batches) == windows(samples, batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_order_is_the_documented_one() -> None:
    seed = int.from_bytes(hashlib.sha256(b"7/3/2").digest()[:4], "little")
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(0)
    drawn_before = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.cat(batch_indices(7, 3, 2, 10, 4, shuffle=True)), expected)
    assert torch.equal(torch.rand(1), drawn_before)  # the global generator is left alone


def test_rounds_shards_and_seeds_differ_and_no_shuffle_keeps_the_order() -> None:
    orders = {
        tuple(torch.cat(batch_indices(seed, shard, round, 50, 8, shuffle=True)).tolist())
        for seed in (0, 2**32)
        for shard in (0, 1)
        for round in (0, 1)
    }
    assert len(orders) == 8
    assert torch.cat(batch_indices(0, 0, 5, 50, 8, shuffle=False)).tolist() == list(range(50))


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
