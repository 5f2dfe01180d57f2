"""What every role shares, where the role lives: in the lane, with sockets of its own, peers, waiting aloud.

The same node's face to its peers, its heartbeat and its discovery are a `Front`, in the main loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import zmq.asyncio

from zsfl.errors import RemoteProtocolError, SpillTooLarge, StorageError
from zsfl.hints import how_to_start, where_it_was
from zsfl.ids import Cid, NodeCard, NodeId, Role
from zsfl.keys.nodes import is_of
from zsfl.lifetime import Lifetime
from zsfl.metrics import Counters, added
from zsfl.reports import AnyReport, Note
from zsfl.settings import NodeSettings, WireLimits
from zsfl.waits import LOOK_S, Overdue, Waits, lacking, stored
from zsfl.wire.calling import Switchboard
from zsfl.wire.connection import Connection, Dialer
from zsfl.wire.door import Door
from zsfl.wire.fields import MAX_CARRIED_BYTES, MAX_OFFERS, Load
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Announcement, Broadcast, Committed, Offers, Reply, Request, RunState, SpillOffer
from zsfl.wire.permits import hearers
from zsfl.wire.pubsub import Heard, Publisher, Subscriber, in_pieces
from zsfl.wire.server import Handler, Permit, Server
from zsfl.wire.sockets import up_to

_Result = TypeVar("_Result")
STATE_TOPIC = b"state"
"""What an aggregator asks of its members."""
OFFERS_TOPIC = b"offers"
"""What only aggregators listen to."""
MOST_BYTES = {STATE_TOPIC: 0, OFFERS_TOPIC: MAX_OFFERS * MAX_CARRIED_BYTES}
"""Of the parts of what is said on a topic; of weights as many as a message may have."""
MOST_GONE = 1024
"""Former peers that are remembered."""
FAREWELL_LINGER_S = 0.2
"""What the last broadcast may take to leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatExtras:
    """What a role adds to the node's heartbeat."""

    load: Load | None = None
    offers: tuple[SpillOffer, ...] = ()
    state: RunState | None = None
    merging: tuple[Cid, ...] = ()


class RoleShell(Protocol):
    """What a node needs to know of the role it plays. All of it is called in the lane, `beat` alone is not."""

    hears: frozenset[Role]
    """Whose heartbeats it wants to hear of."""

    @property
    def data_port(self) -> int:
        """Where it answers requests with tensors."""
        ...

    async def run(self) -> None:
        """Play the role; returning ends the node well."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Finish what is in hand and hand over; not a cancellation."""
        ...

    async def control(self, request: Request) -> Reply:
        """Answer a control request that is not a HELLO."""
        ...

    def joined(self, card: NodeCard) -> None:
        """A peer is there."""
        ...

    def lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        ...

    def heard(self, broadcast: Broadcast) -> None:
        """A verified peer said something."""
        ...

    def beat(self) -> BeatExtras:
        """What to add to the next heartbeat; called by the main loop's thread, which the lane may hold up nowhere."""
        ...


class Face(Protocol):
    """What the role's side of a node needs of the other one; all may be called from the lane."""

    counters: Counters

    def say(self, report: AnyReport) -> None:
        """Report something."""
        ...

    def say_wait(self, wait: Overdue) -> None:
        """Report a wait that has become worth a word."""
        ...


