"""Who is a peer: candidates are dialled, a HELLO makes a peer of them, heartbeats keep them one.

Decisions only: no sockets, no clock. Whoever drives the table carries out the actions, answers every `Dial`,
and calls `on(Tick(), now_s)` no later than `next_deadline()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

from zsfl.discovery.events import (
    Action,
    Candidate,
    Dial,
    DialFailed,
    Event,
    Heard,
    Joined,
    Left,
    Lost,
    Refused,
    Tick,
    Welcomed,
)
from zsfl.errors import ConfigError
from zsfl.ids import Address, NodeCard, NodeId, Role

MAX_PEERS = 1024
"""Peers at once; a further one is refused for the time being."""
UNHEARD_SHARE = 0.5
"""Where there is no room for another, no more of the peers than this may be of those that said HELLO by themselves and
were heard by no heartbeat so far: the oldest of them makes room. A card may lead nowhere."""
MAX_CANDIDATES = 1024
"""Addresses on trial at once; a further one pushes out the oldest that is no seed, former peers last."""
MAX_DIALS = 64
"""HELLOs under way at once, so that a flood of hints does not become a flood of connections."""
DIAL_TRIES = 6
"""Failures after which an address that is neither a seed nor a former peer's is forgotten until somebody hints at it
again."""
RETURN_TRIES = 240
"""The same for a former peer's, which may have been asleep or cut off: about an hour."""

UNHEARD = "it said HELLO, and is not heard at its address; behind NAT, or a firewall, it needs --behind-nat"
"""Why a peer is lost that can dial this node and not be dialled."""

_WANTED: dict[Role, frozenset[Role]] = {
    Role.CLIENT: frozenset({Role.SPLIT_SERVER, Role.AGGREGATOR}),
    Role.SPLIT_SERVER: frozenset({Role.AGGREGATOR}),
    Role.AGGREGATOR: frozenset(Role),
    # Split servers too: where no aggregator is left to ask, they alone know all the clients.
    Role.STANDBY: frozenset({Role.AGGREGATOR, Role.SPLIT_SERVER, Role.CLIENT}),
    Role.OBSERVER: frozenset(Role),
    Role.OPERATOR: frozenset(),
}
_EXCHANGE_ORDER = (Role.AGGREGATOR, Role.SPLIT_SERVER, Role.STANDBY, Role.OBSERVER, Role.CLIENT, Role.OPERATOR)


def wants_of(role: Role, *, behind_nat: bool = False) -> Callable[[Role], bool]:
    """Which roles a node of this role dials by itself; the others dial it, unless they cannot."""
    wanted = _WANTED[role]
    if behind_nat:
        wanted |= {other for other, theirs in _WANTED.items() if role in theirs}
    return wanted.__contains__


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceTiming:
    """When peers beat, how long silence may last, and how soon an address is tried again; all in seconds."""

    beat_s: float = 0.5
    lost_after_s: float = 2.0
    lag_s: float = 1.0
    """A longer gap between two events means that this node itself was stuck: nobody is accused for it."""
    redial_s: float = 0.25
    """Before the second try; doubles with every failure."""
    redial_max_s: float = 2.0
    return_max_s: float = 15.0
    """The longest pause before the address of a former peer, which failed `DIAL_TRIES` times, is tried again."""

    def __post_init__(self) -> None:
        if not 0 < self.beat_s < self.lag_s < self.lost_after_s:
            raise ConfigError(
                f"presence needs 0 < beat_s < lag_s < lost_after_s, not {self.beat_s}, {self.lag_s}, "
                f"{self.lost_after_s}: correct the settings"
            )
        if not 0 < self.redial_s <= self.redial_max_s <= self.return_max_s:
            raise ConfigError(
                f"presence needs 0 < redial_s <= redial_max_s <= return_max_s, not {self.redial_s}, "
                f"{self.redial_max_s}, {self.return_max_s}: correct the settings"
            )


@dataclass(slots=True)
class _Peer:
    card: NodeCard
    heard_s: float
    proven: bool
    """Whether it answers at its address, or was heard: not if all that is known of it is a HELLO."""
    addresses: set[Address] = field(default_factory=set[Address])


