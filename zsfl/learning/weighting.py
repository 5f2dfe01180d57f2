"""What a contribution counts where clients do not keep step: less when it is late, and no more than its share.

Xie et al. 2019 (FedAsync) damp a gradient that is t versions old by (1+t)^-1/2. For a quadratic of curvature between mu
and L, delays up to tau and a step a = lr * L with a <= 1 and a * tau < 1, that converges whatever the delays are, and
however many contributions with delays of their own make a version: |x_k| <= rho^floor(k / (2 tau + 1)) |x_0|, with
rho = 1 - lr * mu * (1+tau)^-1/2 * (1 - a * tau).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HORIZON = 4.0
"""Contributions are remembered for about so many merged batches: a half of what was counted then."""


def staleness_weight(staleness: int) -> float:
    """How much of a gradient counts that is so many versions old."""
    return 1.0 if staleness == 0 else (1.0 + staleness) ** -0.5


class Shares:
    """How much a client's contributions count, so that in the long run it has its share of the data.

    Fast clients contribute more often than slow ones. What was counted of each is remembered with an exponentially
    fading weight; a client's correction is its share of the data by its share of what is remembered.
    """

    def __init__(self, max_correction: float) -> None:
        """No correction is above `max_correction` or below its inverse."""
        self._most = max_correction
        self._data: dict[int, float] = {}
        """Training samples of the shards that are there."""
        self._counted: dict[int, float] = {}
        self._batch = 0.0
        """Samples that one step of everybody would count."""

    def there(self, samples: Mapping[int, int], batch: int) -> None:
        """These shards are there now, with so many training samples; `batch` samples are one step of everybody.

        One that is new begins with what it would have contributed by its share.
        """
        total, known = sum(samples.values()), sum(self._counted.get(shard, 0.0) for shard in samples)
        before = sum(count for shard, count in samples.items() if shard in self._counted)
        level = known / before if before else HORIZON * batch / max(total, 1)
        self._counted = {shard: self._counted.get(shard, level * count) for shard, count in samples.items()}
        self._data = {shard: count / total for shard, count in samples.items()}
        self._batch = float(batch)

    def counted(self, samples: Mapping[int, int]) -> None:
        """A version counted so many samples of each of these shards."""
        fade = 0.5 ** (sum(samples.values()) / (HORIZON * self._batch)) if self._batch else 1.0
        self._counted = {shard: fade * count + samples.get(shard, 0) for shard, count in self._counted.items()}

    def correction(self, shard: int) -> float:
        """By what its (S, n) is to be multiplied."""
        share, total = self._data.get(shard, 0.0), sum(self._counted.values())
        if not share or not total:
            return 1.0
        had = self._counted[shard] / total
        return min(self._most, max(1 / self._most, share / had)) if had else self._most

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON takes it."""
        return {"counted": {str(shard): count for shard, count in self._counted.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what was counted before."""
        self._counted = {int(shard): float(count) for shard, count in state["counted"].items()}
