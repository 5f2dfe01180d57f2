"""As mnist.py, with one client that takes longer to read its samples: its slowness is simulated, by sleeping.

SIMULATED_DELAY_S says how much longer a batch takes it.
"""

import dataclasses
import os
import time
from typing import Any

import mnist
from torch.utils.data import Dataset

DELAY_S = float(os.environ.get("SIMULATED_DELAY_S", "0.5"))


class SimulatedSlowReader(Dataset[Any]):
    """A dataset each of whose samples takes longer to read."""

    def __init__(self, inner: Any, delay_s: float) -> None:
        self.inner = inner
        self.delay_s = delay_s

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.delay_s)
        return self.inner[index]


def data(shard: int, shards: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    train, test = mnist.job.data(shard, shards)
    return (SimulatedSlowReader(train, DELAY_S / mnist.job.batch_size) if shard == 0 else train), test


job = dataclasses.replace(mnist.job, name="mnist-slow-client", data=data)
