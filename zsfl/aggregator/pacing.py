"""How large each client's next batch is where sizes follow speed: decisions only, the clock is handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zsfl.ids import StepId, Version
from zsfl.learning.batches import BySpeed
from zsfl.learning.skew import regulate

SMOOTHING = 0.3
"""Weight of the newest measurement in a client's speed."""
OUTLIER = 4.0
"""No measurement counts as more than so many times faster or slower than what was known."""
REMEMBERED = 64
"""Versions whose beginning is remembered, for steps that come late."""

Slices = dict[int, tuple[int, int]]
"""By shard: where in its endless stream of samples its batches begin, and the size of each."""


class Pacer:
    """Measures clients from the announcement of a version to the arrival of their steps."""

    def __init__(self, rule: BySpeed, batch_size: int, steps: int) -> None:
        self._rule = rule
        self._batch_size = batch_size
        self._steps = steps
        self._speeds: dict[int, float] = {}
        """Samples a second."""
        self._positions: dict[int, int] = {}
        self._began: dict[Version, tuple[float, Slices]] = {}

    def began(
        self, version: Version, shards: Sequence[int], classes: Mapping[int, Sequence[int]], now_s: float
    ) -> Slices:
        """The slices of all shards at a version that begins now; their streams go on behind them."""
        known = [self._speeds[shard] for shard in shards if shard in self._speeds]
        guess = sum(known) / len(known) if known else 1.0
        sizes = regulate(
            [self._speeds.get(shard, guess) for shard in shards],
            [classes.get(shard, ()) for shard in shards],
            self._batch_size * len(shards),
            self._rule.least,
            self._rule.most,
            self._rule.mix,
        )
        slices = {shard: (self._positions.get(shard, 0), size) for shard, size in zip(shards, sizes, strict=True)}
        for shard, (start, size) in slices.items():
            self._positions[shard] = start + size * self._steps
        self._began[version] = now_s, slices
        while len(self._began) > REMEMBERED:
            del self._began[next(iter(self._began))]
        return slices

    def arrived(self, step: StepId, now_s: float) -> None:
        """A whole step is there: the client's first, or it has made those before it too since the version began."""
        began_s, slices = self._began.get(step.version, (now_s, {}))
        if step.shard not in slices or now_s <= began_s:
            return
        speed = (step.k + 1) * slices[step.shard][1] / (now_s - began_s)
        before = self._speeds.get(step.shard, speed)
        speed = min(max(speed, before / OUTLIER), before * OUTLIER)
        self._speeds[step.shard] = before + SMOOTHING * (speed - before)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON takes it."""
        return {
            "speeds": {str(shard): speed for shard, speed in self._speeds.items()},
            "positions": {str(shard): position for shard, position in self._positions.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what was known before."""
        self._speeds = {int(shard): float(speed) for shard, speed in state["speeds"].items()}
        self._positions = {int(shard): int(position) for shard, position in state["positions"].items()}
