"""Images kept as the bytes they were published as, and turned into normalised floats when they are taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """A labelled image dataset in a quarter of the memory of its floats.

    A process that holds one shard of many takes its own rows once and never has the rest as floats.
    """

    def __init__(
        self,
        pixels: Tensor,
        targets: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        flat: bool = False,
    ) -> None:
        """`pixels` uint8 [N, C, H, W], `targets` int64 [N]; mean and std of each channel, in 0..1."""
        self.pixels = pixels
        self.targets = targets
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)
        self._flat = flat

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, targets = self.take(torch.tensor([index])).tensors
        return images[0], targets[0]

    def take(self, rows: Tensor) -> TensorDataset:
        """These rows as floats: [n, C, H, W], or [n, C*H*W] when flat."""
        images = self.pixels[rows].float().div_(255).sub_(self._mean).div_(self._std)
        return TensorDataset(images.flatten(1) if self._flat else images, self.targets[rows])
