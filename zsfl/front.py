"""A node's face to its peers: control socket, heartbeat, discovery, presence. Lives in the main loop, where nothing
ever takes long, so that a node whose role computes for minutes still says that it is there."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import zmq.asyncio

from zsfl.calling import Calling
from zsfl.condition import condition
from zsfl.discovery.table import UNHEARD
from zsfl.errors import Rejected, ZsflError, root_cause
from zsfl.ids import Address, NodeCard, NodeId, PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.nodes import new_node_id
from zsfl.lane import soon_in_lane, to_lane
from zsfl.learning.blame import own_line
from zsfl.lifetime import Lifetime
from zsfl.metrics import Counters
from zsfl.node import Node, RoleShell
from zsfl.peers import Peers
from zsfl.reports import LOGGED, AnyReport, Failed, Met, Note, Ready, Waiting
from zsfl.settings import NodeSettings, WireLimits
from zsfl.waits import LOOK_S, Overdue, Waits
from zsfl.wire.calling import CallBack, topic_of
from zsfl.wire.connection import Connection, Dialer
from zsfl.wire.door import Door
from zsfl.wire.examining import Examine
from zsfl.wire.fields import MAX_OFFERS
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import (
    SAID_GOODBYE,
    Beat,
    Broadcast,
    Drain,
    Draining,
    Goodbye,
    Hello,
    Reply,
    Request,
    SpillOffer,
)
from zsfl.wire.pubsub import Publisher, Subscriber
from zsfl.wire.server import Server
from zsfl.wire.sockets import up_to

GOODBYE_LINGER_S = 0.2
"""What the last broadcast may take to leave."""
DRAIN_S = 8.0
"""What finishing and handing over may take once a node is asked to leave."""
BUSY_S = 30.0
"""How much longer a node that is asked to leave waits for its lane to end what it computes."""
MAX_MET = 512
"""Peers of one machine and role of which it is said that they came."""
TOPIC = b"node"
"""What every peer hears: heartbeats and goodbyes."""


class Front:
    """One node of one job, as its peers see it."""

    _was_asked = False
    """Whether it was asked to leave, and does not end by itself."""

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
        door: Door | None = None,
        on_beat: Callable[[Beat], None] = lambda _: None,
    ) -> None:
        """Opens the control sockets, locked by the `door`; `stopping`, once set, asks the node to drain and leave.
        `on_beat` is told each heartbeat.
        """
        self._on_beat = on_beat
        self._door = door or Door(name)
        self.name = name
        self.settings = settings
        self.facts = facts
        self._limits = limits or WireLimits()
        self.counters = Counters()
        self._report = report
        self._context = context
        self._codecs = codecs
        self._loop = asyncio.get_running_loop()
        self._stopping = stopping or asyncio.Event()
        self._life = Lifetime()
        self._met: Counter[tuple[str, Role]] = Counter()  # how often a peer came, by key and role
        self._beats: dict[NodeId, Beat] = {}
        """Of each peer the newest heartbeat that the lane has not heard of."""
        self._peers: Peers
        self._node: Node
        self._opened: Node | None = None
        """The node as soon as it has sockets, whether it comes to anything or not."""
        self._role: RoleShell
        host = settings.host
        wired = {"limits": self._limits, "counters": self.counters, "door": self._door}
        small = up_to(self._limits, self._limits.max_header_bytes)  # what is said here has no tensors
        self._control = Server(context, host, settings.port, self._answer, **{**wired, "limits": small})
        self._publisher = Publisher(context, host, **wired, note=lambda message: self.note(message, "warning"))
        self.card = NodeCard(
            id=new_node_id(self._door.key),
            name=name,
            role=role,
            host=host,
            control_port=self._control.port,
            pub_port=self._publisher.port,
            key=self._door.key,
            behind_nat=settings.behind_nat,
        )
        self._calling = Calling(self.card, self._publisher, self._dial, self._soon)
        self._dialer = Dialer(context, self.card.id, board=self._calling.board, **wired)

    # --- life -------------------------------------------------------------------------------------------

    async def run(self, make: Callable[[Node], Awaitable[RoleShell]]) -> None:
        """Live until the role ends, the node is asked to leave (it drains first), or something fails.

        `make` builds the role in the lane, around the node that it is given.
        """
        try:
            self._node, self._role = await self._aloud(to_lane(self._made(make)))
            self.card = msgspec.structs.replace(
                self.card, data_port=self._role.data_port, news_port=self._node.publisher.port
            )
            self._peers = Peers(self, self.card, self.settings, self.facts, self._codecs, self.start, self._door)
            await self._life.run(self._live())
        except BaseExceptionGroup as group:
            raise root_cause(group) from group
        finally:
            self._leave()
            if self._opened is not None:
                soon_in_lane(self._opened.close_unless_run)

    async def _aloud(self, making: Coroutine[Any, Any, tuple[Node, RoleShell]]) -> tuple[Node, RoleShell]:
        """The role, saying now and then that it is still made: its data may take long to read."""
        waits, made = Waits(), asyncio.ensure_future(making)
        try:
            with waits.waiting("its model and data to be loaded"):
                while not (await asyncio.wait({made}, timeout=LOOK_S))[0]:
                    for wait in waits.overdue(time.monotonic()):
                        self._report(Waiting(node=self.name, what=wait.what, seconds=wait.seconds))
            return made.result()
        finally:
            made.cancel()
            await asyncio.wait({made})

    async def _made(self, make: Callable[[Node], Awaitable[RoleShell]]) -> tuple[Node, RoleShell]:
        node = self._opened = Node(
            self,
            self.card,
            settings=self.settings,
            facts=self.facts,
            context=self._context,
            limits=self._limits,
            door=self._door,
            board=self._calling.board,
        )
        return node, await make(node)

    async def _live(self) -> None:
        running = asyncio.Event()
        acting = self.start(to_lane(self._node.run(self._role, lambda: self._soon(running.set))), "role")
        begun = asyncio.ensure_future(running.wait())
        await asyncio.wait({acting, begun}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        self.start(self._control.run(), "control")
        self.start(self._beat(), "beat")
        self.start(self._peers.watch_presence(), "presence")
        self.start(self._peers.discover(), "discover")
        if self._door.locked:
            self.start(self._mind_keys(), "keys")
        asked = self.start(self._until_asked(), "asked")
        card, machine = self.card, machine_id(PublicKey(self.card.key)) if self._door.locked else ""
        self._report(Ready(node=self.name, role=str(card.role), address=card.address, pid=os.getpid(), machine=machine))
        await asyncio.wait({acting, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not acting.done():
            if not self._was_asked:
                self.note("asked to leave: finishing what is in hand")
            self._was_asked = True
            await asyncio.wait({acting, self.start(self._drained(), "drain")}, return_when=asyncio.FIRST_COMPLETED)

    async def _drained(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S + BUSY_S):
                await to_lane(self._role.drain(DRAIN_S))

    async def _until_asked(self) -> None:
        await self._stopping.wait()

    def _leave(self) -> None:
        with suppress(ZsflError):
            self._publisher.publish(TOPIC, Goodbye(node=self.card.id, reason=SAID_GOODBYE))
        self._dialer.close()
        self._control.close()
        self._publisher.close(GOODBYE_LINGER_S)

    def known(self) -> tuple[Address, ...]:
        """Where live peers are, those that serve first: what to tell a node that goes on in this one's place."""
        return tuple(hint.address for hint in self._peers.hints())

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[None]:
        """Run something for as long as the node lives; its failure ends the node."""
        return self._life.start(work, name)

    async def _mind_keys(self) -> None:
        """Read again whom this machine trusts, and let go at once of whom it does not trust any more."""
        trust = self._door.trust
        while trust is not None:
            await asyncio.sleep(self.settings.beat_s)
            if await asyncio.to_thread(trust.refresh):
                self._revoked()

    def _revoked(self) -> None:
        self._peers.trust_changed()
        if lost := self._door.lost_trust():
            for key, role in [met for met in self._met if met[0] in lost]:
                del self._met[key, role]
            self._control.cut()
            self._publisher.cut()
            soon_in_lane(lambda: self._node.cut())  # whatever it computes: the next revocation does not wait for it

    async def _beat(self) -> None:
        for turn in itertools.count():
            extras = self._role.beat()
            beat = Beat(
                card=self.card,
                peers=self._peers.hints(),
                counters=self._node.counted(),
                load=extras.load,
                offers=in_turn(extras.offers, turn),
                state=extras.state,
                merging=extras.merging,
            )
            self._publisher.publish(TOPIC, beat)
            self._on_beat(beat)
            self._calling.tell_all()
            await asyncio.sleep(self.settings.beat_s)

    # --- what the role says -----------------------------------------------------------------------------

    def _soon(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(call)

    def say(self, report: AnyReport) -> None:
        """Report something; may be called from the lane."""
        self._soon(lambda: self._report(report))

    def say_wait(self, wait: Overdue) -> None:
        """Report a wait, with what to check if it is a lonely one; may be called from the lane."""

        def say() -> None:
            hints = wait.hints or (self._peers.advice() if wait.lonely else ())
            self._report(Waiting(node=self.name, what=wait.what, seconds=wait.seconds, hints=hints))

        self._soon(say)

    def note(self, message: str, level: str = "info") -> None:
        """One line in the log."""
        self._report(Note(node=self.name, message=message, level=level))

    def say_left(self, then: str) -> None:
        """The last word of a node that was asked to leave: what becomes of the run."""
        if self._was_asked:
            self.note(f"has left; {then}")

    # --- what peers and the wire ask --------------------------------------------------------------------

    def connect(self, card: NodeCard, port: int) -> Connection:
        """A new connection to one of a node's ports; open until the caller, or at the end the node, closes it."""
        return self._dialer.connect(card, port, watch=True)

    def ear(self, card: NodeCard, heard: Callable[[Broadcast], None]) -> Subscriber:
        """A subscription to what a peer says."""
        return Subscriber(
            self._context,
            card.endpoint(card.pub_port),
            [TOPIC, topic_of(self.card.id)],
            lambda broadcast, _: heard(broadcast),
            limits=up_to(self._limits, 0),
            counters=self.counters,
            door=self._door,
            key=card.key,
            role=card.role,
            line=self._calling.board.line(card, card.pub_port),
        )

    def peer_joined(self, card: NodeCard, codecs: tuple[str, ...]) -> None:
        """A peer is there."""
        self._say_met(card)
        self._calling.board.joined(card)
        soon_in_lane(lambda: self._node.peer_joined(card, codecs))

    def _say_met(self, card: NodeCard) -> None:
        """On whose machine a peer is; of a machine that never stops to send new ones only the first."""
        if self._door.trust is None or not card.key:
            return
        key = PublicKey(card.key)
        self._met[card.key, card.role] += 1
        if self._met[card.key, card.role] > MAX_MET:
            return
        entry = self._door.trust.known.get(key)
        self._report(
            Met(
                node=self.name,
                peer=card.name,
                role=str(card.role),
                address=card.whereabouts,
                machine=machine_id(key),
                known_as=entry.name if entry else "",
                here=card.key == self.card.key,
            )
        )
        if self._met[card.key, card.role] == MAX_MET:
            self.note(
                f"{MAX_MET} times somebody came as {card.role} from machine {machine_id(key)}: no more is said of it"
            )

    def peer_lost(self, card: NodeCard, reason: str) -> None:
        """A peer is gone."""
        self._calling.lost(card, unheard=reason == UNHEARD, left=reason.endswith(SAID_GOODBYE))
        soon_in_lane(lambda: self._node.peer_lost(card, reason))

    def _dial(self, port: int, endpoint: str, there: bool) -> None:
        for one in (self._control, self._publisher):
            if one.port == port:
                one.dial(endpoint, there=there)
        soon_in_lane(lambda: self._node.dial(port, endpoint, there=there))

    def called(self, card: NodeCard, said: CallBack) -> None:
        """A peer waits for this node, or does not hear it."""
        self._calling.heard(card, said, self._peers)

    def peer_said(self, broadcast: Broadcast) -> None:
        """A verified peer said something. Of its heartbeats the newest is enough, should the lane be busy."""
        if not isinstance(broadcast, Beat):
            soon_in_lane(lambda: self._node.peer_said(broadcast))
        elif broadcast.card.role in self._role.hears:
            is_new = broadcast.card.id not in self._beats
            self._beats[broadcast.card.id] = broadcast
            if is_new:
                soon_in_lane(lambda: self._hand_over(broadcast.card.id))

    def _hand_over(self, peer: NodeId) -> None:
        if beat := self._beats.pop(peer, None):
            self._node.peer_said(beat)

    async def _answer(self, request: Request, _parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
        if isinstance(request, Hello):
            return self._peers.answer(request), ()
        if isinstance(request, Drain):
            return self._drain(request), ()
        if isinstance(request, Examine):
            waits = to_lane(self._node.waits())
            return await condition(self.card, self.settings, self.facts, self._peers.table, waits), ()
        return await to_lane(self._role.control(request)), ()

    def _drain(self, request: Drain) -> Draining:
        if request.node not in (None, self.card.id):
            raise Rejected(f"{self.name} is another node than was asked to leave")
        if not self._stopping.is_set():
            self.note("asked to leave by zsfl drain: finishing what is in hand")
            self._was_asked = True
            self._stopping.set()
        extras = self._role.beat()
        busy = 0 if extras.load is None else extras.load.busy
        card = self.card
        return Draining(node=card.id, name=card.name, role=card.role, busy=busy, offered=len(extras.offers))


def in_turn(offers: tuple[SpillOffer, ...], turn: int) -> tuple[SpillOffer, ...]:
    """As many offers as a heartbeat holds: the oldest first, the next ones in the next turn, and all over again."""
    turns = max(1, -(-len(offers) // MAX_OFFERS))
    first = turn % turns * MAX_OFFERS
    return offers[first : first + MAX_OFFERS]


def failed(name: str, error: BaseException) -> Failed:
    """The report of a node that ends with an error."""
    said = str(error) if isinstance(error, ZsflError) else f"{type(error).__name__}: {error}{own_line(error)}{LOGGED}"
    return Failed(node=name, kind=type(error).__name__, message=said)