@dataclass(slots=True)
class _Candidate:
    node_id: NodeId | None
    due_s: float | None
    """When to dial next; None when only a new hint makes it worth a try (if `final`, one of another node)."""
    verified: bool
    failures: int = 0
    refusal: str | None = None
    final: bool = False


class PeerTable:
    """The peers of one node; `wants` says which roles it dials, `now_s` is monotonic."""

    def __init__(
        self, me: NodeCard, wants: Callable[[Role], bool], timing: PresenceTiming, most: int | None = None
    ) -> None:
        """`most`: how many peers there may be at once; None: MAX_PEERS."""
        self._me = me
        self._most = most
        self._wants = wants
        self._timing = timing
        self._peers: dict[NodeId, _Peer] = {}
        self._at: dict[Address, NodeId] = {}
        self._candidates: dict[Address, _Candidate] = {}
        self._seeds: set[Address] = set()
        self._dialling: set[Address] = set()
        self._last_s: float | None = None
        self._was_absent = False
        """Whether this node was stuck for so long that its peers have given it up, while it still has them."""

    def on(self, event: Event, now_s: float) -> list[Action]:
        """Take in one event; what to do now, in order. Heard costs O(1) and never asks for anything."""
        self._forgive_own_lag(now_s)
        actions: list[Action] = []
        match event:
            case Heard(node_id):
                if peer := self._peers.get(node_id):
                    peer.heard_s, peer.proven = now_s, True
                return actions
            case Candidate():
                self._hint(event, now_s)
            case Welcomed():
                actions += self._welcome(event, now_s)
            case Refused(address, reason, final):
                self._dialling.discard(address)
                self._refuse(address, reason, final, now_s)
            case DialFailed(address):
                self._dialling.discard(address)
                self._fail(address, now_s)
            case Left(node_id, reason):
                if node_id in self._peers:
                    actions.append(self._lose(node_id, f"left: {reason}", now_s, redial=False))
            case Tick():
                pass
            case _:
                assert_never(event)
        return [*actions, *self._lose_silent(now_s), *self._greet_again(), *self._dial_due(now_s)]

    def next_deadline(self) -> float | None:
        """When `on` must be called at the latest; None when nothing is pending.

        Never more than a beat away while there are peers: a longer gap has to mean that this node lagged.
        """
        deadlines: list[float] = []
        if self._peers and self._last_s is not None:
            deadlines.append(self._last_s + self._timing.beat_s)
            deadlines.append(min(p.heard_s for p in self._peers.values()) + self._timing.lost_after_s)
        if len(self._dialling) < MAX_DIALS:
            deadlines += [
                c.due_s
                for address, c in self._candidates.items()
                if c.due_s is not None and address not in self._dialling
            ]
        return min(deadlines, default=None)

    def peers(self) -> tuple[NodeCard, ...]:
        """Every live peer, in order of joining."""
        return tuple(peer.card for peer in self._peers.values())

    def by_role(self, role: Role) -> tuple[NodeCard, ...]:
        """Every live peer of one role, in order of joining."""
        return tuple(peer.card for peer in self._peers.values() if peer.card.role is role)

    def get(self, node_id: NodeId) -> NodeCard | None:
        """The card of a live peer."""
        peer = self._peers.get(node_id)
        return peer.card if peer else None

    def at(self, address: Address) -> NodeCard | None:
        """The card of the live peer that answers at an address."""
        node_id = self._at.get(address)
        return None if node_id is None else self.get(node_id)

    def to_tell(self, count: int) -> tuple[NodeCard, ...]:
        """At most `count` live peers to tell another node of: those that serve first."""
        return tuple(sorted(self.peers(), key=lambda card: _EXCHANGE_ORDER.index(card.role))[:count])

    def silences(self, now_s: float) -> dict[NodeId, float]:
        """For how many seconds each live peer has not been heard."""
        return {node_id: max(0.0, now_s - peer.heard_s) for node_id, peer in self._peers.items()}

    def refusals(self) -> dict[Address, str]:
        """Why addresses did not become peers, for people."""
        return {address: c.refusal for address, c in self._candidates.items() if c.refusal is not None}

    def _forgive_own_lag(self, now_s: float) -> None:
        if self._last_s is not None and now_s - self._last_s > self._timing.lag_s:
            for peer in self._peers.values():
                peer.heard_s = now_s
            self._was_absent |= now_s - self._last_s > self._timing.lost_after_s
        self._last_s = now_s

    def ignores(self, hint: Candidate) -> bool:
        """Whether this hint changes nothing: heartbeats repeat those of whole crowds that dial by themselves."""
        if hint.address == self._me.address or hint.node_id == self._me.id:
            return True
        is_other = hint.role is not None and not self._wants(hint.role)
        return hint.source != "seed" and (hint.node_id in self._peers or is_other)

    def _hint(self, hint: Candidate, now_s: float) -> None:
        if self.ignores(hint):
            return
        if hint.source == "seed" and len(self._seeds) < MAX_CANDIDATES:
            self._seeds.add(hint.address)
        live = self._at.get(hint.address)
        if live is not None and hint.node_id in (None, live):
            return
        known = self._candidates.get(hint.address)
        if known is None:
            self._add(hint.address, hint.node_id, now_s)
        elif hint.node_id not in (None, known.node_id):
            # Somebody else lives there now: what is known of the address no longer counts.
            known.node_id, known.due_s, known.failures = hint.node_id, now_s, 0
            known.refusal, known.final = None, False
        elif known.due_s is None and not known.final:
            known.due_s, known.failures = now_s, 0

    def _welcome(self, event: Welcomed, now_s: float) -> list[Action]:
        card = event.card
        # Behind NAT addresses are those of another network, and may be anybody's in this one.
        reached = set[Address]() if card.behind_nat else {card.address}
        proven = event.address if event.by == "me" else None
        if proven is not None:
            self._dialling.discard(proven)
            reached.add(proven)
        known = self._peers.get(card.id)
        if known is not None and known.card == card:
            known.heard_s, known.proven = now_s, known.proven or proven is not None
            self._settle(known, reached, proven)
            return []
        replaced = self._replaced_by(card, reached, proven)
        if (objection := self._objection(card, replaced)) is not None:
            self._refuse(event.address, *objection, now_s)
            return []
        actions: list[Action] = []
        for node_id in replaced:
            is_mine = self._peers[node_id].card.key == card.key
            what = "restarted as" if is_mine else "is not where it says, but"
            reason = f"{what} node {card.id} at {card.address}"
            actions.append(self._lose(node_id, reason, now_s, redial=False))
        if not replaced:
            said = "it said HELLO, was not heard since, and others came"
            actions += [self._lose(node_id, said, now_s, redial=True) for node_id in self._pushed_out()]
        peer = self._peers[card.id] = _Peer(card, now_s, proven=proven is not None)
        self._settle(peer, reached, proven)
        return [*actions, Joined(card)]

    def _pushed_out(self) -> list[NodeId]:
        """Who makes room for another peer, if there is none."""
        most = self._most or MAX_PEERS
        unheard = [node_id for node_id, peer in self._peers.items() if not peer.proven]
        return unheard[:1] if len(self._peers) >= most and len(unheard) > UNHEARD_SHARE * most else []

    def _replaced_by(self, card: NodeCard, reached: set[Address], proven: Address | None) -> list[NodeId]:
        """Whose place a node takes: its own, and of those who were where it is now its machine's, or all where it
        answered. Who only says where it is pushes out no other machine's node, and is kept out by none.
        """
        return [
            node_id
            for node_id, peer in self._peers.items()
            if node_id == card.id
            or proven in peer.addresses
            or (peer.card.key == card.key and not peer.addresses.isdisjoint(reached))
        ]

    def _objection(self, card: NodeCard, replaced: list[NodeId]) -> tuple[str, bool] | None:
        """Why a node that agrees is no peer all the same, and whether that is final."""
        if card.id == self._me.id:
            return "that is this node itself: give the address of another node", True
        if card.address == self._me.address and not card.behind_nat:
            return f"{card.name} claims this node's own address: start it with another --host or port", True
        for node_id, peer in self._peers.items():
            # A restarted node comes in once its predecessor is lost; taking it at once would let two live ones
            # of one name push each other out for ever. A machine has no say in how the nodes of another are called.
            if (peer.card.name, peer.card.key) == (card.name, card.key) and node_id not in replaced:
                where = f"there is a node {card.name} at {peer.card.address} already"
                return f"{where}: give this one another --name, or wait until that one is gone", False
        most = self._most or MAX_PEERS
        if not replaced and len(self._peers) >= most and not self._pushed_out():
            bound = "MAX_PEERS" if most >= MAX_PEERS else "it may have no more files open: raise `ulimit -Hn` there"
            return f"this node has {most} peers already ({bound})", False
        return None

    def _settle(self, peer: _Peer, reached: set[Address], proven: Address | None) -> None:
        """Remember where a live peer is, so that its addresses are not dialled; where it only says so, and may be
        another than who is there, they are.
        """
        for address in reached:
            if address == proven or not peer.card.key:
                self._candidates.pop(address, None)
            elif candidate := self._candidates.get(address):
                candidate.refusal = None
                if candidate.due_s is None:
                    del self._candidates[address]
            before = self._at.get(address, peer.card.id)
            if address != proven and before != peer.card.id:
                continue
            if address == peer.card.address or address in self._seeds:
                if before != peer.card.id and before in self._peers:
                    self._peers[before].addresses.discard(address)
                self._at[address] = peer.card.id
                peer.addresses.add(address)

    def _refuse(self, address: Address, reason: str, final: bool, now_s: float) -> None:
        if address not in self._candidates:
            self._add(address, None, now_s)
        if (candidate := self._candidates.get(address)) is None:
            return
        candidate.refusal = reason
        if final:
            candidate.due_s, candidate.final = None, True
        else:
            self._fail(address, now_s)

    def _fail(self, address: Address, now_s: float) -> None:
        candidate = self._candidates.get(address)
        if candidate is None or candidate.final:
            return
        candidate.failures += 1
        tries = RETURN_TRIES if candidate.verified else DIAL_TRIES
        if candidate.failures < tries or address in self._seeds:
            is_patient = candidate.failures >= DIAL_TRIES and address not in self._seeds
            longest_s = self._timing.return_max_s if is_patient else self._timing.redial_max_s
            doublings = min(candidate.failures - 1, DIAL_TRIES)
            candidate.due_s = now_s + min(self._timing.redial_s * 2**doublings, longest_s)
        elif candidate.refusal is not None:
            candidate.due_s = None
        else:
            del self._candidates[address]

    def _add(self, address: Address, node_id: NodeId | None, due_s: float, *, verified: bool = False) -> None:
        if len(self._candidates) >= MAX_CANDIDATES:
            others = [address for address in self._candidates if address not in self._seeds]
            if not others:
                return
            del self._candidates[min(others, key=lambda address: self._candidates[address].verified)]
        self._candidates[address] = _Candidate(node_id, due_s, verified)

    def _lose(self, node_id: NodeId, reason: str, now_s: float, *, redial: bool) -> Lost:
        peer = self._peers.pop(node_id)
        for address in peer.addresses:
            del self._at[address]
            if (redial or address in self._seeds) and address not in self._candidates:
                self._add(address, node_id, now_s + self._timing.redial_s, verified=peer.proven)
        return Lost(peer.card, reason)

    def _lose_silent(self, now_s: float) -> list[Action]:
        limit_s = self._timing.lost_after_s
        silent = [node_id for node_id, peer in self._peers.items() if peer.heard_s + limit_s <= now_s]
        said = f"silent for {limit_s:g} s"
        known = {one for one in silent if self._peers[one].proven or self._peers[one].card.behind_nat}
        return [self._lose(one, said if one in known else UNHEARD, now_s, redial=True) for one in silent]

    def _greet_again(self) -> list[Action]:
        """HELLO to everybody after an absence: those who gave this node up do not listen to it any more."""
        if not self._was_absent:
            return []
        self._was_absent = False
        cards = [peer.card for peer in self._peers.values() if not peer.card.behind_nat]
        addresses = [card.address for card in cards if card.address not in self._dialling]
        greeted = addresses[: MAX_DIALS - len(self._dialling)]
        self._dialling.update(greeted)
        return [Dial(address) for address in greeted]

    def _dial_due(self, now_s: float) -> list[Action]:
        room = MAX_DIALS - len(self._dialling)
        due = [
            address
            for address, c in self._candidates.items()
            if c.due_s is not None and c.due_s <= now_s and address not in self._dialling
        ][:room]
        self._dialling.update(due)
        return [Dial(address) for address in due]
