"""Clients and split servers as far as time goes: they decide by zsfl's own classes and compute nothing."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from zsfl.client.role import AT_ONCE, AT_ONCE_BYTES, PAUSE
from zsfl.client.routing import ServerChooser
from zsfl.errors import Busy
from zsfl.ids import Cid, NodeId, PartName, RunId, Version, step_cid
from zsfl.learning.modes import Async
from zsfl.planning.figures import Figures
from zsfl.planning.machines import Clock, Cores, Lane, Port
from zsfl.split_server.admission import Admission
from zsfl.wire.fields import MAX_CARRIED_BYTES, Load

RUN = RunId("00f1a4")
KNOWN = 32
"""Of more split servers a client is taken to know so many, drawn at random, and not all: it draws among them anyway."""
HEADER_BYTES = 300.0
"""Of a message, tensors apart."""
Kind = Literal["forward", "backward", "again", "step"]
"""What is asked of a split server; `again`: the backward of a step whose forward it has not made."""


@dataclass(slots=True, eq=False)
class Making:
    """A step that is being made."""

    cid: Cid
    shard: int
    version: Version
    at_s: float
    """Up to when it is known where its time went."""
    holder: SplitServer | None = None
    then: Callable[[], object] = lambda: None


class Collects(Protocol):
    """The aggregator, as those see it who send it contributions."""

    port: Port

    def came(self, cid: Cid, version: Version, part: PartName) -> None:
        """A contribution is there."""
        ...


class World:
    """What all nodes of a simulation share."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures
        self.clock = Clock()
        self.cores = Cores(self.clock, figures.cores) if figures.cores else None
        self.random = random.Random(figures.seed)
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        """By what is waited for, seconds of all steps together."""
        self.served_s: list[float] = []
        """When the body part of each step was done."""
        self.refused = 0
        """Requests that were answered with BUSY."""
        self.collector: Collects

    def spent(self, step: Making, on: str) -> None:
        """All time until now that is not known to have gone elsewhere went there."""
        self.spent_s[on] += self.clock.now_s - step.at_s
        step.at_s = self.clock.now_s

    def about(self, seconds: float) -> float:
        """So long, more or less."""
        jitter = self.figures.jitter
        return seconds * (1 + jitter * (2 * self.random.random() - 1)) if jitter else seconds

    def spill(self, of: Port, step: Making, part: PartName, size_bytes: float) -> None:
        """Offer a contribution; it goes along, or is fetched where it is long."""
        fetched = 2 * self.figures.latency_s if size_bytes > MAX_CARRIED_BYTES else 0.0
        collector, latency_s = self.collector, self.figures.latency_s + fetched
        size_bytes += HEADER_BYTES
        of.send(self.clock, collector.port, size_bytes, latency_s, collector.came, step.cid, step.version, part)


class SplitServer:
    """Takes what it admits; first what ends something begun, then as it came: as `split_server/queue.py`."""

    def __init__(self, world: World, number: int) -> None:
        self.name = NodeId(f"server-{number}")
        self._world = world
        self.port = Port(world.figures.server_link_bytes_per_s)
        self.lane = Lane(world.clock, world.cores)
        self.admission = Admission(world.figures.slots)
        self._version = Version(0)
        self._unread: list[tuple[Kind, Making, ClientNode]] = []
        self._ending: deque[tuple[Kind, Making, ClientNode]] = deque()
        self._waiting: deque[tuple[Kind, Making, ClientNode]] = deque()
        self._early: defaultdict[Version, list[tuple[Kind, Making, ClientNode]]] = defaultdict(list)
        """What is made with weights that are not here yet."""
        self._is_busy = False

    def took(self, version: Version) -> None:
        """The weights of a version are here."""
        self._version = version
        for early in sorted(self._early):
            if early <= version:
                self._waiting.extend(self._early.pop(early))
        if not self._is_busy:
            self._read()

    def asked(self, kind: Kind, step: Making, client: ClientNode) -> None:
        """A request is there; it is looked at between two turns."""
        self._world.spent(step, "link")
        self._unread.append((kind, step, client))
        if not self._is_busy:
            self._read()

    def _read(self) -> None:
        if not self._unread:
            self._turn()
            return
        unread, self._unread, self._is_busy = self._unread, [], True
        self.lane.do(len(unread) * self._world.figures.server_message_s, self._admit, unread)

    def _admit(self, unread: list[tuple[Kind, Making, ClientNode]]) -> None:
        for one in unread:
            kind, step, client = one
            try:
                self.admission.enter(self._size(kind), is_begun=kind == "backward")
            except Busy as busy:
                self._world.refused += 1
                self._reply(client, HEADER_BYTES, client.refused, self, kind, step, busy.retry_after_s)
                continue
            if kind == "backward":
                self._ending.append(one)
            elif step.version > self._version:
                self._early[step.version].append(one)
            else:
                self._waiting.append(one)
        self._turn()

    def _size(self, kind: Kind) -> int:
        figures = self._world.figures
        size = figures.output_bytes if kind in ("backward", "again") else 0.0
        return int(size + (figures.activation_bytes if kind != "backward" else 0.0))

    def _turn(self) -> None:
        """The next one, if any waits."""
        among = self._ending or self._waiting
        self._is_busy = bool(among)
        if not among:
            return
        chosen, figures = among.popleft(), self._world.figures
        takes_s = figures.forward_s if chosen[0] != "backward" else 0.0
        takes_s += figures.backward_s if chosen[0] != "forward" else 0.0
        takes_s = self._world.about(takes_s)
        cpu_s = figures.server_message_s if chosen[0] != "forward" else 0.0
        held_s = takes_s if figures.on_device else 0.0
        self.lane.do(cpu_s + takes_s - held_s, self._done, chosen, cpu_s + takes_s, held_s=held_s)

    def _done(self, chosen: tuple[Kind, Making, ClientNode], took_s: float) -> None:
        kind, step, client = chosen
        self._world.spent(step, "servers")
        load = self.admission.load
        self.admission.measured(took_s)
        self.admission.leave(self._size(kind))
        figures = self._world.figures
        size = figures.output_bytes if kind == "forward" else figures.input_grad_bytes
        self._reply(client, size + HEADER_BYTES, client.answered, self, kind, step, load)
        if kind != "forward":
            self._world.served_s.append(self._world.clock.now_s)
            self._world.spill(self.port, step, "body", figures.body_spill_bytes)
        self._read()

    def _reply(self, client: ClientNode, size_bytes: float, then: Callable[..., object], *given: Any) -> None:
        self.port.send(self._world.clock, client.port, size_bytes, self._world.figures.latency_s, then, *given)


