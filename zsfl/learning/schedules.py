"""Learning rates that change from version to version: factors on the optimizer's own rate.

A schedule depends on nothing but the version, so a resumed run goes on with the right rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from zsfl.errors import ConfigError

Schedule = Callable[[int], float]
"""Of the version: what the learning rate is multiplied by."""


@dataclass(frozen=True, slots=True)
class Cosine:
    """See `cosine`."""

    versions: int
    warmup: int
    floor: float

    def __call__(self, version: int) -> float:
        return _decay(version, self.versions, self.warmup, self.floor, lambda done: (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, slots=True)
class Linear:
    """See `linear`."""

    versions: int
    warmup: int
    floor: float

    def __call__(self, version: int) -> float:
        return _decay(version, self.versions, self.warmup, self.floor, lambda done: 1 - done)


@dataclass(frozen=True, slots=True)
class StepDown:
    """See `step_down`."""

    every: int
    factor: float

    def __call__(self, version: int) -> float:
        return self.factor ** (version // self.every)


@dataclass(frozen=True, slots=True)
class Warmup:
    """See `warmup`."""

    versions: int

    def __call__(self, version: int) -> float:
        return min(1.0, (version + 1) / self.versions)


def cosine(versions: int, warmup: int = 0, floor: float = 0.0) -> Cosine:
    """Half a cosine from 1 down to `floor` at so many versions, after `warmup` versions of rising to 1."""
    _check_decay("cosine", versions, warmup, floor)
    return Cosine(versions, warmup, floor)


def linear(versions: int, warmup: int = 0, floor: float = 0.0) -> Linear:
    """A straight line from 1 down to `floor` at so many versions, after `warmup` versions of rising to 1."""
    _check_decay("linear", versions, warmup, floor)
    return Linear(versions, warmup, floor)


def step_down(every: int, factor: float = 0.1) -> StepDown:
    """Multiplied by `factor` after every so many versions."""
    if not (_whole(every, 1) and _share(factor) and factor > 0):
        raise ConfigError(
            f"step_down(every={every!r}, factor={factor!r}): use a whole every >= 1, a factor above 0, up to 1"
        )
    return StepDown(every, factor)


def warmup(versions: int) -> Warmup:
    """Rising to 1 over so many versions, then 1."""
    if not _whole(versions, 1):
        raise ConfigError(f"warmup({versions!r}): use a whole number of versions from 1 up")
    return Warmup(versions)


def _check_decay(name: str, versions: int, warmup: int, floor: float) -> None:
    if not (_whole(warmup, 0) and _whole(versions, warmup + 1) and _share(floor)):
        given = f"{name}(versions={versions!r}, warmup={warmup!r}, floor={floor!r})"
        raise ConfigError(f"{given}: use whole numbers 0 <= warmup < versions, and 0 <= floor <= 1")


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _decay(version: int, versions: int, warmup: int, floor: float, shape: Callable[[float], float]) -> float:
    if version < warmup:
        return (version + 1) / warmup
    return floor + (1 - floor) * shape(min(1.0, (version - warmup) / (versions - warmup)))
