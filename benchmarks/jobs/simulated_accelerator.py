"""MicroSFL's network on random inputs, with a body that takes as long as SIMULATED_STEP_S says: the rest is waiting.

It stands for a split server with a device of its own that is busy for 20 ms with a step of 64 samples: the thread that
computes is held for so long, without using the processor. Async mode, so that no server waits for another.
"""

import os
import time
from typing import Any

import microsfl
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

import zsfl

STEP_S = float(os.environ.get("SIMULATED_STEP_S", "0.02"))
FORWARD_SHARE = 1 / 3
"""Of the time of a step; a backward is about twice the work of a forward."""
SAMPLES, STEPS_PER_VERSION = 64, 8


class _Wait(torch.autograd.Function):
    """Takes its time in both directions, in proportion to the samples."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(STEP_S * FORWARD_SHARE * len(x) / SAMPLES)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        time.sleep(STEP_S * (1 - FORWARD_SHARE) * len(grads[0]) / SAMPLES)
        return grads[0]


class SimulatedAccelerator(nn.Module):
    """A body on a device that is slower than it is."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Wait.apply(self.body(x))  # type: ignore[return-value]


def model() -> zsfl.SplitModel:
    plain = microsfl.model()
    return zsfl.SplitModel(head=plain.head, body=SimulatedAccelerator(plain.body), tail=plain.tail)


def data(shard: int, shards: int) -> tuple[Dataset[Any], None]:
    """One batch, so that a round is about one step of each client."""
    random = torch.Generator().manual_seed(shard)
    x = torch.randn(SAMPLES, 784, generator=random)
    return TensorDataset(x, torch.randint(10, (SAMPLES,), generator=random)), None


job = zsfl.Job(
    name="simulated-accelerator",
    model=model,
    loss=F.cross_entropy,
    data=data,
    optimizer=zsfl.sgd(lr=0.01),
    batch_size=SAMPLES,
    mode=zsfl.Async(samples=STEPS_PER_VERSION * SAMPLES, quota=8, max_correction=1.0),
    rounds=10,
    shards=32,
)
