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
NEAR_EPOCHS = 64
"""Nobody who stands by is so many ahead of whoever leads: a client that knows of a later one is wrong, or lies."""
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
        if self.epoch and by.epoch > self.epoch + NEAR_EPOCHS:  # nobody could lead after the last one there is
            return f"epoch {by.epoch} is too far from {self.epoch}"
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

    @property
    def epoch(self) -> int:
        """The highest that it knows."""
        ...


class Lease:
    """The promises that an aggregator holds, or somebody who wants to be one.

    What clients say of other epochs is decided by the most of them: one alone may be wrong, or lie.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._until_s: dict[int, float] = {}
        self._refused: dict[int, tuple[int, float]] = {}
        """Of shards whose clients promised nothing when asked last: the epoch that they know, and when it was."""

    def promised(self, shards: Collection[int], asked_s: float, lease_s: float) -> None:
        """The client of these shards agreed to what it was asked at `asked_s`."""
        for shard in shards:
            if 0 <= shard < self._shards:
                self._until_s[shard] = asked_s + MARGIN * min(lease_s, MAX_LEASE_S)
                self._refused.pop(shard, None)

    def answered(self, answers: Iterable[Answer], asked_s: float) -> None:
        """What those who were asked at `asked_s` said, as far as they did; more may be said by others afterwards.

        A shard has one voice: where two processes hold it, and one of them refuses, it has promised nothing. Of two on
        different sides of a network that is cut, nobody hears both: a shard is to be held by one machine.
        """
        known = list(answers)
        refused: dict[int, int] = {}
        for answer in known:
            if answer.refused:
                refused |= {shard: max(answer.epoch, refused.get(shard, 0)) for shard in answer.shards}
        against = refused.keys() | {shard for shard, (_, then_s) in self._refused.items() if then_s >= asked_s}
        for answer in known:
            if not answer.refused:
                self.promised([shard for shard in answer.shards if shard not in against], asked_s, answer.lease_s)
        for shard, epoch in refused.items():
            self._until_s.pop(shard, None)
            if 0 <= shard < self._shards:
                self._refused[shard] = epoch, asked_s

    def held_of(self, now_s: float) -> int:
        """How many shards' promises hold now."""
        return sum(until_s > now_s for until_s in self._until_s.values())

    def is_held(self, now_s: float) -> bool:
        """Whether nobody else can lead now."""
        return self.held_of(now_s) >= most_of(self._shards)

    def lasts_s(self, now_s: float) -> float:
        """For how long it is held from now on, if nobody promises more; 0 when it is not."""
        until_s = sorted(self._until_s.values(), reverse=True)[most_of(self._shards) - 1 :]
        return max(0.0, until_s[0] - now_s) if until_s else 0.0

    def is_contested(self, asked_s: float, now_s: float) -> bool:
        """Whether as many shards as promised, or more, refused what their clients were asked at `asked_s`."""
        refused = sum(then_s >= asked_s for _, then_s in self._refused.values())
        return refused > 0 and refused >= self.held_of(now_s)

    def is_succeeded(self, epoch: int, since_s: float, now_s: float, *, alone: bool = False) -> bool:
        """Whether it is not held, and most shards' clients said since then that a later epoch has begun.

        `alone`: nobody's consent is needed, and half of those who answer have to say so.
        """
        refused = [known for known, then_s in self._refused.values() if then_s >= since_s]
        later, held = sum(known > epoch for known in refused), self.held_of(now_s)
        if alone:
            return later > 0 and 2 * later >= len(refused) + held
        return held < most_of(self._shards) <= later

    def epoch_for_all(self, epoch: int) -> int:
        """In which to lead so that all follow: later than what clients know who hear nothing of this one any more."""
        later = [known for known, _ in self._refused.values() if epoch < known <= epoch + NEAR_EPOCHS]
        return min(max(later) + 1, epoch + NEAR_EPOCHS) if later else epoch

    def next_epoch(self, epoch: int) -> int:
        """In which to stand on where another stands in this one, or a later one; the same where nobody does.

        As far as one client alone says so it is the next: else it could name the last that there is.
        """
        if not any(known >= epoch for known, _ in self._refused.values()):
            return epoch
        return max(epoch, self._epoch_of(most_of(self._shards))) + 1

    def _epoch_of(self, shards: int) -> int:
        """The highest that the clients of so many shards, when they refused, knew of; 0 where fewer did."""
        known = sorted((epoch for epoch, _ in self._refused.values()), reverse=True)
        return known[shards - 1] if 0 < shards <= len(known) else 0
