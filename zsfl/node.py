"""What every role shares: identity, sockets, peers, heartbeat, waiting aloud, drain."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import msgspec
import zmq.asyncio

from zsfl.errors import ZsflError
from zsfl.ids import NodeCard, NodeId, Role
from zsfl.metrics import Counters
from zsfl.peers import Peers
from zsfl.reports import AnyReport, Failed, Note, Ready, Waiting
from zsfl.settings import NodeSettings, WireLimits
from zsfl.waits import LOOK_S, Waits
from zsfl.wire.connection import Connection
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import (
    MAX_OFFERS,
    MAX_SETTLED,
    SAID_GOODBYE,
    Announcement,
    Beat,
    Broadcast,
    Goodbye,
    Hello,
    Load,
    Offers,
    Reply,
    Request,
    RunState,
    SpillOffer,
)
from zsfl.wire.pubsub import Heard, Publisher, Subscriber
from zsfl.wire.server import Handler, Server

GOODBYE_LINGER_S = 0.2
"""What the last broadcast may take to leave."""
DRAIN_S = 2.0
"""What finishing and handing over may take once a node is asked to leave."""
TOPIC = b"node"
"""What every peer hears: heartbeats, announcements, goodbyes."""
OFFERS_TOPIC = b"offers"
"""What only aggregators listen to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatExtras:
    """What a role adds to the node's heartbeat."""

    load: Load | None = None
    offers: tuple[SpillOffer, ...] = ()
    state: RunState | None = None


class RoleShell(Protocol):
    """What a node needs to know of the role it plays."""

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
        """What to add to the next heartbeat."""
        ...


