from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from zsfl.errors import ConfigError
from zsfl.learning.partitions import (
    Partition,
    classes_per_client,
    dirichlet_labels,
    dirichlet_sizes,
    iid,
    shards,
)

LABELS = torch.arange(10).repeat_interleave(60)
ALPHAS = st.sampled_from([1e-3, 0.1, 1.0, 100.0])
PARTITIONS = st.one_of(
    st.builds(iid),
    st.builds(dirichlet_sizes, ALPHAS),
    st.builds(dirichlet_labels, ALPHAS),
    st.builds(classes_per_client, st.integers(1, 3)),
)


@settings(max_examples=150, deadline=None)
@given(PARTITIONS, st.integers(3, 12), st.integers(0, 40), st.integers(0, 2**32), st.data())
def test_every_sample_in_one_shard_and_none_empty(
    by: Partition, count: int, more: int, seed: int, data: st.DataObject
) -> None:
    samples = count + more
    drawn = data.draw(st.lists(st.integers(0, 2), min_size=samples - 3, max_size=samples - 3))
    labels = torch.tensor([0, 1, 2, *drawn])
    divided = by(labels, samples, count, seed)
    assert len(divided) == count
    assert min(len(indices) for indices in divided) > 0
    assert torch.cat(divided).sort().values.tolist() == list(range(samples))
    again = by(labels, samples, count, seed)
    assert all(torch.equal(one, other) for one, other in zip(divided, again, strict=True))


def _sizes(divided: list[Tensor]) -> list[int]:
    return [len(indices) for indices in divided]


def test_iid_is_even_and_depends_on_the_seed() -> None:
    one, other = iid()(None, 603, 10, 1), iid()(None, 603, 10, 2)
    assert set(_sizes(one)) == {60, 61}
    assert not torch.equal(one[0], other[0])


def test_alpha_says_how_uneven() -> None:
    uneven, even = (dirichlet_sizes(alpha)(None, 600, 5, 0) for alpha in (0.1, 1e6))
    assert max(_sizes(uneven)) > 240
    assert max(_sizes(even)) <= 122
    skewed, mixed = (dirichlet_labels(alpha)(LABELS, 600, 5, 0) for alpha in (0.05, 1e6))
    assert min(len(LABELS[indices].unique()) for indices in skewed) < 8
    assert all(torch.bincount(LABELS[indices]).tolist() == [12] * 10 for indices in mixed)


@pytest.mark.parametrize(("k", "count"), [(2, 5), (2, 8), (3, 4), (10, 3)])
def test_every_shard_sees_k_classes(k: int, count: int) -> None:
    divided = classes_per_client(k)(LABELS, 600, count, 3)
    assert all(len(LABELS[indices].unique()) == k for indices in divided)


@pytest.mark.parametrize(
    ("by", "labels", "count", "said"),
    [
        (iid(), LABELS, 601, "600 samples cannot be divided among 601 shards"),
        (dirichlet_sizes(1.0), LABELS, 0, "use 1 to 600 shards"),
        (dirichlet_labels(1.0), None, 5, "found none"),
        (dirichlet_labels(1.0), LABELS[1:], 5, "shape \\[599\\]"),
        (classes_per_client(1), LABELS, 5, "use 2 to 10 classes per client"),
        (classes_per_client(11), LABELS, 5, "use 2 to 10 classes per client"),
    ],
)
def test_what_cannot_be_divided(by: Partition, labels: Tensor | None, count: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        by(labels, 600, count, 0)


def test_senseless_settings() -> None:
    for make in (dirichlet_labels, dirichlet_sizes):
        with pytest.raises(ConfigError, match="alpha"):
            make(0.0)
    with pytest.raises(ConfigError, match="from 1 up"):
        classes_per_client(0)


class _Targets(Dataset[Any]):
    def __init__(self) -> None:
        self.targets = LABELS.tolist()

    def __len__(self) -> int:
        return 600

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1), self.targets[index]


def _whole() -> TensorDataset:
    return TensorDataset(torch.arange(600).float().unsqueeze(1), LABELS)


def test_a_jobs_data_is_loaded_once_and_divided() -> None:
    calls: list[int] = []

    def load() -> tuple[Dataset[Any], Dataset[Any]]:
        calls.append(1)
        return _whole(), TensorDataset(torch.arange(7).float(), torch.zeros(7))

    data = shards(load)
    parts = [data(shard, 5) for shard in range(5)]
    assert sorted(x.item() for train, _ in parts for x, _ in _samples(train)) == list(range(600))
    assert sorted(x.item() for _, test in parts if test for x, _ in _samples(test)) == list(range(7))
    assert len(calls) == 1
    assert data(8, 9)[1] is None  # seven held-out samples do not reach the ninth shard


def _samples(dataset: Dataset[Any]) -> list[tuple[Tensor, Tensor]]:
    return [dataset[index] for index in range(len(dataset))]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("whole", [_whole(), _Targets(), Subset(_whole(), range(600))])
def test_labels_are_found(whole: Dataset[Any]) -> None:
    train, test = shards(lambda: (whole, None), by=classes_per_client(2), seed=4)(1, 5)
    assert test is None
    assert len({int(label) for _, label in _samples(train)}) == 2


@pytest.mark.parametrize("shard", [-1, 5, 7])
def test_a_shard_out_of_range_is_named_before_anything_is_loaded(shard: int) -> None:
    data = shards(lambda: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=f"shard {shard} is out of range: this job has shards 0 to 4"):
        data(shard, 5)
