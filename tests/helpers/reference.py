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
    data: list[Samples], *, seed: int, rounds: int, batch_size: int, shuffle: bool
) -> Iterator[list[Samples]]:
    """For every window of every round, the batch of every shard that has one left."""
    for round_ in range(rounds):
        orders = [order(seed, shard, round_, len(y), shuffle) for shard, (_, y) in enumerate(data)]
        for start in range(0, max(len(rows) for rows in orders), batch_size):
            chosen = [rows[start : start + batch_size] for rows in orders]
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
) -> dict[str, Tensor]:
    """Final weights of plain training on the union of all shards' batches, one window after another."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = nn.Sequential(OrderedDict(parts()))
    factory, options = optimizer
    stepper: Any = factory([p for p in model.parameters() if p.requires_grad], **options)
    for window in merged_batches(data, seed=seed, rounds=rounds, batch_size=batch_size, shuffle=shuffle):
        x, y = (torch.cat(column) for column in zip(*window, strict=True))
        stepper.zero_grad()
        loss(model(x), y).backward()
        stepper.step()
    return model.state_dict()
