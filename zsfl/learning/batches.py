"""Which samples a step takes, and those samples as tensors."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from zsfl.errors import ConfigError


def windows(samples: int, batch_size: int) -> int:
    """How many batches `samples` make; the last one may be smaller."""
    return -(-samples // batch_size)


def batch_indices(seed: int, shard: int, round: int, samples: int, batch_size: int, shuffle: bool) -> list[Tensor]:
    """The int64 index tensors of one shard's batches in one round, the same in every process.

    The order is `torch.randperm(samples)` from a CPU generator whose seed is the first 4 bytes, little
    endian, of SHA-256 over the text `"{seed}/{shard}/{round}"` (`range(samples)` without shuffle), cut every
    `batch_size`. Hashed, because torch's generator keeps only 32 bits of its seed.
    """
    if not shuffle:
        return list(torch.arange(samples).split(batch_size))
    digest = hashlib.sha256(f"{seed}/{shard}/{round}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return list(torch.randperm(samples, generator=generator).split(batch_size))


class Batches:
    """A dataset read by batch: `batches[indices]` is `(x, y)` for an int64 index tensor."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        """`ConfigError` when the dataset has no length or no samples."""
        if not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"a {type(dataset).__name__} has no length: the job's datasets need __len__ and __getitem__"
            )
        self._dataset = dataset
        self._samples = len(cast(Any, dataset))
        if self._samples == 0:
            raise ConfigError("a shard holds no samples: use fewer shards or give every shard some data")
        self._columns = _columns(dataset)

    def __len__(self) -> int:
        """Number of samples."""
        return self._samples

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples, stacked along a new first axis; integer targets as int64."""
        if self._columns is None:
            x, y = self._collated(indices)
        else:
            columns, chosen = self._columns
            rows = indices if chosen is None else chosen[indices]
            x, y = columns[0][rows], columns[1][rows]
        whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        return x, y.long() if whole else y

    def _collated(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The slow way, for any dataset: sample by sample."""
        batch = default_collate([self._dataset[index] for index in indices.tolist()])
        match batch:
            case [Tensor() as x, Tensor() as y]:
                return x, y
            case _:
                raise ConfigError(
                    f"a sample of {type(self._dataset).__name__} is not a pair (input, target) of tensors, "
                    "arrays or numbers: wrap the dataset so that it is"
                )


def _columns(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors behind a TensorDataset of pairs or a Subset of one, and the rows it chooses (None: all)."""
    # Only the classes themselves: a subclass may compute its samples.
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return dataset.tensors, None
    if type(dataset) is not Subset or (inner := _columns(cast("Subset[Any]", dataset).dataset)) is None:
        return None
    columns, chosen = inner
    rows = torch.as_tensor(cast("Subset[Any]", dataset).indices, dtype=torch.int64)
    return columns, rows if chosen is None else chosen[rows]