class Node:
    """One node of one job."""

    def __init__(
        self,
        role: Role,
        *,
        name: str,
        settings: NodeSettings,
        facts: Mapping[str, str],
        codecs: tuple[str, ...],
        report: Callable[[AnyReport], None],
        context: zmq.asyncio.Context,
        limits: WireLimits | None = None,
        stopping: asyncio.Event | None = None,
    ) -> None:
        """Opens the control sockets; `stopping`, once set, asks the node to drain and leave."""
        self.name = name
        self.settings = settings
        self.limits = limits or WireLimits()
        self.counters = Counters()
        self.report = report
        self.peer_codecs: dict[NodeId, tuple[str, ...]] = {}
        self._context = context
        self.facts = facts
        self._codecs = codecs
        self._stopping = stopping or asyncio.Event()
        self._waits = Waits()
        self._links: dict[NodeId, Connection] = {}
        self._connections: WeakSet[Connection] = WeakSet()
        self._started: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._tasks: asyncio.TaskGroup
        self._peers: Peers
        self._role: RoleShell
        self._control = self.serve(self._answer, port=settings.port)
        self._publisher = self.publisher()
        self.card = NodeCard(
            id=NodeId(secrets.token_hex(6)),
            name=name,
            role=role,
            host=settings.host,
            control_port=self._control.port,
            pub_port=self._publisher.port,
        )

    # --- sockets ----------------------------------------------------------------------------------------

    def serve(self, handler: Handler, *, port: int = 0) -> Server:
        """A new socket that answers requests; the caller runs it."""
        return Server(self._context, self.settings.host, port, handler, limits=self.limits, counters=self.counters)

    def connect(self, card: NodeCard, port: int) -> Connection:
        """A new connection to one of a node's ports; open until the caller, or at the end the node, closes it."""
        connection = Connection(
            self._context,
            card.endpoint(port),
            peer=card.name,
            own_id=self.card.id,
            limits=self.limits,
            counters=self.counters,
        )
        self._connections.add(connection)
        return connection

    def publisher(self) -> Publisher:
        """A new socket to broadcast on; the caller closes it."""
        return Publisher(
            self._context,
            self.settings.host,
            limits=self.limits,
            counters=self.counters,
            note=lambda message: self.note(message, "warning"),
        )

    def listen(self, card: NodeCard, port: int, topics: Sequence[bytes], heard: Heard) -> Subscriber:
        """A new subscription to one of a peer's publishers; the caller runs it."""
        endpoint = card.endpoint(port)
        return Subscriber(self._context, endpoint, topics, heard, limits=self.limits, counters=self.counters)

    def link(self, card: NodeCard) -> Connection:
        """The control connection to a peer, kept until the peer is lost."""
        if card.id not in self._links:
            self._links[card.id] = self.connect(card, card.control_port)
        return self._links[card.id]

    def publish(self, broadcast: Broadcast) -> None:
        """Say something to every peer, or, if it is offers, to every aggregator."""
        if isinstance(broadcast, Announcement):
            for one in in_pieces(broadcast):
                self._publisher.publish(TOPIC, one)
        else:
            self._publisher.publish(OFFERS_TOPIC if isinstance(broadcast, Offers) else TOPIC, broadcast)

    # --- what roles use ---------------------------------------------------------------------------------

    def peers(self, role: Role) -> list[NodeCard]:
        """Live peers of one role, by name."""
        return self._peers.by_role(role)

    def peer(self, node_id: NodeId) -> NodeCard | None:
        """A live peer by id."""
        return self._peers.table.get(node_id)

    def note(self, message: str, level: str = "info") -> None:
        """One line in the log."""
        self.report(Note(node=self.name, message=message, level=level))

    def waiting(self, what: str | Callable[[], str]) -> AbstractContextManager[None]:
        """While inside, the node says now and then what it waits for, and after a while what to check."""
        return self._waits.waiting(what)

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[None]:
        """Run something for as long as the node lives; its failure ends the node."""
        task: asyncio.Task[None] = self._tasks.create_task(work, name=name)
        self._started.add(task)
        task.add_done_callback(self._started.discard)
        if self._leaving:
            task.cancel()
        return task

    # --- life -------------------------------------------------------------------------------------------

    async def run(self, role: RoleShell, *, data_port: int = 0, weights_port: int = 0) -> None:
        """Live until the role ends, the node is asked to leave (it drains first), or something fails."""
        self._role = role
        self.card = msgspec.structs.replace(self.card, data_port=data_port, weights_port=weights_port)
        self._peers = Peers(self, self.card, self.settings, self.facts, self._codecs, self.start)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self.start(self._control.run(), "control")
                self.start(self._beat(), "beat")
                self.start(self._peers.watch_presence(), "presence")
                self.start(self._peers.discover(), "discover")
                self.start(self._say_waits(), "waits")
                acting = self.start(role.run(), "role")
                asked = self.start(self._until_asked(), "asked")
                role_name, address = str(self.card.role), self.card.address
                self.report(Ready(node=self.name, role=role_name, address=address, pid=os.getpid()))
                await asyncio.wait({acting, asked}, return_when=asyncio.FIRST_COMPLETED)
                if not acting.done():
                    await role.drain(DRAIN_S)
                self._leaving = True
                for task in list(self._started):
                    task.cancel()
        except BaseExceptionGroup as group:
            raise root_cause(group) from group
        finally:
            self._leave()

    async def _until_asked(self) -> None:
        await self._stopping.wait()

    def _leave(self) -> None:
        with suppress(ZsflError):
            self.publish(Goodbye(node=self.card.id, reason=SAID_GOODBYE))
        for connection in list(self._connections):
            connection.close()
        self._publisher.close(GOODBYE_LINGER_S)

    async def _beat(self) -> None:
        for turn in itertools.count():
            extras = self._role.beat()
            beat = Beat(
                card=self.card,
                peers=self._peers.hints(),
                counters=self.counters.snapshot(),
                load=extras.load,
                offers=in_turn(extras.offers, turn),
                state=extras.state,
            )
            self.publish(beat)
            await asyncio.sleep(self.settings.beat_s)

    async def _say_waits(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for wait in self._waits.overdue(time.monotonic()):
                hints = self._peers.advice() if wait.lonely else ()
                self.report(Waiting(node=self.name, what=wait.what, seconds=wait.seconds, hints=hints))

    # --- what peers and the wire ask --------------------------------------------------------------------

    def ear(self, card: NodeCard, heard: Callable[[Broadcast], None]) -> Subscriber:
        """A subscription to what a peer says; only aggregators listen to offers."""
        topics = [TOPIC, OFFERS_TOPIC] if self.card.role is Role.AGGREGATOR else [TOPIC]
        return self.listen(card, card.pub_port, topics, lambda broadcast, _: heard(broadcast))

    def peer_joined(self, card: NodeCard, codecs: tuple[str, ...]) -> None:
        """A peer is there."""
        self.peer_codecs[card.id] = codecs
        self._role.joined(card)

    def peer_lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        if link := self._links.pop(card.id, None):
            link.close(f"is gone ({reason})")
        self.peer_codecs.pop(card.id, None)
        self._role.lost(card, reason)

    def peer_said(self, broadcast: Broadcast) -> None:
        """A verified peer said something."""
        self._role.heard(broadcast)

    async def _answer(self, request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if isinstance(request, Hello):
            return self._peers.answer(request), ()
        return await self._role.control(request), ()


def in_turn(offers: tuple[SpillOffer, ...], turn: int) -> tuple[SpillOffer, ...]:
    """As many offers as a heartbeat holds: the oldest first, the next ones in the next turn, and all over again."""
    turns = max(1, -(-len(offers) // MAX_OFFERS))
    first = turn % turns * MAX_OFFERS
    return offers[first : first + MAX_OFFERS]


def in_pieces(announcement: Announcement) -> Iterator[Announcement]:
    """The announcement as it is, or several of the same state where its cids are too many for one."""
    counted, dropped = announcement.counted, announcement.dropped
    for first in range(0, max(len(counted), len(dropped), 1), MAX_SETTLED):
        piece = slice(first, first + MAX_SETTLED)
        yield msgspec.structs.replace(announcement, counted=counted[piece], dropped=dropped[piece])


def root_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error in a group that says most: one of zsfl's before any other."""
    leaves = list(_leaves(group))
    ours = [leaf for leaf in leaves if isinstance(leaf, ZsflError)]
    return (ours or leaves)[0]


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def failed(name: str, error: BaseException) -> Failed:
    """The report of a node that ends with an error."""
    said = str(error) if isinstance(error, ZsflError) else f"{type(error).__name__}: {error}; its log has the traceback"
    return Failed(node=name, kind=type(error).__name__, message=said)
