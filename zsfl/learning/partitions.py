"""How one dataset is divided among clients, to simulate them: drawn from a seed, the same in every process.

Every sample comes into exactly one shard, and no shard is left empty.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from zsfl.errors import ConfigError
from zsfl.learning.pictures import Pictures
from zsfl.words import number_of

Partition = Callable[[Tensor | None, int, int, int], list[Tensor]]
"""Of labels [samples] (None: unknown), samples, shards and seed: sorted int64 indices for each shard."""

Split = tuple[Dataset[Any], Dataset[Any] | None]
"""Training data, and held-out data or None."""


def shards(load: Callable[[], Split], by: Partition | None = None, seed: int = 0) -> Callable[[int, int], Split]:
    """The `data` of a job from a whole dataset: training data divided `by` (None: `iid()`), test data evenly.

    `load` runs once in a process, when the first shard is asked for.
    """
    lock = threading.Lock()
    loaded: list[Split] = []
    divided: dict[int, list[Tensor]] = {}

    def data(shard: int, shards: int) -> Split:
        if not 0 <= shard < shards:
            raise ConfigError(f"shard {shard} is out of range: this job has shards 0 to {shards - 1}")
        with lock:
            if not loaded:
                loaded.append(load())
            train, test = loaded[0]
            if shards not in divided:
                divide = by or iid()
                divided[shards] = divide(_labels(train), len(cast(Any, train)), shards, seed)
        held_out = None if test is None else torch.arange(len(cast(Any, test)))[shard::shards]
        return (
            _rows(train, divided[shards][shard]),
            _rows(test, held_out) if test is not None and held_out is not None and len(held_out) else None,
        )

    return data


def _rows(dataset: Dataset[Any], rows: Tensor) -> Dataset[Any]:
    """Some samples of a dataset; of pictures a copy that is ready to use."""
    return dataset.take(rows) if isinstance(dataset, Pictures) else Subset(dataset, rows.numpy().tolist())


def iid() -> Partition:
    """Shuffled and dealt out evenly: sizes differ by one at most."""

    def divide(labels: Tensor | None, samples: int, shards: int, seed: int) -> list[Tensor]:
        _enough(samples, shards)
        return _tensors(np.array_split(np.random.default_rng(seed).permutation(samples), shards))

    return divide


def dirichlet_sizes(alpha: float) -> Partition:
    """Like `iid`, with sizes proportional to a draw from Dirichlet(alpha); a small alpha is uneven."""
    _positive(alpha)

    def divide(labels: Tensor | None, samples: int, shards: int, seed: int) -> list[Tensor]:
        _enough(samples, shards)
        draw = np.random.default_rng(seed)
        sizes = 1 + _apportion(samples - shards, draw.dirichlet(np.full(shards, alpha)))
        return _tensors(np.split(draw.permutation(samples), np.cumsum(sizes)[:-1]))

    return divide


def dirichlet_labels(alpha: float) -> Partition:
    """Every class divided in proportion to its own draw from Dirichlet(alpha) (Hsu et al., 2019)."""
    _positive(alpha)

    def divide(labels: Tensor | None, samples: int, shards: int, seed: int) -> list[Tensor]:
        _enough(samples, shards)
        draw = np.random.default_rng(seed)
        piles: list[list[int]] = [[] for _ in range(shards)]
        for members in _classes(labels, samples, draw):
            sizes = _apportion(len(members), draw.dirichlet(np.full(shards, alpha)))
            for pile, part in zip(piles, np.split(members, np.cumsum(sizes)[:-1]), strict=True):
                pile.extend(part.tolist())
        return _filled(piles)

    return divide


def classes_per_client(k: int) -> Partition:
    """Every shard sees k classes, and every class is divided evenly among the shards that see it.

    `ConfigError` when the shards together have no room for all classes. A shard whose classes have too few
    samples for it gets one sample of another.
    """
    if k < 1:
        raise ConfigError(f"classes_per_client({k}): use a whole number from 1 up")

    def divide(labels: Tensor | None, samples: int, shards: int, seed: int) -> list[Tensor]:
        _enough(samples, shards)
        draw = np.random.default_rng(seed)
        classes = _classes(labels, samples, draw)
        if not len(classes) <= shards * k or k > len(classes):
            least = -(-len(classes) // shards)
            raise ConfigError(
                f"classes_per_client({k}): {number_of(shards, 'shard')} of {number_of(k, 'class', 'classes')} cannot "
                f"share {len(classes)} classes; use {least} to {len(classes)} classes per client, or another number "
                "of shards"
            )
        draw.shuffle(classes)
        seats = [seat % len(classes) for seat in range(shards * k)]  # k neighbours in the ring are different classes
        piles: list[list[int]] = [[] for _ in range(shards)]
        for number, members in enumerate(classes):
            holders = [seat // k for seat, held in enumerate(seats) if held == number]
            holders.sort(key=lambda shard: len(piles[shard]))  # the odd samples go where there are fewest
            for shard, part in zip(holders, np.array_split(members, len(holders)), strict=True):
                piles[shard].extend(part.tolist())
        return _filled(piles)

    return divide


def _labels(dataset: Dataset[Any]) -> Tensor | None:
    """The labels of a whole dataset, if it has them at hand: its second tensor, or its `targets`."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    targets = getattr(dataset, "targets", None)
    return None if targets is None else torch.as_tensor(targets)


def _classes(labels: Tensor | None, samples: int, draw: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """The indices of each class, shuffled, in the order of the labels."""
    if labels is None or labels.shape != (samples,):
        found = "none" if labels is None else f"labels of shape {list(labels.shape)}"
        raise ConfigError(
            f"dividing by label needs one label for each of {number_of(samples, 'sample')} and found {found}: use a "
            "TensorDataset of inputs and labels, or give the dataset a `targets` attribute"
        )
    values = labels.numpy()
    return [draw.permutation(np.flatnonzero(values == value)) for value in np.unique(values)]


def _apportion(total: int, shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Whole numbers that sum to `total`, in proportion to `shares` (largest remainders)."""
    exact = total * shares / shares.sum()
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def _filled(piles: list[list[int]]) -> list[Tensor]:
    """The shards, each empty one given a sample from the largest."""
    for pile in piles:
        if not pile:
            pile.append(max(piles, key=len).pop())
    return _tensors(piles)


def _tensors(piles: Any) -> list[Tensor]:
    return [torch.as_tensor(pile, dtype=torch.int64).sort().values for pile in piles]


def _enough(samples: int, shards: int) -> None:
    if not 1 <= shards <= samples:
        among = number_of(shards, "shard")
        raise ConfigError(f"{number_of(samples, 'sample')} cannot be divided among {among}: use 1 to {samples} shards")


def _positive(alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"a Dirichlet's alpha is above 0, not {alpha}: use 0.1 for uneven, 100 for nearly even")
