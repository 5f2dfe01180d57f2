"""Averages that some clients cannot spoil, be they broken or hostile, as long as most are neither.

Each client has one vote: the mean gradient of all its steps in the window, late ones damped. Votes are not weighed by
samples, as their number is what a client says it is, and as the rules' guarantees are for equal votes; so with shards
of unequal size these are not the exact sample average. A node that holds several shards has a vote for each.

`Median` and `TrimmedMean`: Yin et al. 2018, Algorithm 1. With n > 2f clients of which f are wrong, each coordinate of
the result lies between the lowest and the highest that an honest client has there. `Krum`: Blanchard et al. 2017.

The gradients of all clients are needed at once, so they are read in blocks of coordinates, from the disk where they
are large: memory grows neither with the model nor with the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from zsfl.errors import ConfigError, RunFailed
from zsfl.ids import parse_cid
from zsfl.learning.averaging import Contribution, average, ordered, wide
from zsfl.learning.batches import is_number
from zsfl.learning.flat import FlatTensors

BLOCK_BYTES = 16 << 20
"""Of the votes that are in memory at once; sorting them takes some times as much."""


def _check_count(name: str, value: object, least: int) -> None:
    if type(value) is not int or not least <= value <= 2**31 - 1:
        raise ConfigError(f"{name} is {value!r}: use a whole number of clients, from {least} up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """Of each coordinate the median over the clients; of an even number, the mean of the two in the middle."""

    f: int = 1
    """Clients that may be wrong; with fewer than 2f+1 in a window, it makes a version of nothing."""

    def __post_init__(self) -> None:
        _check_count("f", self.f, 1)

    @property
    def least(self) -> int:
        """Clients that a window needs."""
        return 2 * self.f + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimmedMean:
    """Of each coordinate the mean over the clients without the f highest and the f lowest."""

    f: int = 1
    """Clients that may be wrong; with fewer than 2f+1 in a window, it makes a version of nothing."""

    def __post_init__(self) -> None:
        _check_count("f", self.f, 1)

    @property
    def least(self) -> int:
        """Clients that a window needs."""
        return 2 * self.f + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Krum:
    """The gradient that is nearest to its n-f-2 nearest others, or with m > 1 (multi-Krum) the mean of the m best.

    It takes gradients whole: what it takes may be off by a coordinate that no honest client would have.
    """

    f: int = 1
    """Clients that may be wrong; with fewer than 2f+3 in a window, it makes a version of nothing."""
    m: int = 1
    """How many are averaged; at most n-f-2 are where n clients are in the window."""

    def __post_init__(self) -> None:
        _check_count("f", self.f, 1)
        _check_count("m", self.m, 1)

    @property
    def least(self) -> int:
        """Clients that a window needs."""
        return 2 * self.f + 3


@dataclass(frozen=True, slots=True)
class NormBound:
    """How long the mean gradient of one step may be: its L2 norm over all parameters of head, body and tail.

    A step that is not finite, does not fit the model, or is of another batch than was asked for is refused, too. The
    statistics of batch norm are not bounded, and the sample average still believes how many samples a shard has.
    """

    norm: float
    """Infinity: only what is not finite, or does not fit, is refused."""
    beyond: Literal["clip", "refuse"] = "clip"
    """A step beyond it is scaled down to it, or dropped."""

    def __post_init__(self) -> None:
        if not (is_number(self.norm) and self.norm > 0):
            raise ConfigError(f"norm_bound is {self.norm!r}: use a norm above 0")
        if self.beyond not in ("clip", "refuse"):
            raise ConfigError(f"beyond is {self.beyond!r}: use 'clip' or 'refuse'")


Rule = Median | TrimmedMean | Krum
Average = Literal["mean"] | Rule


def is_trusting(how: Average, bound: NormBound | None) -> bool:
    """Whether clients are taken by their word, as they are unless a job says what to do about those that go wrong."""
    return how == "mean" and bound is None


def most_wrong(how: Average, bound: NormBound | None, clients: int) -> int:
    """How many of so many clients may be wrong, whatever they say of their losses: always less than half."""
    if is_trusting(how, bound):
        return 0
    return min(max(1, clients // 4) if how == "mean" else how.f, max(0, clients - 1) // 2)


def combine(how: Average, contributions: Sequence[Contribution]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Gradient by full name, and of Krum the shards whose gradients were taken.

    `RunFailed` when there are fewer clients than the rule needs, or when their n sum to nothing.
    """
    if how == "mean":
        return average(contributions), ()
    votes = Votes(contributions)
    if len(votes.shards) < how.least:
        raise RunFailed(f"{how} needs the steps of {how.least} clients, and there are those of {len(votes.shards)}")
    match how:
        case Median():
            return votes.by_coordinate(_median), ()
        case TrimmedMean(f=f):
            return votes.by_coordinate(lambda block: _mean(_in_order(block)[f : len(block) - f])), ()
        case Krum():
            best = _nearest(votes.distances(), how)
            return votes.by_coordinate(_mean, best), tuple(votes.shards[row] for row in best)


