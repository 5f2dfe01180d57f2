"""How large each client's next batch is where sizes follow speed: decisions only, the clock is handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
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
    """Measures clients from the announcement of a version to the arrival of their steps.

    A client that was still busy with an earlier version is measured from when it was done with that. One that a
    version did not wait for is no faster than what it had to do in that time: else who is always late would never be
    measured at all.
    """

    def __init__(self, rule: BySpeed, batch_size: int, steps: int) -> None:
        self._rule = rule
        self._batch_size = batch_size
        self._steps = steps
        self._speeds: dict[int, float] = {}
        """Samples a second."""
        self._positions: dict[int, int] = {}
        self._began: dict[Version, tuple[float, Slices]] = {}
        self._busy: dict[int, tuple[Version, float]] = {}
        """By shard, the newest version that a step of it is of, and when it began with that."""
        self._free_s: dict[int, float] = {}
        """By shard, when its last step arrived."""

    def began(
        self, version: Version, shards: Sequence[int], classes: Mapping[int, Sequence[int]], now_s: float
    ) -> Slices:
        """The slices of all `shards` at a version that begins now, or anew; their streams go on behind them.

        `classes` are those of everybody whose label mix the merged batch is to keep, others than `shards` too.
        """
        if version in self._began:  # it is asked for anew, from where it began
            self._positions |= {shard: start for shard, (start, _) in self._began[version][1].items()}
        else:
            self._note_late(shards, now_s)
        slices = dict(zip(shards, self._places(shards, classes), strict=True)) if shards else {}
        for shard, (start, size) in slices.items():
            self._positions[shard] = start + size * self._steps
        self._began.pop(version, None)
        self._began[version] = now_s, slices
        while len(self._began) > REMEMBERED:
            del self._began[next(iter(self._began))]
        return slices

    def _places(self, shards: Sequence[int], classes: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
        guess = self._guess() or 1.0
        sizes = regulate(
            [self._speeds.get(shard, guess) for shard in shards],
            [classes.get(shard, ()) for shard in shards],
            self._batch_size * len(shards),
            self._rule.least,
            self._rule.most,
            self._rule.mix,
            list(map(sum, zip_longest(*classes.values(), fillvalue=0))),
        )
        return [(self._positions.get(shard, 0), size) for shard, size in zip(shards, sizes, strict=True)]

    def _guess(self) -> float | None:
        """How fast somebody unknown may be: the mean of those who are known."""
        return sum(self._speeds.values()) / len(self._speeds) if self._speeds else None

    def _note_late(self, shards: Sequence[int], now_s: float) -> None:
        """The newest version is over: who still has to deliver its first step there was not fast enough."""
        for version, (began_s, slices) in [*self._began.items()][-1:]:
            for shard in shards:
                busy = self._busy.get(shard)
                known = self._speeds.get(shard, self._guess())
                if shard not in slices or known is None or (busy is not None and busy[0] >= version):
                    continue
                seconds = now_s - max(began_s, self._free_s.get(shard, began_s))
                if seconds * known > slices[shard][1]:
                    self._measured(shard, slices[shard][1] / seconds)

    def arrived(self, step: StepId, now_s: float) -> None:
        """A whole step is there: the client's first, or it has made those before it too since the version began."""
        began_s, slices = self._began.get(step.version, (now_s, {}))
        version, since_s = self._busy.get(step.shard, (Version(-1), 0.0))
        if step.shard not in slices or step.version < version:
            return
        if step.version > version:
            since_s = max(began_s, self._free_s.get(step.shard, began_s))
            self._busy[step.shard] = step.version, since_s
        self._free_s[step.shard] = now_s
        if now_s > since_s:
            self._measured(step.shard, (step.k + 1) * slices[step.shard][1] / (now_s - since_s))

    def _measured(self, shard: int, speed: float) -> None:
        before = self._speeds.get(shard, speed)
        speed = min(max(speed, before / OUTLIER), before * OUTLIER)
        self._speeds[shard] = before + SMOOTHING * (speed - before)

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
