"""Counters of one node."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping


class Timing:
    """See `Counters.timing`."""

    __slots__ = ("_counters", "_name", "_start_s")

    def __init__(self, counters: Counters, name: str) -> None:
        self._counters, self._name = counters, name

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._counters.add(self._name, time.perf_counter() - self._start_s)


class Counters:
    """Sums by name, since the node started."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, amount: float = 1.0) -> None:
        """Add to one sum."""
        self._sums[name] += amount

    def timing(self, name: str) -> Timing:
        """Adds the seconds that a `with` block takes."""
        return Timing(self, name)

    def snapshot(self) -> dict[str, float]:
        """All sums as they stand."""
        return dict(self._sums)


def difference(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was added between two snapshots."""
    return {name: total - before.get(name, 0.0) for name, total in now.items()}


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Two snapshots as one."""
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