def voters(contributions: Sequence[Contribution]) -> set[int]:
    """Shards that have a vote: those whose steps weigh anything."""
    return {parse_cid(one.cid).shard for one in contributions if one.n > 0}


class Votes:
    """The mean gradient of each client of a window; rows are in the order of shards."""

    def __init__(self, contributions: Sequence[Contribution]) -> None:
        self.shards = sorted(voters(contributions))
        self._of: dict[int, list[Contribution]] = {shard: [] for shard in self.shards}
        self._n: dict[tuple[int, str], float] = {}
        self._tensors: dict[str, Tensor] = {}
        """By name, one that is like it in shape and type."""
        for one in ordered(contributions):
            shard = parse_cid(one.cid).shard
            if shard in self._of:
                self._of[shard].append(one)
                self._n[shard, one.part] = self._n.get((shard, one.part), 0.0) + one.n
            for name in one.grads:
                if name not in self._tensors:
                    self._tensors[name] = _like(one.grads, name)

    def by_coordinate(self, rule: Callable[[Tensor], Tensor], rows: Collection[int] | None = None) -> dict[str, Tensor]:
        """By full name, what the rule makes of blocks [clients, coordinates] of these rows (None: all)."""
        made: dict[str, Tensor] = {}
        for name, like in self._tensors.items():
            blocks = [rule(block) for block in self._blocks(name, rows)]
            made[name] = (torch.cat(blocks) if blocks else torch.empty(0, dtype=wide(like.dtype))).view(like.shape)
        return made

    def distances(self) -> Tensor:
        """Squared distance between any two, [clients, clients] in float64."""
        total = torch.zeros(len(self.shards), len(self.shards), dtype=torch.float64)
        for name in self._tensors:
            for block in self._blocks(name, None):
                given = block.double()
                total += torch.cdist(given, given, compute_mode="donot_use_mm_for_euclid_dist").square_()
        return total

    def _blocks(self, name: str, rows: Collection[int] | None) -> Iterator[Tensor]:
        """The rows' coordinates of one tensor, [rows, some], one block after another."""
        like = self._tensors[name]
        shards = self.shards if rows is None else [self.shards[row] for row in rows]
        dtype, count = wide(like.dtype), prod(like.shape)
        size = max(1, BLOCK_BYTES // (dtype.itemsize * len(shards)))
        for start in range(0, count, size):
            block = torch.zeros(len(shards), min(size, count - start), dtype=dtype)
            for shard, row in zip(shards, block, strict=True):
                self._fill(row, shard, name, start)
            yield block

    def _fill(self, row: Tensor, shard: int, name: str, start: int) -> None:
        """The mean gradient of one client, from its coordinate `start` on; a missing one is zero."""
        part = ""
        for one in self._of[shard]:
            if name in one.grads:
                row.add_(_piece(one.grads, name, start, len(row)), alpha=one.factor)
                part = part or one.part
        if part:
            row /= self._n[shard, part]


def _like(grads: Mapping[str, Tensor], name: str) -> Tensor:
    """Without the numbers, which may be on the disk."""
    if isinstance(grads, FlatTensors):
        return torch.empty(grads.layout.places[name][0], dtype=grads.layout.dtype, device="meta")
    return grads[name].to("meta")


def _piece(grads: Mapping[str, Tensor], name: str, start: int, count: int) -> Tensor:
    if isinstance(grads, FlatTensors):
        return grads.piece(name, start, count)
    return grads[name].reshape(-1)[start : start + count]


def _in_order(block: Tensor) -> Tensor:
    """Each coordinate's votes from low to high; numpy sorts columns several times as fast as torch does."""
    return torch.from_numpy(np.sort(block.numpy(), axis=0))


def _median(block: Tensor) -> Tensor:
    in_order, middle = _in_order(block), len(block) // 2
    if len(block) % 2:
        return in_order[middle]
    return in_order[middle - 1] / 2 + in_order[middle] / 2  # whose sum might overflow


def _mean(block: Tensor) -> Tensor:
    """Summed row by row, so that its last bits depend on nothing else."""
    total = torch.zeros_like(block[0])
    for row in block:
        total += row
    return total / len(block)


def _nearest(distances: Tensor, how: Krum) -> list[int]:
    """Rows with the least sums of squared distances to their nearest others; of equal ones the first. In order."""
    clients = len(distances)
    others = distances + torch.diag(torch.full((clients,), torch.inf, dtype=distances.dtype))
    scores = others.sort(1).values[:, : clients - how.f - 2].sum(1).tolist()
    best = sorted(range(clients), key=lambda row: (scores[row], row))
    return sorted(best[: min(how.m, clients - how.f - 2)])