class ClientNode:
    """A process with some shards: they share its thread, its link, and what it knows of split servers."""

    def __init__(
        self,
        world: World,
        number: int,
        shards: range,
        servers: Mapping[NodeId, SplitServer],
        loads: Mapping[NodeId, Load],
    ) -> None:
        """`loads` are what servers say of themselves before anything is asked of them."""
        figures = world.figures
        self._world, self._figures, self._servers = world, figures, servers
        self.port = Port(figures.link_bytes_per_s)
        self.lane = Lane(world.clock, world.cores)
        self.chooser = ServerChooser(random.Random(f"{figures.seed}/{number}"))
        known = list(loads)
        for name in known if len(known) <= KNOWN else world.random.sample(known, KNOWN):
            self.chooser.joined(name)
            self.chooser.heard(name, loads[name])
        self._line: dict[Making, Kind] = {}
        """Steps that wait for a server with room, those that wait longest first."""
        self._at_holder: dict[Making, None] = {}
        """Backwards that wait for room at the one that made their forward."""
        self._alarm_s = -1.0
        """When somebody in the line may try again, if nothing comes before."""
        follow = FreeShard if isinstance(figures.mode, Async) else WindowShard
        self._shards = [follow(self, shard) for shard in shards]

    def took(self, version: Version) -> None:
        """A version's weights are here, and steps at it are asked for."""
        for shard in self._shards:
            shard.asked(version)

    def heard(self, server: NodeId, load: Load) -> None:
        """A heartbeat."""
        self.chooser.heard(server, load)
        self._wake_all()

    def make(self, shard: int, version: Version, k: int, then: Callable[[], object]) -> None:
        """Make a step."""
        step = Making(step_cid(RUN, shard, version, k), shard, version, self._world.clock.now_s, then=then)
        self._compute(self._figures.head_s, self._begun, step)

    def after(self, seconds: float, then: Callable[..., object], *given: Any) -> None:
        """Have something done later."""
        clock = self._world.clock
        clock.at(clock.now_s + seconds, then, *given)

    @property
    def shards(self) -> int:
        """How many it has."""
        return len(self._shards)

    @property
    def now_s(self) -> float:
        """The time."""
        return self._world.clock.now_s

    @property
    def figures(self) -> Figures:
        """What everything costs."""
        return self._figures

    def _compute(self, seconds: float, then: Callable[..., object], step: Making, *given: Any) -> None:
        """With what it takes to send what comes of it, and to have taken what it is made of."""
        self.lane.do(self._world.about(seconds) + self._figures.client_message_s, then, step, *given)

    def _begun(self, step: Making) -> None:
        self._world.spent(step, "clients")
        self._ask(step, "forward" if self._figures.u_shaped else "step")

    def _ask(self, step: Making, kind: Kind) -> None:
        """Ask a server, or stand in line for one: as `RemoteBody`."""
        now_s = self._world.clock.now_s
        picked = self.chooser.pick(now_s)
        if picked is not None:
            self._world.spent(step, "room")
            self._send(step, kind, self._servers[picked])
            return
        self._line[step] = kind
        free_s = self.chooser.next_free_s()
        if free_s is not None and not self.chooser.occupied and not now_s <= self._alarm_s <= free_s:
            self._alarm_s = free_s
            self._world.clock.at(free_s, self._wake_all)

    def _out_of_line(self, step: Making) -> None:
        if (kind := self._line.pop(step, None)) is not None:
            self._ask(step, kind)

    def _send(self, step: Making, kind: Kind, server: SplitServer) -> None:
        self.chooser.asked(server.name)
        figures = self._figures
        size = HEADER_BYTES + (figures.activation_bytes if kind != "backward" else 0.0)
        size += figures.output_bytes if kind in ("backward", "again") else 0.0
        self.port.send(self._world.clock, server.port, size, figures.latency_s, server.asked, kind, step, self)

    def refused(self, server: SplitServer, kind: Kind, step: Making, for_s: float) -> None:
        """BUSY: another one, for which a backward needs its input too."""
        self._world.spent(step, "room")
        self.chooser.refused(server.name, self._world.clock.now_s, for_s)
        self._came_back(server)
        self.lane.do(self._figures.client_message_s, self._ask, step, "again" if kind == "backward" else kind)

    def answered(self, server: SplitServer, kind: Kind, step: Making, load: Load) -> None:
        """A server has done its part."""
        self._world.spent(step, "link")
        self.chooser.served(server.name)
        self.chooser.heard(server.name, load)
        self._came_back(server)
        if kind == "forward":
            self._compute(self._figures.tail_s, self._turned, step, server)
        else:
            self._compute(self._figures.back_s, self._finished, step)

    def _came_back(self, server: SplitServer) -> None:
        self.chooser.answered(server.name)
        self._wake()

    def _wake_all(self) -> None:
        self._wake(len(self._line))

    def _wake(self, count: int = 1) -> None:
        """Those whose holder has room again, and so many of those who are first in the line."""
        for step in list(self._at_holder):
            assert step.holder is not None  # noqa: S101  # for the type alone
            if not self.chooser.is_full(step.holder.name):
                del self._at_holder[step]
                self._send(step, "backward", step.holder)
        for step in list(itertools.islice(self._line, count)):
            self._out_of_line(step)

    def _turned(self, step: Making, holder: SplitServer) -> None:
        self._world.spent(step, "clients")
        step.holder = holder
        if self.chooser.is_full(holder.name):
            self._at_holder[step] = None
        else:
            self._send(step, "backward", holder)

    def _finished(self, step: Making) -> None:
        self._world.spent(step, "clients")
        self._world.spill(self.port, step, "client", self._figures.client_spill_bytes)
        step.then()


