"""The digits that scikit-learn ships, in double precision and small steps: to compare weights bit for bit."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

import zsfl

_shards = zsfl.shards(zsfl.digits, by=zsfl.iid())


def _double(dataset: Dataset[Any] | None) -> TensorDataset | None:
    if dataset is None:
        return None
    pairs = [dataset[number] for number in range(len(dataset))]  # type: ignore[arg-type]
    x, y = zip(*pairs, strict=True)
    return TensorDataset(torch.stack(list(x)).double(), torch.tensor([int(one) for one in y]))


def data(shard: int, shards: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    train, test = _shards(shard, shards)
    converted = _double(train)
    assert converted is not None
    return converted, _double(test)


def model() -> zsfl.SplitModel:
    return zsfl.SplitModel(
        head=nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1)).double(),
        body=nn.Sequential(nn.Linear(64, 64), nn.ReLU()).double(),
        tail=nn.Linear(64, 10).double(),
    )


job = zsfl.Job(
    name="digits-double",
    model=model,
    loss=F.cross_entropy,
    data=data,
    optimizer=zsfl.adam(lr=1e-3),
    batch_size=16,
    rounds=1_000_000,
    shards=8,
)
