"""Ordinary training in one process, written without zsfl: what a run in exact mode must equal."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Samples = tuple[Tensor, Tensor]


def order(seed: int, shard: int, round_: int, samples: int, shuffle: bool) -> Tensor:
    """In which order a shard's samples come in one round, by the documented recipe."""
    if not shuffle:
        return torch.arange(samples)
    text = f"{seed}/{shard}/{round_}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:4], "little"))
    return torch.randperm(samples, generator=generator)


def merged_batches(
    data: list[Samples],
    *,
    seed: int,
    rounds: int,
    batch_size: int,
    shuffle: bool,
    proportional: bool = False,
    steps: int = 1,
) -> Iterator[list[Samples]]:
    """For every window of every round, the batch (or `steps` batches) of every shard that has some left.

    A batch is `batch_size` samples, or `proportional` to the shard: all shards then have the same number of them, as
    many as it takes for `batch_size` on average.
    """
    sizes = [len(y) for _, y in data]
    count = -(-sum(sizes) // (batch_size * len(sizes))) if proportional else -(-max(sizes) // batch_size)
    windows = -(-count // steps)
    for round_ in range(rounds):
        orders = [order(seed, shard, round_, size, shuffle) for shard, size in enumerate(sizes)]
        for window in range(windows):
            first, last = window * steps, (window + 1) * steps
            if proportional:
                cuts = [(first * size // (windows * steps), last * size // (windows * steps)) for size in sizes]
            else:
                cuts = [(first * batch_size, last * batch_size) for _ in sizes]
            chosen = [rows[start:stop] for rows, (start, stop) in zip(orders, cuts, strict=True)]
            yield [(x[rows], y[rows]) for (x, y), rows in zip(data, chosen, strict=True) if len(rows)]


def train(
    parts: Callable[[], dict[str, nn.Module]],
    data: list[Samples],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]],
    *,
    seed: int,
    rounds: int,
    batch_size: int,
    shuffle: bool,
    proportional: bool = False,
    steps: int = 1,
    frozen_norms: bool = False,
) -> dict[str, Tensor]:
    """Final weights of plain training on the union of all shards' batches, one window after another."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = nn.Sequential(OrderedDict(parts()))
    factory, options = optimizer
    stepper: Any = factory([p for p in model.parameters() if p.requires_grad], **options)
    if frozen_norms:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    windows = merged_batches(
        data, seed=seed, rounds=rounds, batch_size=batch_size, shuffle=shuffle, proportional=proportional, steps=steps
    )
    for window in windows:
        x, y = (torch.cat(column) for column in zip(*window, strict=True))
        stepper.zero_grad()
        loss(model(x), y).backward()
        stepper.step()
    return model.state_dict()
