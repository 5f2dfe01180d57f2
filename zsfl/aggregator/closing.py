"""When a version has enough steps: one rule for each mode. Decisions only, the clock is handed in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Protocol

from zsfl.ids import StepId, Version
from zsfl.learning.modes import Async, Elastic, Exact, Mode, max_staleness
from zsfl.learning.plan import Sizes

SHARE_OF_CLIENTS = 0.9
"""Async: a version needs a step of so many of the clients, unless the job says how many samples it needs.

Not of all: one that hesitates would make the others begin another step at the same version, which would then be late.
And steps that are late do not help: they would end the version before those who make theirs at it, until all were late.
"""
HESITANT = 1
"""Async: who delivered nothing during the version before, or only steps that were later than this, is slow: it is not
waited for."""


SILENCE, LEAST_SILENCE_S = 5.0, 1.0
"""Elastic and async: a version that waits for somebody stuck is over when nothing has come for so many times as long as
all that came took, and for so many seconds."""


class Closing(Protocol):
    """Told of everything that happens at a version, says whether that makes the next one."""

    def began(self, version: Version, sizes: Sizes, now_s: float) -> None:
        """From now on steps of these sizes are made at `version`."""
        ...

    def expect(self, sizes: Sizes) -> None:
        """Others make steps at the version too: they joined."""
        ...

    def arrived(self, step: StepId, samples: int, now_s: float) -> None:
        """A whole step that counts is here: of this version, or a late one of an earlier version."""
        ...

    def closes(self, there: Collection[int], now_s: float) -> bool:
        """Whether the version is made of what has come; `there` are the shards that are waited for."""
        ...

    def next_deadline_s(self) -> float:
        """When `closes` may turn true by itself; infinity when only an arrival or a leave can make it so."""
        ...

    def missing(self, there: Collection[int]) -> list[int]:
        """Shards whose steps are still waited for."""
        ...


def closing_for(mode: Mode, quota: int) -> Closing:
    """The rule of a mode; `quota` is how many steps a client makes at one version at most."""
    match mode:
        case Exact():
            return ExactClosing()
        case Elastic():
            return ElasticClosing(mode)
        case Async():
            return AsyncClosing(mode, quota)


class ExactClosing:
    """All steps of all shards that take part."""

    def __init__(self) -> None:
        self._due: dict[int, int] = {}
        self._here: Counter[int] = Counter()
        self._unfinished: dict[int, None] = {}
        """Shards with steps that are due, in their order: most arrivals need to look at the first of them only."""

    def began(self, version: Version, sizes: Sizes, now_s: float) -> None:
        self._due, self._here = _steps(sizes), Counter()
        self._unfinished = dict.fromkeys(self._due)

    def expect(self, sizes: Sizes) -> None:
        steps = _steps(sizes)
        self._due |= steps
        self._unfinished |= {shard: None for shard, due in steps.items() if self._here[shard] < due}

    def arrived(self, step: StepId, samples: int, now_s: float) -> None:
        self._here[step.shard] += 1
        if self._here[step.shard] >= self._due.get(step.shard, 0):
            self._unfinished.pop(step.shard, None)

    def closes(self, there: Collection[int], now_s: float) -> bool:
        return bool(self._here) and not any(shard in there for shard in self._unfinished)

    def next_deadline_s(self) -> float:
        return math.inf

    def missing(self, there: Collection[int]) -> list[int]:
        return [shard for shard in self._unfinished if shard in there]


class ElasticClosing:
    """All steps of all that are not known to be late; or the quorum and some grace; or the deadline; or silence.

    Who still owes a step of an earlier version is known to be late: it is neither waited for, since it cannot begin,
    nor part of what there is a quorum of. One that is too late to count is given up, and owed no more.
    """

    def __init__(self, mode: Elastic) -> None:
        self._mode = mode
        self._version = Version(0)
        self._sizes: Sizes = {}
        self._here: Counter[int] = Counter()
        self._samples: Counter[int] = Counter()
        """By shard, of steps of this version."""
        self._anything = False
        self._began_s = self._quorum_s = self._arrived_s = math.inf
        self._has_quorum = False
        """At the last look: who joins or catches up is waited for again, though grace counts from the first quorum."""
        self._owes: dict[int, Version] = {}
        """By shard, the oldest version at which it owes a step."""

    def began(self, version: Version, sizes: Sizes, now_s: float) -> None:
        owes = self._owes | dict.fromkeys(self.missing(self._sizes), self._version)
        self._owes = {shard: owed for shard, owed in owes.items() if version - owed <= max_staleness(self._mode)}
        self._version, self._sizes, self._here = version, dict(sizes), Counter()
        self._samples, self._anything, self._has_quorum = Counter(), False, False
        self._began_s, self._quorum_s, self._arrived_s = now_s, math.inf, math.inf

    def expect(self, sizes: Sizes) -> None:
        self._sizes |= sizes
        for shard in sizes:  # who comes anew owes nothing any more
            self._owes.pop(shard, None)

    def arrived(self, step: StepId, samples: int, now_s: float) -> None:
        self._anything, self._arrived_s = True, now_s
        if step.version == self._version:
            self._here[step.shard] += 1
            self._samples[step.shard] += samples
        if self._owes.get(step.shard, math.inf) <= step.version:
            del self._owes[step.shard]

    def closes(self, there: Collection[int], now_s: float) -> bool:
        if not self._anything:
            return False
        if now_s >= self._by_clock_s():
            return True
        self._has_quorum = self._is_quorum(there)
        if not self._has_quorum:
            return not any(shard in there for shard in self._unfinished())
        self._quorum_s = min(self._quorum_s, now_s)
        return now_s >= self._by_grace_s() or not self.missing(there)

    def _is_quorum(self, there: Collection[int]) -> bool:
        sizes = {shard: sum(batches) for shard, batches in self._sizes.items() if shard in there and any(batches)}
        punctual = {shard: size for shard, size in sizes.items() if shard not in self._owes} or sizes
        if self._mode.quorum == 1:
            punctual = sizes
        expected, here = sum(punctual.values()), sum(self._samples[shard] for shard in punctual)
        if here >= self._mode.quorum * expected:
            return True
        is_late = sum(self._samples[shard] < size for shard, size in punctual.items())
        return self._mode.quorum < 1 and is_late <= 1 and 2 * here >= expected

    def _by_grace_s(self) -> float:
        return self._quorum_s + self._mode.grace * (self._quorum_s - self._began_s)

    def _by_clock_s(self) -> float:
        deadline_s = self._began_s + (self._mode.deadline_s or math.inf)
        return min(deadline_s, _silent_s(self._began_s, self._arrived_s)) if self._mode.quorum < 1 else deadline_s

    def next_deadline_s(self) -> float:
        by_clock = self._by_clock_s() if self._anything else self._began_s + (self._mode.deadline_s or math.inf)
        return min(by_clock, self._by_grace_s()) if self._has_quorum else by_clock

    def _unfinished(self) -> list[int]:
        return [
            shard for shard, batches in self._sizes.items() if self._here[shard] < sum(size > 0 for size in batches)
        ]

    def missing(self, there: Collection[int]) -> list[int]:
        return [shard for shard in self._unfinished() if shard in there and shard not in self._owes]


class AsyncClosing:
    """So many samples; or so many seconds; or as many steps as those clients that are not slow may make.

    Where the job does not say how many samples: a step of most of those that are not slow, or as many steps as there
    are clients, where fast ones make several.
    """

    def __init__(self, mode: Async, quota: int) -> None:
        self._mode = mode
        self._quota = quota
        self._version = Version(0)
        self._steps: dict[int, int] = {}
        """How many each shard may make at the version: those that sit it out are left out."""
        self._here: Counter[int] = Counter()
        """Steps made at the version itself."""
        self._heard: set[int] = set()
        """Shards with a step that came since the version began, and was late by no more than `HESITANT`."""
        self._slow: set[int] = set()
        self._samples = 0
        self._began_s = self._arrived_s = math.inf

    def began(self, version: Version, sizes: Sizes, now_s: float) -> None:
        self._slow = self._steps.keys() - self._heard
        self._version, self._steps, self._here, self._heard = version, _steps(sizes), Counter(), set()
        self._samples, self._began_s, self._arrived_s = 0, now_s, math.inf

    def expect(self, sizes: Sizes) -> None:
        self._steps |= _steps(sizes)

    def arrived(self, step: StepId, samples: int, now_s: float) -> None:
        self._samples, self._arrived_s = self._samples + samples, now_s
        if step.version >= self._version - HESITANT:
            self._heard.add(step.shard)
        if step.version == self._version:
            self._here[step.shard] += 1

    def closes(self, there: Collection[int], now_s: float) -> bool:
        """Whether a version is made now, of those who are there and what has come."""
        if not self._samples:
            return False
        due = self._due(there)
        # Where those who were quick are gone, whoever is heard is quick enough.
        quick = [shard for shard in due if shard not in self._slow] or [s for s in due if s in self._heard]
        if self._mode.samples is not None:
            enough = self._samples >= self._mode.samples
        else:
            most = bool(quick) and sum(self._here[shard] > 0 for shard in quick) >= SHARE_OF_CLIENTS * len(quick)
            enough = most or self._here.total() >= len(due)
        done = bool(quick) and all(self._here[shard] >= self._quota for shard in quick)
        return enough or done or now_s >= self.next_deadline_s()

    def next_deadline_s(self) -> float:
        by_clock = self._began_s + (self._mode.seconds or math.inf)
        return min(by_clock, _silent_s(self._began_s, self._arrived_s)) if self._samples else by_clock

    def missing(self, there: Collection[int]) -> list[int]:
        return [shard for shard in self._due(there) if self._here[shard] < self._quota]

    def _due(self, there: Collection[int]) -> list[int]:
        """Those who are there and do not sit this version out."""
        return [shard for shard in there if shard in self._steps]


def _silent_s(began_s: float, arrived_s: float) -> float:
    """When a version has been silent for too long; infinity where nothing has come."""
    return arrived_s + max(LEAST_SILENCE_S, SILENCE * (arrived_s - began_s)) if arrived_s < math.inf else math.inf


def _steps(sizes: Mapping[int, list[int]]) -> dict[int, int]:
    """How many steps each shard makes."""
    return {shard: steps for shard, batches in sizes.items() if (steps := sum(size > 0 for size in batches))}
