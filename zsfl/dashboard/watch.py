"""Who is there, and what they do: a pure fold of who joined, who left, and their heartbeats."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from zsfl.dashboard.pace import Pace
from zsfl.ids import NodeCard, NodeId, Role
from zsfl.wire.messages import Beat, RunState

RATE_S = 5.0
"""Rates are of what happened in the last so many seconds."""
MAX_GONE = 256
"""Nodes remembered that are gone; of more the one that has been gone for longest is forgotten."""
MAX_EVENTS = 500
"""Of those that came and went, the newest are kept."""
ORDER = (Role.AGGREGATOR, Role.STANDBY, Role.SPLIT_SERVER, Role.CLIENT, Role.OBSERVER)
"""In which roles are shown."""

Presence = Literal["there", "late", "gone"]
"""late: it has not been heard for two heartbeats, and does not count as gone yet."""


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """One node, as it is shown."""

    id: str
    name: str
    role: str
    address: str
    machine: str = ""
    """The key of its machine; empty where no keys are used."""
    presence: Presence
    heard_s: float
    """Seconds since it was heard last."""
    since_s: float
    """Seconds since it came, or went."""
    reason: str = ""
    """Why it is gone."""
    slots: int | None = None
    """Requests a split server admits at once."""
    busy: int | None = None
    service_s: float | None = None
    """What one request takes to compute, a moving average."""
    held: int = 0
    """Spills that it offers, which no version has counted yet, as far as one heartbeat tells."""
    peers: int = 0
    """Live ones that it knows, as far as one heartbeat tells."""
    counters: dict[str, float]
    """Since it started."""
    rates: dict[str, float]
    """The same in the last seconds, a second."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened."""

    ago_s: float
    node: str
    what: str


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known at one moment."""

    run: dict[str, Any] | None
    """Where the run stands, as its aggregator says, or said last; None while none was there.

    Of `rounds` so many are `done`; at the pace of late it goes on for `left_s` seconds, this round for `round_left_s`.
    """
    nodes: Sequence[Participant]
    events: Sequence[Event]


class _Seen:
    def __init__(self, card: NodeCard, now_s: float) -> None:
        self.card = card
        self.since_s = self.heard_s = now_s
        self.gone_for = ""
        self.beat: Beat | None = None
        self.marks: deque[tuple[float, Mapping[str, float]]] = deque()
        """Counters at heartbeats, those of the last seconds and one from before."""


class Watch:
    """Takes in what an observer sees; `now_s` is monotonic."""

    def __init__(self, beat_s: float) -> None:
        self._beat_s = beat_s
        self._nodes: dict[NodeId, _Seen] = {}
        self._events: deque[tuple[float, str, str]] = deque(maxlen=MAX_EVENTS)
        self._state: RunState | None = None
        self._pace = Pace()

    def joined(self, card: NodeCard, now_s: float) -> None:
        """A node is there."""
        for old in [old for old in self._nodes.values() if old.gone_for and old.card.name == card.name]:
            del self._nodes[old.card.id]  # it was started again
        self._nodes[card.id] = _Seen(card, now_s)
        self._events.append((now_s, card.name, "joined"))

    def lost(self, card: NodeCard, reason: str, now_s: float) -> None:
        """A node is gone."""
        if seen := self._nodes.get(card.id):
            seen.gone_for, seen.since_s = reason or "is gone", now_s
            self._events.append((now_s, card.name, f"is gone: {reason}"))
        gone = [seen for seen in self._nodes.values() if seen.gone_for]
        for seen in sorted(gone, key=lambda seen: seen.since_s)[: max(0, len(gone) - MAX_GONE)]:
            del self._nodes[seen.card.id]

    def said(self, beat: Beat, now_s: float) -> None:
        """A heartbeat."""
        seen = self._nodes.get(beat.card.id)
        if seen is None:
            return
        seen.beat, seen.heard_s = beat, now_s
        seen.marks.append((now_s, beat.counters))
        while len(seen.marks) > 2 and seen.marks[1][0] <= now_s - RATE_S:
            seen.marks.popleft()
        if beat.state is not None and (self._state is None or self._is_newer(beat.state, self._state)):
            self._tell_change(beat.card.name, self._state, beat.state, now_s)
            self._state = beat.state
            if beat.state.phase == "training":
                self._pace.see(_done(beat.state), now_s)

    def told(self, node: str, what: str, now_s: float) -> None:
        """Something that happened to a node, from whoever started it."""
        self._events.append((now_s, node, what))

    @property
    def is_alone(self) -> bool:
        """Whether nobody is there."""
        return all(seen.gone_for for seen in self._nodes.values())

    def _run(self, state: RunState, now_s: float) -> dict[str, Any]:
        shown = ("run", "phase", "version", "round", "rounds", "window", "windows", "epoch", "tested", "reason")
        done = _done(state) if state.phase == "training" else None
        run = {name: getattr(state, name) for name in shown}
        run |= {"done": done, "left_s": None, "round_left_s": None}
        if done is not None:
            run["left_s"] = self._pace.left_s(state.rounds, now_s)
            run["round_left_s"] = self._pace.left_s(state.round + 1, now_s)
        return run

    @staticmethod
    def _is_newer(state: RunState, known: RunState) -> bool:
        """An aggregator that was succeeded says nothing any more."""
        if state.run != known.run:
            return state.epoch >= known.epoch
        return (state.epoch, state.serial) > (known.epoch, known.serial)

    def _tell_change(self, name: str, before: RunState | None, now: RunState, now_s: float) -> None:
        if before is not None and before.run == now.run and before.epoch != now.epoch:
            self._events.append((now_s, name, "took over"))
        if before is None or (before.phase, before.run) != (now.phase, now.run):
            said = f": {now.reason}" if now.reason else ""
            self._events.append((now_s, name, f"run {now.run} is {now.phase}{said}"))

    def snapshot(self, now_s: float) -> Snapshot:
        """What to show."""
        nodes = sorted(
            self._nodes.values(),
            key=lambda seen: (ORDER.index(seen.card.role) if seen.card.role in ORDER else len(ORDER), seen.card.name),
        )
        state = self._state
        return Snapshot(
            run=None if state is None else self._run(state, now_s),
            nodes=[self._shown(seen, now_s) for seen in nodes],
            events=[Event(ago_s=now_s - at_s, node=node, what=what) for at_s, node, what in reversed(self._events)],
        )

    def _shown(self, seen: _Seen, now_s: float) -> Participant:
        beat, card = seen.beat, seen.card
        is_late = now_s - seen.heard_s > 2 * self._beat_s + 0.5
        load = beat.load if beat else None
        return Participant(
            id=card.id,
            name=card.name,
            role=str(card.role),
            address=card.whereabouts,
            machine=card.key,
            presence="gone" if seen.gone_for else "late" if is_late else "there",
            heard_s=now_s - seen.heard_s,
            since_s=now_s - seen.since_s,
            reason=seen.gone_for,
            slots=load.slots if load else None,
            busy=load.busy if load else None,
            service_s=load.service_s if load else None,
            held=len(beat.offers) if beat else 0,
            peers=len(beat.peers) if beat else 0,
            counters=dict(beat.counters) if beat else {},
            rates={} if seen.gone_for else _rates(seen.marks),
        )


def _rates(marks: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    if len(marks) < 2 or marks[-1][0] <= marks[0][0]:
        return {}
    (first_s, first), (last_s, last) = marks[0], marks[-1]
    return {name: (total - first.get(name, 0.0)) / (last_s - first_s) for name, total in last.items()}


def _done(state: RunState) -> float:
    """Rounds done, the present one as a fraction; in async mode, where windows count on for ever, whole ones."""
    return state.round + (state.window / state.windows if state.window < state.windows else 0.0)
