"""Who holds which shard: decisions only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from zsfl.errors import ConfigError, Held
from zsfl.ids import NodeId
from zsfl.wire.fields import ShardInfo
from zsfl.words import number_of

MOST_NAMED = 64
"""Clients named in one report."""


@dataclass(slots=True)
class _Seat:
    info: ShardInfo
    node: NodeId
    name: str
    gone_since_s: float | None = None
    """None while its client is there; minus infinity once it has said goodbye."""

    @property
    def present(self) -> bool:
        return self.gone_since_s is None


class Roster:
    """Every shard of the job has one client. A client that is gone keeps its seat until somebody takes it over.

    Who vanished still takes part for `return_s`, since it may be back, or replaced, any moment.
    """

    def __init__(self, shards: int, return_s: float = 0.0) -> None:
        self._shards = shards
        self._return_s = return_s
        self._seats: dict[int, _Seat] = {}

    def join(self, node: NodeId, name: str, infos: Sequence[ShardInfo]) -> None:
        """Seat a client; Held while another one that is there has its seat, ConfigError when it cannot have any.

        Joining again changes nothing.
        """
        for info in infos:
            if info.shard >= self._shards:
                raise ConfigError(f"shard {info.shard} is out of range: this job has shards 0 to {self._shards - 1}")
            if not info.train_samples:
                raise ConfigError(f"shard {info.shard} holds no samples; use fewer shards or give it some data")
            seat = self._seats.get(info.shard)
            if seat is not None and seat.present and seat.node != node:
                raise Held(f"shard {info.shard} is already held by {seat.name}; give this client another with --shard")
            if seat is not None and seat.info.train_samples != info.train_samples:
                raise ConfigError(
                    f"shard {info.shard} has {number_of(info.train_samples, 'sample')} at {name} and had "
                    f"{seat.info.train_samples} when the run began; start it with the same data"
                )
        for info in infos:
            self._seats[info.shard] = _Seat(info, node, name)

    def lost(self, node: NodeId, now_s: float, said_goodbye: bool = False) -> None:
        """A client is gone."""
        for seat in self._seats.values():
            if seat.node == node and seat.present:
                seat.gone_since_s = -math.inf if said_goodbye else now_s

    def returned(self, node: NodeId) -> None:
        """A client that counted as gone is there after all: it need not join again."""
        for seat in self._seats.values():
            if seat.node == node:
                seat.gone_since_s = None

    def taking_part(self, now_s: float) -> list[int]:
        """Shards whose steps are waited for: those that are there, and those that may be back in time."""
        return [shard for shard, seat in sorted(self._seats.items()) if self._takes_part(seat, now_s)]

    def next_leave_s(self, now_s: float) -> float:
        """When the next of those who are gone no longer takes part; infinity when nobody is awaited."""
        gone = [seat.gone_since_s for seat in self._seats.values() if seat.gone_since_s is not None]
        return min((since + self._return_s for since in gone if since + self._return_s > now_s), default=math.inf)

    def _takes_part(self, seat: _Seat, now_s: float) -> bool:
        return seat.gone_since_s is None or now_s < seat.gone_since_s + self._return_s

    def present(self) -> list[int]:
        """Shards that a live client holds."""
        return [shard for shard, seat in sorted(self._seats.items()) if seat.present]

    def missing(self) -> list[int]:
        """Shards that no live client holds."""
        return [s for s in range(self._shards) if s not in self._seats or not self._seats[s].present]

    def absent(self, without: Collection[int], enough: int) -> list[int]:
        """Shards, but for those `without`, that no live client holds; none where `enough` (0: all) are there."""
        missing = [shard for shard in self.missing() if shard not in without]
        most = self._shards - len(without)
        return missing if most - len(missing) < (enough or most) else []

    def label(self, shard: int) -> str:
        """Who holds a shard, in short."""
        seat = self._seats.get(shard)
        if seat is None:
            return f"shard {shard} (no client yet)"
        says_it = re.fullmatch(rf".*[^0-9]-{shard}", seat.name)  # client-1-4 has the shards 1 to 4
        return seat.name if says_it else f"{seat.name} (shard {shard})"

    def client_of(self, shard: int) -> str:
        """The name of who holds a shard, or held it last; empty where nobody ever has."""
        seat = self._seats.get(shard)
        return "" if seat is None else seat.name

    def node_of(self, shard: int) -> NodeId | None:
        """Who holds a shard, or held it last."""
        seat = self._seats.get(shard)
        return None if seat is None else seat.node

    def name(self, shard: int) -> str:
        """Who holds a shard, and whether it is there."""
        gone = shard in self._seats and not self._seats[shard].present
        return f"{self.label(shard)}, which is gone" if gone else self.label(shard)

    def names(self, shards: Sequence[int]) -> str:
        """The same of several, or of the first ones of many."""
        names = ", ".join(self.name(shard) for shard in shards[:8])
        return f"{names} and others" if len(shards) > 8 else names

    def without(self) -> tuple[str, ...]:
        """Whose clients are missing, in short, for a report."""
        return tuple(self.label(shard) for shard in self.missing()[:MOST_NAMED])

    def samples(self, shards: Sequence[int] | None = None) -> Mapping[int, int]:
        """Training samples by shard, of these shards (None: of all that ever joined)."""
        chosen = sorted(self._seats) if shards is None else shards
        return {shard: self._seats[shard].info.train_samples for shard in chosen}

    def train_samples(self, shard: int) -> int | None:
        """How many there are, as whoever holds the shard said; None where nobody ever has."""
        seat = self._seats.get(shard)
        return None if seat is None else seat.info.train_samples

    def tested(self) -> frozenset[int]:
        """Shards with held-out samples whose client is there."""
        return frozenset(shard for shard, seat in self._seats.items() if seat.info.test_samples and seat.present)

    def untested(self, tested: Collection[int]) -> tuple[str, ...]:
        """Whose held-out samples are not among those of the shards `tested`, as far as anybody has any."""
        seats = self._seats
        there = (shard for shard in range(self._shards) if shard not in seats or seats[shard].info.test_samples)
        return tuple(self.label(shard) for shard in there if shard not in tested)[:MOST_NAMED]

    def test_samples(self, shard: int) -> int:
        """How many held-out samples there are, as whoever holds the shard said."""
        seat = self._seats.get(shard)
        return 0 if seat is None else seat.info.test_samples

    def classes(self, shards: Sequence[int] | None = None) -> tuple[int, ...]:
        """Training samples of each class at these shards (None: at all that ever joined), as far as they were told."""
        chosen = self._seats if shards is None else shards
        return tuple(map(sum, zip_longest(*(self._seats[shard].info.classes for shard in chosen), fillvalue=0)))


class Attendance:
    """Who takes part from window to window."""

    def __init__(self) -> None:
        self._there: frozenset[int] = frozenset()
        self._without: frozenset[int] = frozenset()
        """Who took part before and is not there now."""

    def now(self, there: Sequence[int], label: Callable[[int], str]) -> list[tuple[str, str]]:
        """What is to be noted, and how gravely, when the run goes on without somebody, or with somebody again."""
        gone, back = self._there - set(there), set(there) & self._without
        self._without = (self._without | gone) - back
        self._there = frozenset(there)
        notes: list[tuple[str, str]] = []
        for shards, what in ((gone, "goes on without {}, until they are back"), (back, "goes on with {} again")):
            if shards:
                names = ", ".join(label(shard) for shard in sorted(shards)[:8])
                more = f" and {len(shards) - 8} others" * (len(shards) > 8)
                notes.append((f"the run {what.format(names + more)}", "warning" if shards is gone else "info"))
        return notes