class Node:
    """One node of one job, as its role sees it."""

    def __init__(
        self,
        face: Face,
        card: NodeCard,
        *,
        settings: NodeSettings,
        facts: Mapping[str, str],
        context: zmq.asyncio.Context,
        limits: WireLimits,
        door: Door | None = None,
        board: Switchboard | None = None,
    ) -> None:
        """To be made in the lane, where its sockets are used."""
        self.name = card.name
        self.card = card
        """Who this node is; of the ports only those that the front opened."""
        self.settings = settings
        self.facts = facts
        self.limits = limits
        self.counters = Counters()
        self.peer_codecs: dict[NodeId, tuple[str, ...]] = {}
        self._face = face
        self._door = door or Door(card.name)
        self._board = board or Switchboard(settings.host, settings.behind_nat, lambda _: None)
        wired = {"limits": limits, "counters": self.counters, "door": self._door}
        self._dialer = Dialer(context, card.id, board=self._board, **wired)
        self._servers: WeakSet[Server] = WeakSet()
        self._subscribers: WeakSet[Subscriber] = WeakSet()
        self._context = context
        self._peers: dict[NodeId, NodeCard] = {}
        self._gone: dict[NodeId, NodeCard] = {}
        """Who was a peer and is not back; who went last comes last."""
        self._waits = Waits()
        self._links: dict[NodeId, Connection] = {}
        self._closed = self._has_run = False
        self._life = Lifetime()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._role: RoleShell
        self.publisher = Publisher(
            context,
            settings.host,
            **wired,
            note=lambda message: self.note(message, "warning"),
            hearers=hearers(card.role),
        )

    # --- sockets ----------------------------------------------------------------------------------------

    def serve(self, handler: Handler, permit: Permit | None = None) -> Server:
        """A new socket that answers requests, those that the `permit` lets pass; the caller runs it."""
        wired = {"limits": self.limits, "counters": self.counters, "door": self._door}
        server = Server(self._context, self.settings.host, 0, handler, permit=permit, **wired)
        self._servers.add(server)
        return server

    def cut(self) -> None:
        """Let go of those whose keys are trusted no more."""
        if not self._closed:
            self.publisher.cut()
            for server in self._servers:
                server.cut()

    def dial(self, port: int, endpoint: str, *, there: bool) -> None:
        """Have the socket with this port dial a peer that waits for it, or not any more."""
        for one in (self.publisher, *self._servers):
            if one.port == port:
                one.dial(endpoint, there=there)

    def connect(self, card: NodeCard, port: int) -> Connection:
        """A new connection to one of a node's ports; open until the caller, or at the end the node, closes it."""
        return self._dialer.connect(card, port)

    def listen(self, card: NodeCard, topics: Sequence[bytes], heard: Heard) -> Subscriber:
        """A new subscription to what a peer's role publishes; the caller runs it."""
        most = max(MOST_BYTES.get(topic, self.limits.max_message_bytes) for topic in topics)
        subscriber = Subscriber(
            self._context,
            card.endpoint(card.news_port),
            topics,
            heard,
            limits=up_to(self.limits, most),
            counters=self.counters,
            door=self._door,
            key=card.key,
            role=card.role,
            line=self._board.line(card, card.news_port),
        )
        self._subscribers.add(subscriber)
        return subscriber

    def link(self, card: NodeCard) -> Connection:
        """The control connection to a peer, kept until the peer is lost."""
        if card.id not in self._links:
            self._links[card.id] = self.connect(card, card.control_port)
        return self._links[card.id]

    def publish(self, broadcast: Offers | Announcement | Committed, parts: Sequence[Buffer] = ()) -> None:
        """Say something to every aggregator, or as one to every member."""
        match broadcast:
            case Offers():
                self.publisher.publish(OFFERS_TOPIC, broadcast, parts)
            case Announcement():
                for one in in_pieces(broadcast):
                    self.publisher.publish(STATE_TOPIC, one)
            case Committed():
                self.publisher.publish(STATE_TOPIC, broadcast)

    # --- what roles use ---------------------------------------------------------------------------------

    def trusts(self, key: str, role: Role) -> bool:
        """Whether nodes with this key may have that role; where no keys are used all may."""
        trust = self._door.trust
        return trust is None or role in trust.roles_of(key)

    def is_trusted_as(self, node: NodeId, role: Role) -> bool:
        """Whether the id is one of a machine whose nodes may have that role; where no keys are used all may."""
        trust = self._door.trust
        return trust is None or any(role in one.roles and is_of(node, one.key) for one in trust.known.values())

    def peers(self, role: Role) -> list[NodeCard]:
        """Live peers of one role, by name."""
        return sorted((card for card in self._peers.values() if card.role is role), key=lambda card: card.name)

    def peer(self, node_id: NodeId) -> NodeCard | None:
        """A live peer by id."""
        return self._peers.get(node_id)

    def counted(self) -> dict[str, float]:
        """All that this node counts, on either side."""
        counted = added(self._face.counters.snapshot(), self.counters.snapshot())
        return added(counted, self._door.counters.snapshot())

    def report(self, report: AnyReport) -> None:
        """Tell whoever started this node."""
        self._face.say(report)

    def note(self, message: str, level: str = "info") -> None:
        """One line in the log."""
        self.report(Note(node=self.name, message=message, level=level))

    def waiting(
        self, what: str | Callable[[], str], hints: Callable[[], tuple[str, ...]] | None = None
    ) -> AbstractContextManager[None]:
        """While inside, the node says now and then what it waits for, and after a while what to check: the `hints`, or
        where there are none what may be in the way of nodes that look for each other.
        """
        return self._waits.waiting(what, hints)

    def hints_of_gone(self, role: Role, last: NodeId | None = None, shards: Sequence[int] = ()) -> tuple[str, ...]:
        """Where a node of this role was, `last` or who left last, and how to start another; nothing where none was."""
        gone = [card for card in self._gone.values() if card.role is role and last in (None, card.id)]
        if not gone:
            return ()
        one = "one" if role is Role.SPLIT_SERVER else "it again"
        again = how_to_start(role, self.settings, self.card.address, shards, behind_nat=gone[-1].behind_nat)
        return where_it_was(gone[-1], self.card.host), f"start {one} with: {again}"

    async def waits(self) -> list[tuple[str, float]]:
        """What it waits for now, and for how many seconds it has."""
        return self._waits.now()

    async def persistently(self, write: Callable[[], _Result]) -> _Result:
        """Write what a disk may refuse to take, again and again until it does not; its last refusal after `patience_s`.

        A disk that is full, or was remounted read-only, is no reason to lose a run: somebody may see to it meanwhile.
        Nor are connections of strangers that take all file descriptors.
        """

        async def written() -> _Result:
            return write()

        return await self.until_written(written)

    async def until_written(self, write: Callable[[], Awaitable[_Result]]) -> _Result:
        """The same of what waits for others while it writes."""
        try:
            return await stored(write)
        except StorageError as error:
            refusal = error
        ends_s = time.monotonic() + self.settings.patience_s
        then = f"it is tried again for {self.settings.patience_s:g} s in all; after that, go on with --resume"
        with self.waiting(lambda: lacking(refusal), lambda: (then,)):
            while not isinstance(refusal, SpillTooLarge) and time.monotonic() <= ends_s:
                await asyncio.sleep(self.settings.beat_s)
                try:
                    return await stored(write)
                except StorageError as error:
                    refusal = error
        raise refusal

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[None]:
        """Run something for as long as the node lives; its failure ends the node."""
        return self._life.start(work, name)

    # --- life -------------------------------------------------------------------------------------------

    async def run(self, role: RoleShell, running: Callable[[], None]) -> None:
        """Live until the role ends or something fails; `running` is called once peers may be told of."""
        self._role, self._has_run = role, True
        try:
            await self._life.run(self._live(role, running))
        finally:
            self.close()

    async def _live(self, role: RoleShell, running: Callable[[], None]) -> None:
        self.start(self._say_waits(), "waits")
        self.start(self._fail_with(), "fail")
        running()
        await self.start(role.run(), "role")

    def close(self) -> None:
        """Close what is still open, also of what never came to run; what was said last may still leave."""
        self._closed = True
        for opened in (*self._servers, *self._subscribers):
            opened.close()
        self._dialer.close()
        self.publisher.close(FAREWELL_LINGER_S)

    def close_unless_run(self) -> None:
        """Close what a node opened that was cancelled before it came to run; `run` does it otherwise."""
        if not self._has_run:
            self.close()

    async def _fail_with(self) -> None:
        await asyncio.shield(self._failed)

    async def _say_waits(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for wait in self._waits.overdue(time.monotonic()):
                self._face.say_wait(wait)

    # --- what the front tells ---------------------------------------------------------------------------

    def peer_joined(self, card: NodeCard, codecs: tuple[str, ...]) -> None:
        """A peer is there."""
        if self._closed:
            return
        with self._told():
            self._peers[card.id] = card
            self._gone.pop(card.id, None)
            self.peer_codecs[card.id] = codecs
            self._role.joined(card)

    def peer_lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        if self._closed:
            return
        with self._told():
            self._peers.pop(card.id, None)
            self._gone[card.id] = card
            while len(self._gone) > MOST_GONE:
                self._gone.pop(next(iter(self._gone)))
            if link := self._links.pop(card.id, None):
                link.close(f"is gone ({reason})")
            self.peer_codecs.pop(card.id, None)
            self._role.lost(card, reason)

    def peer_said(self, broadcast: Broadcast) -> None:
        """A verified peer said something."""
        if self._closed:
            return
        with self._told():
            self._role.heard(broadcast)

    @contextmanager
    def _told(self) -> Generator[None, None, None]:
        """What a peer says wrong is counted; any other error ends the node, as nobody else would hear of it."""
        try:
            yield
        except RemoteProtocolError:
            self.counters.add("protocol_errors")
        except Exception as error:
            if not self._failed.done():
                self._failed.set_exception(error)
