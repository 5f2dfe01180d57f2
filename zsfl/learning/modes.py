"""How contributions become versions: what a window waits for, and what a late one counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from zsfl.errors import ConfigError
from zsfl.learning.batches import is_number

MOST_QUOTA = 1000
ModeName = Literal["exact", "elastic", "async"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Every step of every client that takes part: equal to one process that trains on the merged batches."""

    return_s: float = 30.0
    """How long a client that vanished is waited for; then the run goes on without its data until it is back.

    A client that says goodbye is not waited for at all.
    """

    def __post_init__(self) -> None:
        _seconds("return_s", self.return_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elastic:
    """Windows as in exact mode, closed without those who are late: a version is made of what came in time."""

    quorum: float = 0.8
    """Share, in samples, of what the window expects of those who are not known to be late that must be there before it
    may close without the rest. All but one client are enough where they have half of the samples. Where that never
    comes, nothing new for five times as long as all that is there took, and for a second, is enough too. 1: everything.
    """
    grace: float = 0.5
    """How much longer the rest may take, as a share of the time that the quorum took."""
    deadline_s: float | None = None
    """After so long a window closes with whatever has come, if anything has; None: only by the quorum."""
    late: Literal["count", "drop"] = "count"
    """A step that comes after its window closed counts in the next one, by its staleness, or is dropped."""
    max_staleness: int = 16
    """A step that is more versions late than this is dropped whatever `late` says."""

    def __post_init__(self) -> None:
        if not (is_number(self.quorum) and 0 < self.quorum <= 1):
            raise ConfigError(f"quorum is {self.quorum!r}: use a share above 0, up to 1")
        if not (is_number(self.grace) and 0 <= self.grace < math.inf):
            raise ConfigError(f"grace is {self.grace!r}: use 0 or more, such as 0.5 for half as long again")
        if self.deadline_s is not None:
            _seconds("deadline_s", self.deadline_s)
        if self.late not in ("count", "drop"):
            raise ConfigError(f"late is {self.late!r}: use 'count' or 'drop'")
        _whole("max_staleness", self.max_staleness, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Async:
    """No windows: every client steps at its own pace, and a version is made whenever enough has come."""

    samples: int | None = None
    """Samples that make a version, late ones included; None: a step, made at the version itself, of nine in ten of the
    clients that are there and not slow, or as many steps as there are clients."""
    seconds: float | None = None
    """After so long a version is made of whatever has come, if anything has; None: only by the samples."""
    quota: int = 2
    """Steps that one client may make at one version. Before another one it gives the next version a moment, twice as
    long as its last step took; not before those without which there would be none, where `samples` takes several of
    every client."""
    max_staleness: int = 16
    """A step that is more versions late than this is dropped."""
    max_correction: float = 4.0
    """A client that contributed more or less than its share of the data is weighed down or up by so much at most;
    1 for no correction."""

    def __post_init__(self) -> None:
        if self.samples is not None:
            _whole("samples", self.samples, 1)
        if self.seconds is not None:
            _seconds("seconds", self.seconds)
        _whole("quota", self.quota, 1, MOST_QUOTA)
        _whole("max_staleness", self.max_staleness, 0)
        if not (is_number(self.max_correction) and 1 <= self.max_correction < math.inf):
            raise ConfigError(f"max_correction is {self.max_correction!r}: use 1 for none, or more")

    def each(self, samples: int, steps: int = 1) -> int:
        """How many steps of every client a version takes at least, where all have so many samples in so many steps."""
        if self.samples is None or not samples:
            return 1
        return max(1, min(self.quota, self.samples * steps // samples))


Mode = Exact | Elastic | Async

_BY_NAME: dict[str, type[Exact] | type[Elastic] | type[Async]] = {
    "exact": Exact,
    "elastic": Elastic,
    "async": Async,
}


def mode_named(name: str) -> Mode:
    """The mode of that name with its defaults."""
    if name not in _BY_NAME:
        raise ConfigError(f"mode is {name!r}: use {', '.join(map(repr, get_args(ModeName)))}")
    return _BY_NAME[name]()


def mode_name(mode: Mode) -> ModeName:
    """What people call this mode."""
    match mode:
        case Exact():
            return "exact"
        case Elastic():
            return "elastic"
        case Async():
            return "async"


def max_staleness(mode: Mode) -> int:
    """How many versions late a step may be to count."""
    match mode:
        case Exact():
            return 0
        case Elastic():
            return mode.max_staleness if mode.late == "count" else 0
        case Async():
            return mode.max_staleness


def _seconds(name: str, value: float) -> None:
    if not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"{name} is {value!r}: use a number of seconds above 0")


def _whole(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}: use a whole number from {least} to {most}")
