"""Carries out what the peer table decides: dials, handshakes, listens, lets go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Literal, Protocol

import zmq

from zsfl.discovery.announced import job_hash
from zsfl.discovery.events import (
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
from zsfl.discovery.expected import ExpectedKeys
from zsfl.discovery.facts import objection
from zsfl.discovery.mdns import Mdns
from zsfl.discovery.sources import sources
from zsfl.discovery.table import MAX_DIALS, MAX_PEERS, PeerTable, PresenceTiming, wants_of
from zsfl.errors import (
    Busy,
    ConfigError,
    DeadlineExceeded,
    NoPeer,
    Rejected,
    RemoteProtocolError,
    Unauthorised,
    Unavailable,
    ZsflError,
    lacks_descriptors,
)
from zsfl.ids import PROTOCOL, Address, NodeCard, NodeId, Role
from zsfl.settings import NodeSettings
from zsfl.wire.calling import CallBack
from zsfl.wire.connection import Connection
from zsfl.wire.door import Door
from zsfl.wire.fields import MAX_PEERS_EXCHANGED, PeerHint
from zsfl.wire.greeting import mechanism_at
from zsfl.wire.messages import Beat, Broadcast, Goodbye, Hello, Welcome
from zsfl.wire.pubsub import Subscriber
from zsfl.wire.sockets import room_for_peers

HELLO_S = 2.0
"""Deadline of a handshake."""
MAX_NOTED = 256
"""Reasons told why somebody is no peer: what a node is called, and what its job is, is for it to say."""
MOST_OTHERS = 3
"""Nodes that are none of ours of which is told at once."""
GREETING_S = 0.5
"""What somebody who did not answer a HELLO may take to say whether it uses keys."""
HINTED_FIRST_S = 0.25
"""How long somebody may take to answer to the key that it is said to have, before others are tried as well."""

Start = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class PeerUser(Protocol):
    """Who is told of peers."""

    def connect(self, card: NodeCard, port: int) -> Connection:
        """A connection to a node."""
        ...

    def ear(self, card: NodeCard, heard: Callable[[Broadcast], None]) -> Subscriber:
        """A subscription to what a peer says."""
        ...

    def peer_joined(self, card: NodeCard, codecs: tuple[str, ...]) -> None:
        """A peer is there."""
        ...

    def peer_lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        ...

    def peer_said(self, broadcast: Broadcast) -> None:
        """A verified peer said something."""
        ...

    def called(self, card: NodeCard, said: CallBack) -> None:
        """A peer waits for a node, or does not hear it."""
        ...

    def note(self, message: str, level: str = "info") -> None:
        """One line in the log."""
        ...


class Peers:
    """The live peers of one node."""

    def __init__(
        self,
        user: PeerUser,
        card: NodeCard,
        settings: NodeSettings,
        facts: Mapping[str, str],
        codecs: tuple[str, ...],
        start: Start,
        door: Door | None = None,
    ) -> None:
        self._door = door or Door(card.name)
        self._keys = ExpectedKeys()
        self._user = user
        self._card = card
        self._settings = settings
        self._facts = dict(facts)
        self._codecs = codecs
        self._start = start
        self._said_codecs: dict[NodeId, tuple[str, ...]] = {}
        self._refusers: set[Address] = set()
        """Those of the addresses we were given that will not have us: an end of it only where all of them will not."""
        self._ears: dict[NodeId, asyncio.Task[None]] = {}
        self._greeting: set[Address] = set()
        self._distrusted: dict[NodeId, NodeCard] = {}
        """Peers that were let go of for their keys; they are looked for should these be trusted again."""
        self._mdns: Mdns | None = None
        self._changed = asyncio.Event()
        beat_s, lost_after_s = settings.beat_s, settings.lost_after_s
        timing = PresenceTiming(beat_s=beat_s, lag_s=(beat_s + lost_after_s) / 2, lost_after_s=lost_after_s)
        self.table = PeerTable(card, wants_of(card.role, behind_nat=card.behind_nat), timing, room_for_peers(MAX_PEERS))
        self._noted: set[str] = set()
        """What was said of who is no peer."""

    def by_role(self, role: Role) -> list[NodeCard]:
        """Live peers of one role, by name."""
        return sorted(self.table.by_role(role), key=lambda card: card.name)

    def hints(self) -> tuple[PeerHint, ...]:
        """Live peers, for peer exchange: those that serve first."""
        cards = [card for card in self.table.to_tell(MAX_PEERS) if not card.behind_nat][:MAX_PEERS_EXCHANGED]
        return tuple(PeerHint(id=card.id, role=card.role, address=card.address, key=card.key) for card in cards)

    def advice(self) -> tuple[str, ...]:
        """What to check when nobody comes."""
        advice = [f"{address} was refused: {reason}" for address, reason in self.table.refusals().items()]
        if self._mdns is not None:
            others = list(self._mdns.others.values())
            advice += others[-MOST_OTHERS:]
            if len(others) > MOST_OTHERS:
                advice.append(f"mDNS saw {len(others) - MOST_OTHERS} more such nodes; some may have left meanwhile")
            if self._mdns.ignored:
                advice.append(f"{self._mdns.ignored} announcements by mDNS made no sense, or were too many at once")
        advice.append("`zsfl doctor`, with the flags of this node, finds out more")
        advice.append("is every node started with the same job file, and on the same network?")
        is_local = self._settings.host.startswith("127.") and not self._settings.behind_nat
        if self._settings.mdns and not is_local:
            advice.append("Wi-Fi, VPNs and containers often block multicast: try --peer HOST:PORT of any one node")
        elif not self._settings.mdns:
            advice.append("mDNS is off: do --peer, --dns or --meet lead to nodes that run? Their first line says where")
        if is_local:
            advice.append(f"this node serves this machine only ({self._settings.host}); for a LAN give --host ADDRESS")
        return tuple(advice)

    # --- driving the table ------------------------------------------------------------------------------

    async def watch_presence(self) -> None:
        """Give the table its ticks."""
        for address in self._settings.peers:
            self._on(Candidate(Address(address), "seed"))
        while True:
            deadline_s = self.table.next_deadline()
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - time.monotonic())):
                    await self._changed.wait()
                    continue
            self._on(Tick())

    async def discover(self) -> None:
        """Follow whatever the settings name, and mDNS, where it is wanted and works."""
        for name, follow in sources(self._settings, self._card, self._facts, self._trusted_keys):
            self._start(follow(self._found, self._user.note), name)
        if not self._settings.mdns:
            return
        try:
            job = job_hash(self._facts["name"], self._facts.get("cluster", ""))
            async with Mdns(self._card, job, PROTOCOL, self._trusted_keys) as self._mdns:
                async for candidate in self._mdns.events():
                    self._found(candidate)
        except Unavailable as error:
            self._user.note(str(error), "warning")

    def _found(self, candidate: Candidate) -> None:
        there = self.table.at(candidate.address)
        if there is None or candidate.node_id not in (None, there.id):  # they are found again and again
            self._keys.hinted(candidate.address, candidate.key)
            if not self.table.ignores(candidate):
                self._on(candidate)

    def _on(self, event: Event) -> None:
        for action in self.table.on(event, time.monotonic()):
            match action:
                case Dial():
                    self._start(self._dial(action.address), f"dial {action.address}")
                case Joined():
                    self._join(action.card)
                case Lost():
                    self._lose(action.card, action.reason)
        if not isinstance(event, Heard):  # which only ever moves deadlines back
            self._changed.set()

    def _join(self, card: NodeCard) -> None:
        if others := [peer for peer in self.table.peers() if peer.name == card.name and peer.id != card.id]:
            said = f"two nodes are called {card.name}, one at {others[0].address} and one of another machine at"
            self.note_once(f"{said} {card.address}; give one of them another --name")
        if card.pub_port:
            ear = self._user.ear(card, lambda broadcast: self._heard(card.id, broadcast))
            self._ears[card.id] = self._start(ear.run(), f"listen to {card.name}")
        self._user.peer_joined(card, self._said_codecs.get(card.id, ()))

    def _lose(self, card: NodeCard, reason: str) -> None:
        if ear := self._ears.pop(card.id, None):
            ear.cancel()
        self._said_codecs.pop(card.id, None)
        self._user.peer_lost(card, reason)

    def _heard(self, node_id: NodeId, broadcast: Broadcast) -> None:
        match broadcast:
            case Goodbye():
                self._on(Left(node_id=node_id, reason=broadcast.reason))
                return
            case Beat():
                known = self.table.get(node_id)
                if known is None:  # lost a moment ago
                    return
                if broadcast.card != known:
                    raise RemoteProtocolError(f"{node_id} sends heartbeats of another node, or of other sockets")
                self._on(Heard(node_id=node_id))
                self._exchange(broadcast.peers)
            case CallBack():
                if known := self.table.get(node_id):
                    self._user.called(known, broadcast)
                return
            case _:
                self._on(Heard(node_id=node_id))
        self._user.peer_said(broadcast)

    def _exchange(self, hints: tuple[PeerHint, ...]) -> None:
        trusted = set(self._trusted_keys())
        for hint in hints:
            if self.table.get(hint.id) is None and hint.key in trusted:
                self._found(Candidate(hint.address, "exchange", hint.role, hint.id, hint.key))

    def greet(self, card: NodeCard) -> None:
        """Say HELLO again to a peer that does not hear this node any more, and cannot dial it."""
        if (at := card.address) not in self._greeting and len(self._greeting) < MAX_DIALS:  # it is asked for again
            self._greeting.add(at)
            self._start(self._dial(at), f"greet {at}").add_done_callback(lambda _: self._greeting.discard(at))

    # --- handshake --------------------------------------------------------------------------------------

    async def _dial(self, address: Address) -> None:
        try:
            welcome, key = await self._greet(address)
            if welcome.card.key != key:
                raise Unauthorised(f"{welcome.card.name} says that it has another key than it has")
            self._door.guard.introduce(welcome.card)
        except zmq.ZMQError:  # no such address, or no socket left
            self._on(DialFailed(address=address))
        except (Busy, DeadlineExceeded, NoPeer) as error:
            if not lacks_descriptors(error) and (why := await self._why_silent(address)):
                self._refused(address, why, final=False)
            else:
                self._on(DialFailed(address=address))
        except ZsflError as error:
            # Who does not understand a HELLO is no control socket, but may have taken the port of one that is gone; and
            # who is not trusted now may be in a moment.
            may_change = isinstance(error, Unavailable | RemoteProtocolError | Unauthorised)
            self._refused(address, str(error), final=not may_change)
        else:
            self._keys.answered(address, key)
            self._welcomed(welcome.card, address, welcome.codecs, "me")
            self._exchange(welcome.peers)

    async def _greet(self, address: Address) -> tuple[Welcome, str]:
        """What a node answers to HELLO, and by which key; of several that may be its, only its own gets an answer."""
        expected, others = self._keys.next_of(address, self._trusted_keys())
        asking = [asyncio.ensure_future(self._ask(address, key)) for key in expected]
        later_s = HINTED_FIRST_S if expected else 0.0
        asking += [asyncio.ensure_future(self._ask(address, key, later_s)) for key in others]
        silence: ZsflError | zmq.ZMQError = NoPeer(f"no key is trusted that {address} could have")
        try:
            for answering in asyncio.as_completed(asking):
                try:
                    return await answering
                except (Busy, DeadlineExceeded, NoPeer, zmq.ZMQError) as error:
                    silence = error
        finally:
            for one in asking:
                one.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        raise silence

    async def _ask(self, address: Address, key: str, later_s: float = 0.0) -> tuple[Welcome, str]:
        await asyncio.sleep(later_s)
        host, _, port = address.rpartition(":")
        somebody = NodeCard(
            id=NodeId(""),
            name=f"the node at {address}",
            role=Role.OBSERVER,
            host=host,
            control_port=int(port),
            key=key,
        )
        hello = Hello(protocol=PROTOCOL, facts=self._facts, card=self._card, codecs=self._codecs)
        connection = self._user.connect(somebody, somebody.control_port)
        try:
            return (await connection.request(hello, deadline_s=HELLO_S)).expect(Welcome), key
        finally:
            connection.close()

    # --- keys -------------------------------------------------------------------------------------------

    def _trusted_keys(self) -> tuple[str, ...]:
        return ("",) if self._door.trust is None else tuple(self._door.trust.known)

    async def _why_silent(self, address: Address) -> str:
        """Why somebody who listens there does not answer, if that is a matter of keys."""
        try:
            mechanism = await mechanism_at(address, GREETING_S)
        except (TimeoutError, NoPeer):
            return ""
        match mechanism, self._door.locked:
            case "NULL", True:
                return "that node uses no keys, and this one does: start it with --keys, or --host and a LAN address"
            case "CURVE", False:
                return "that node uses keys, and this one does not: start this with --keys, or --host and a LAN address"
            case "CURVE", True:
                return "no machine that this one trusts answers there: pair the two with `zsfl invite` on one of them"
            case _:
                return ""

    def trust_changed(self) -> None:
        """Let go of whom this machine does not trust any more, and look for whom it does now."""
        if (trust := self._door.trust) is not None:
            for card in self.table.peers():
                if card.role not in trust.roles_of(card.key):
                    self._on(Left(node_id=card.id, reason="its key is not trusted any more, or not for what it is"))
                    if not card.behind_nat:  # it says HELLO by itself; its address may be anybody's here
                        self._distrusted[card.id] = card
            for card in [one for one in self._distrusted.values() if one.role in trust.roles_of(one.key)]:
                # It may not have noticed, and not say HELLO again.
                del self._distrusted[card.id]
                self._keys.hinted(card.address, card.key)
                self._on(Candidate(card.address, "exchange", None, card.id))
            while len(self._distrusted) > MAX_PEERS:
                self._distrusted.pop(next(iter(self._distrusted)))
        for address in self._settings.peers:
            self._on(Candidate(Address(address), "seed"))
        if self._mdns is not None:
            self._mdns.look_again()

    def _refused(self, address: Address, reason: str, *, final: bool) -> None:
        if final and address in self._settings.peers:
            self._refusers.add(address)
            if self._refusers.issuperset(self._settings.peers):
                raise ConfigError(f"{reason}. Start both with the same job file, or correct --peer {address}")
        if self.table.refusals().get(address) != reason:
            self.note_once(f"{address} refused: {reason}")
        self._on(Refused(address=address, reason=reason, final=final))

    def note_once(self, message: str) -> None:
        """Say it, unless it was said; of a flood only the first."""
        if message not in self._noted and len(self._noted) < MAX_NOTED:
            self._noted.add(message)
            self._user.note(message, "warning")

    def _welcomed(self, card: NodeCard, address: Address, codecs: tuple[str, ...], by: Literal["me", "them"]) -> None:
        self._said_codecs[card.id] = codecs
        self._on(Welcomed(card=card, address=address, by=by))
        if self.table.get(card.id) is None:  # it has no room for it
            self._said_codecs.pop(card.id, None)

    def answer(self, hello: Hello) -> Welcome:
        """Answer somebody's HELLO; Rejected when we are not of one job, Unavailable when a later try may do."""
        if why_not := objection(self._card, self._facts, hello.card, hello.facts, hello.protocol):
            self.note_once(f"{hello.card.address} was turned away: {why_not}")
            raise Rejected(why_not)
        hints = self.hints()
        self._welcomed(hello.card, hello.card.address, hello.codecs, "them")
        if hello.card.id != self._card.id and self.table.get(hello.card.id) is None:
            why = self.table.refusals().get(hello.card.address, "it has no room for another peer")
            raise Unavailable(f"{self._card.name} does not take {hello.card.name} as a peer: {why}")
        return Welcome(card=self._card, codecs=self._codecs, peers=hints)
