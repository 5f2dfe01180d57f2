"""Who may aggregate: one at a time, by the consent of most clients. Decisions only.

An aggregator that others stand by commits only while clients that hold more than half of the shards have promised, for
a time, to follow nobody else. Whoever takes over needs such promises too, so that it has to wait for those of its
predecessor to run out: even one that was stopped, and wakes, finds its lease over and commits nothing. Every takeover
begins an epoch, and what is said in an earlier one counts no more.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

MARGIN = 0.9
"""Of a promised time, what its holder relies on: clocks of two machines do not run quite alike."""
HANDOVER_S = 10.0
"""What whoever takes over may take until it leads: it makes the last versions again first."""
MAX_LEASE_S = 600.0
"""A longer promise is not given."""
BEHIND_LEASES = 2.0
"""How long somebody who lacks versions that were published is passed over, for somebody who has them, in leases."""


def clock_s() -> float:
    """Seconds that pass on this machine, also while it sleeps where the system can tell."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def most_of(shards: int) -> int:
    """How many of these are more than half."""
    return shards // 2 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Who asks for a promise."""

    holder: str
    """Of its run folder, which one process at a time has: it stays the same over restarts."""
    name: str
    epoch: int
    """That it leads in, or would."""
    known: int
    """The last that it led in or followed."""
    version: int
    """The newest that it has, as it was then."""

    @property
    def newest(self) -> tuple[int, int]:
        """What it has got; of two the greater one is to go on."""
        return self.known, self.version


class Promise:
    """What one client has promised to whom. Two whom a majority promised the same time cannot be."""

    def __init__(self, now_s: float, lease_s: float) -> None:
        """What an earlier process may have promised is unknown, so that the first time counts as given away."""
        self.epoch = 0
        """The highest that it agreed to; what is said in an earlier one counts no more."""
        self.newest = (0, 0)
        """Epoch and version, the newest that were heard of."""
        self._asked = (0, 0)
        """The newest that somebody had who asked."""
        self._holder = self._name = ""
        self._lease_s = lease_s
        self._until_s = now_s + lease_s
        self._wished_s: float | None = None
        """Since when somebody could have it who lacks versions."""

    def heard_of(self, epoch: int, version: int) -> None:
        """An aggregator said where it stands."""
        self.epoch, self.newest = max(self.epoch, epoch), max(self.newest, (epoch, version))

    def ask(self, by: Candidate, lease_s: float, now_s: float) -> str:
        """Promise `by` this time; if that is not possible, why."""
        is_same = by.holder == self._holder and by.epoch >= self.epoch
        # After a restart one may be known only by what its aggregator said: of that, nobody else may become the leader.
        has_begun = bool(self._holder) or by.known < self.epoch
        if by.epoch < self.epoch or (by.epoch == self.epoch and has_begun and not is_same):
            return f"epoch {self.epoch} has begun"
        self._asked = max(self._asked, by.newest)
        if now_s < self._until_s and not is_same:
            whom = (
                f"are promised to {self._name}" if self._name else "may have been promised to another before a restart"
            )
            return f"the next {self._until_s - now_s:.1f} s {whom}"
        best = max(self.newest, self._asked)
        if not is_same and by.newest < best:
            self._wished_s = now_s if self._wished_s is None else self._wished_s
            if now_s < self._wished_s + BEHIND_LEASES * self._lease_s:
                return f"version {best[1]} of epoch {best[0]} is there, and {by.name} has {by.version} of {by.known}"
        if not is_same:
            self.newest = self._asked = by.newest
        self._wished_s = None
        self.epoch, self._holder, self._name = by.epoch, by.holder, by.name
        self._until_s = now_s + min(lease_s, MAX_LEASE_S)
        return ""


class Answer(Protocol):
    """What a client says to who asks for a promise."""

    @property
    def shards(self) -> Collection[int]:
        """Those that it speaks for."""
        ...

    @property
    def refused(self) -> str:
        """Why it promised nothing; empty: it did."""
        ...

    @property
    def lease_s(self) -> float:
        """For how long it did."""
        ...


class Lease:
    """The promises that an aggregator holds, or somebody who wants to be one."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._until_s: dict[int, float] = {}

    def promised(self, shards: Collection[int], asked_s: float, lease_s: float) -> None:
        """The client of these shards agreed to what it was asked at `asked_s`."""
        for shard in shards:
            if 0 <= shard < self._shards:
                self._until_s[shard] = asked_s + MARGIN * min(lease_s, MAX_LEASE_S)

    def answered(self, answers: Iterable[Answer], asked_s: float) -> None:
        """What all who were asked at `asked_s` said, as far as they did.

        A shard has one voice: where two processes hold it, and one of them refuses, it has promised nothing. Of two on
        different sides of a network that is cut, nobody hears both: a shard is to be held by one machine.
        """
        known = list(answers)
        refused = {shard for answer in known if answer.refused for shard in answer.shards}
        for answer in known:
            if not answer.refused:
                self.promised([shard for shard in answer.shards if shard not in refused], asked_s, answer.lease_s)
        for shard in refused:
            self._until_s.pop(shard, None)

    def held_of(self, now_s: float) -> int:
        """How many shards' promises hold now."""
        return sum(until_s > now_s for until_s in self._until_s.values())

    def is_held(self, now_s: float) -> bool:
        """Whether nobody else can lead now."""
        return self.held_of(now_s) >= most_of(self._shards)
