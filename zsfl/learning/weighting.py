"""What a contribution counts where clients do not keep step: less when it is late, and no more than its share.

Xie et al. 2019 (FedAsync) damp a gradient that is t versions old by (1+t)^-1/2. For plain descent on a quadratic of
curvature between mu and L that all clients have in common, delays up to tau, a step a = lr * L with a <= 1 and
a * tau < 1, and corrections down to 1/C, that converges whatever the delays are, and however many contributions with
delays of their own make a version: |x_k| <= rho^floor(k / (2 tau + 1)) |x_0|, with
rho = 1 - lr * mu * (1+tau)^-1/2 * (1 - a * tau) / C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsfl.words import number_of

HORIZON = 32.0
"""Versions after which a half is forgotten of what a client moved: several times as long as a slow client's step."""

MOST_WEIGHT = 100.0
"""Of a sample in a weighted loss, unless the job states another bound: one client cannot outweigh all others."""


def weight_objection(n: float, samples: int, most: float | None) -> str:
    """Why a batch of so many samples cannot weigh `n`; `most`: what one may weigh, None where each weighs 1."""
    if most is None:
        return (
            ""
            if n == samples
            else f"it weighs n={n:g} for {number_of(samples, 'sample')}, and the job has no loss_weight"
        )
    if 0 <= n <= most * samples:
        return ""
    return f"it weighs n={n:g} for {number_of(samples, 'sample')}, and most_weight of the job is {most:g} for each"


def staleness_weight(staleness: int) -> float:
    """How much of a gradient counts that is so many versions old."""
    return 1.0 if staleness == 0 else (1.0 + staleness) ** -0.5


class Shares:
    """By what clients' gradients are multiplied, so that in the long run each moves the weights by about its share.

    A contribution of n of the N samples of a version moves the weights by n/N of its mean gradient. Of each client this
    is added up, and beside it what it would be if everybody came to every version; both fade exponentially. The
    correction is the second sum by the first: exactly 1 for whoever is never late and never early. A slow client stays
    below its share where `average` keeps a version from moving too far, which is the more the fewer clients there are.
    """

    def __init__(self, max_correction: float) -> None:
        """No correction is above `max_correction` or below its inverse."""
        self._most = max_correction
        self._due: dict[int, float] = {}
        self._moved: dict[int, float] = {}

    def there(self, samples: Mapping[int, int]) -> None:
        """These shards are there now, with so many training samples; one that is new begins with its share."""
        level: float = 1 / (1 - 0.5 ** (1 / HORIZON)) / max(sum(samples.values()), 1)
        new = {shard: level * count for shard, count in samples.items()}
        self._due = {shard: self._due.get(shard, new[shard]) for shard in samples}
        self._moved = {shard: self._moved.get(shard, new[shard]) for shard in samples}

    def counted(self, samples: Mapping[int, int], expected: Mapping[int, int]) -> None:
        """A version counts so many samples of each shard, and would have counted `expected`."""
        self._due = _faded(self._due, expected)
        self._moved = _faded(self._moved, samples)

    def correction(self, shard: int) -> float:
        """By what its gradient is to be multiplied, in the version that was counted last."""
        due, moved = self._due.get(shard, 0.0), self._moved.get(shard, 0.0)
        if not due or not moved:
            return 1.0
        return min(self._most, max(1 / self._most, due / moved))

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON takes it."""
        return {name: {str(s): value for s, value in sums.items()} for name, sums in self._sums().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what was counted before."""
        for name, sums in self._sums().items():
            sums.update({int(shard): float(value) for shard, value in state[name].items()})

    def _sums(self) -> dict[str, dict[int, float]]:
        return {"due": self._due, "moved": self._moved}


def _faded(sums: Mapping[int, float], samples: Mapping[int, int]) -> dict[int, float]:
    fade: float = 0.5 ** (1 / HORIZON)
    total = max(sum(samples.values()), 1)
    return {shard: fade * before + samples.get(shard, 0) / total for shard, before in sums.items()}
