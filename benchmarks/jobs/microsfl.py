"""MicroSFL's workload on MNIST: a frozen head 784-64 followed by noise | 64-64 ReLU | 64-10, U-shaped, SGD.

Wants the IDX files in the folder that ZSFL_DATA names, or in `mnist` below it.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import zsfl

NOISE = 0.1
"""Standard deviation of what is added to what leaves the client."""


class AdditiveNoise(nn.Module):
    """Adds noise to activations [B, 64], in training and in tests: no sample leaves the client without it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + NOISE * torch.randn_like(x)


def model() -> zsfl.SplitModel:
    return zsfl.SplitModel(
        head=nn.Sequential(nn.Linear(784, 64).requires_grad_(False), AdditiveNoise()),
        body=nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
        tail=nn.Linear(64, 10),
    )


job = zsfl.Job(
    name="microsfl",
    model=model,
    loss=F.cross_entropy,
    data=zsfl.shards(partial(zsfl.mnist, flat=True), by=zsfl.iid()),
    optimizer=zsfl.sgd(lr=0.5, momentum=0.9),
    batch_size=64,
    batches="equal",
    rounds=10,
    shards=20,
)
