"""Which samples a step takes, and those samples as tensors."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from zsfl.errors import ConfigError

MOST_SAMPLES = 1 << 20
"""Of one batch of one client."""
MOST_MIX = 1e6


def is_number(value: object) -> bool:
    """Whether this is an int or a float, other than NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class BySpeed:
    """Batch sizes that follow the measured speed of the clients, see `zsfl.by_speed`."""

    least: int
    most: int
    mix: float


def by_speed(least: int = 8, most: int = 512, mix: float = 1.0) -> BySpeed:
    """Fast clients take larger batches and slow ones smaller, `least` to `most` samples.

    `mix` says how much more it counts that the merged batch keeps the label mix of all data (0: not at all). With it
    above 0 the clients tell the aggregator how many samples of each class they have.
    """
    if not (type(least) is type(most) is int and 1 <= least <= most <= MOST_SAMPLES):
        raise ConfigError(
            f"by_speed: least is {least!r} and most is {most!r}: "
            f"use whole numbers, 1 <= least <= most <= {MOST_SAMPLES}"
        )
    if not (is_number(mix) and 0 <= mix <= MOST_MIX):
        raise ConfigError(f"by_speed: mix is {mix!r}: use a number from 0 to {MOST_MIX:g}")
    return BySpeed(least=least, most=most, mix=mix)


def batch_place(samples: int, batches: int, batch_size: int | None, number: int) -> tuple[int, int]:
    """Where in a round's order of one shard batch `number` of so many begins, and its size; 0 where it sits out.

    `batch_size` until there is nothing left, or with None as even as they can be.
    """
    start, end = (
        min(place * samples // batches if batch_size is None else place * batch_size, samples)
        for place in (min(number, batches), min(number + 1, batches))
    )
    return start, end - start


def batch_sizes(samples: int, batches: int, batch_size: int | None) -> list[int]:
    """Sizes of all these batches, in order."""
    return [batch_place(samples, batches, batch_size, number)[1] for number in range(batches)]


def round_order(seed: int, shard: int, round: int, samples: int, shuffle: bool) -> Tensor:
    """The order in which one shard goes through its samples in one round, the same in every process.

    `torch.randperm(samples)` from a CPU generator whose seed is the first 4 bytes, little endian, of SHA-256 over the
    text `"{seed}/{shard}/{round}"`; `range(samples)` without shuffle. Hashed, because torch's generator keeps only 32
    bits of its seed.
    """
    if not shuffle:
        return torch.arange(samples)
    digest = hashlib.sha256(f"{seed}/{shard}/{round}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randperm(samples, generator=generator)


def stream_rows(seed: int, shard: int, start: int, count: int, samples: int, shuffle: bool) -> Tensor:
    """Rows `start` to `start + count` of the endless stream of one shard: one round's order after the other."""
    rows: list[Tensor] = []
    while count:
        round_, offset = divmod(start, samples)
        rows.append(round_order(seed, shard, round_, samples, shuffle)[offset : offset + count])
        start += len(rows[-1])
        count -= len(rows[-1])
    return torch.cat(rows)


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
            x, y = (torch.index_select(column, 0, rows) for column in columns)  # twice as fast as column[rows]
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
