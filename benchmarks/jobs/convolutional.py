"""Pictures in small batches through a body that is deep and narrow: a GPU spends more time on starting its operations
than on their arithmetic, unless several steps go through at once. Random pictures.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

import zsfl

CHANNELS, BLOCKS, BATCH, STEPS = 32, 12, 8, 8


class Block(nn.Module):
    """A residual block [B, C, 8, 8] without batch norm, which would couple the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.second(F.relu(self.first(F.relu(x))))


def model() -> zsfl.SplitModel:
    return zsfl.SplitModel(
        head=nn.Conv2d(3, CHANNELS, 4, stride=4),
        body=nn.Sequential(*(Block() for _ in range(BLOCKS)), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        tail=nn.Linear(CHANNELS, 10),
    )


def data(shard: int, shards: int) -> tuple[Dataset[Any], None]:
    random = torch.Generator().manual_seed(shard)
    x = torch.randn(4 * STEPS * BATCH, 3, 32, 32, generator=random)
    return TensorDataset(x, torch.randint(10, (len(x),), generator=random)), None


job = zsfl.Job(
    name="convolutional",
    model=model,
    loss=F.cross_entropy,
    data=data,
    optimizer=zsfl.sgd(lr=0.01),
    batch_size=BATCH,
    steps=STEPS,
    rounds=10,
    shards=32,
)