class WindowShard:
    """Exact and elastic: the steps of each version that is asked for, several at a time, each once."""

    def __init__(self, node: ClientNode, shard: int) -> None:
        self._node, self._shard = node, shard
        steps, step_bytes = node.figures.steps, node.figures.activation_bytes or AT_ONCE_BYTES
        self._at_once = min(AT_ONCE, steps, max(1, int(AT_ONCE_BYTES // step_bytes)))
        self._newest = self._version = Version(-1)
        self._begun = self._under_way = 0

    def asked(self, version: Version) -> None:
        """Whoever is busy with an earlier version ends that first."""
        self._newest = version
        if not self._under_way:
            self._begin()

    def _begin(self) -> None:
        self._version, self._begun = self._newest, 0
        for _ in range(self._at_once):
            self._next()

    def _next(self) -> None:
        k, self._begun, self._under_way = self._begun, self._begun + 1, self._under_way + 1
        self._node.make(self._shard, self._version, k, self._made)

    def _made(self) -> None:
        self._under_way -= 1
        if self._begun < self._node.figures.steps:
            self._next()
        elif not self._under_way and self._newest > self._version:
            self._begin()


class FreeShard:
    """Async: one step after the other at the newest version, and some moments for the next one between them."""

    def __init__(self, node: ClientNode, shard: int) -> None:
        figures, mode = node.figures, node.figures.mode
        self._node, self._shard = node, shard
        self._quota, self._each = 1, 1
        if isinstance(mode, Async):
            self._quota, self._each = mode.quota, mode.each(figures.clients * figures.batch)
        self._newest = self._version = Version(-1)
        self._made = 0
        """At the version that it has made steps at last."""
        self._is_making, self._pause, self._begun_s = False, 0, 0.0

    def asked(self, version: Version) -> None:
        """There is a newer one."""
        self._newest = version
        if not self._is_making:
            self._make()

    def _make(self) -> None:
        if self._newest > self._version:
            self._version, self._made = self._newest, 0
        self._is_making, self._pause, self._begun_s = True, self._pause + 1, self._node.now_s
        self._node.make(self._shard, self._version, self._made, self._done)

    def _done(self) -> None:
        self._is_making = False
        self._made += 1
        if self._newest > self._version or self._made < self._each:
            self._make()
        elif self._made < self._quota:
            self._node.after(PAUSE * (self._node.now_s - self._begun_s), self._go_on, self._pause)

    def _go_on(self, pause: int) -> None:
        if pause == self._pause and not self._is_making:
            self._make()
