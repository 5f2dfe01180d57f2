"""The whole run in virtual time: nodes, aggregator, and what comes of them."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from zsfl.aggregator.closing import closing_for
from zsfl.aggregator.gathering import Gathering
from zsfl.ids import Cid, NodeId, PartName, Version, parse_cid, step_cid
from zsfl.learning.averaging import Contribution
from zsfl.learning.modes import Async, Exact, max_staleness
from zsfl.planning.figures import Figures
from zsfl.planning.machines import Lane, Port
from zsfl.planning.nodes import HEADER_BYTES, RUN, ClientNode, SplitServer, World

MOST_EVENTS = 1_000_000
"""Of one simulation; one that takes more is judged by what it has done."""
WARM_STEPS = 2.0
"""Of each client, as many as go by before anything is counted; of many clients, one version."""
LEAST_STEPS = 1_000
"""That are counted then, where there is time for it, in one version at least."""
BUSY = 0.7
"""Who is busy for a larger share of the time is what bounds the rest."""
BEATS_OF = 5_000
"""Heartbeats of split servers are simulated where no more than so many would be heard each time."""
BEAT_S = 0.5
MANY, LOOKS, FIRST_LOOKS = 512, 200, 20
"""With more clients the aggregator of a simulation looks only so often whether a version is over, since a look goes
through all of them: in as long as the version before took, and in as long as the first one has taken so far."""

Place = Literal["clients", "client links", "split servers", "server links", "aggregator", "aggregator link", "cores"]
"""What can bound the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulation found."""

    split_servers: int
    steps_per_s: float
    version_s: float
    """Between two versions, on average; infinity where none was made."""
    steps_per_version: float
    busy: Mapping[Place, float]
    """The share of the time for which each is at work; of several nodes of a kind, on average."""
    spent_s: Mapping[str, float]
    """Where the time of a step goes, on average: clients, link, servers, aggregator, and for a server with room."""
    bottleneck: Place
    refused: int
    """Requests that were answered with BUSY."""
    late: int
    """Steps that counted at a later version than their own."""
    dropped: int
    events: int
    is_whole: bool
    """Whether versions were counted; else it is what split servers had done when the events ran out."""


class Aggregator:
    """Gathers, closes and publishes by the real rules of the mode."""

    def __init__(self, world: World) -> None:
        figures = world.figures
        self._world, self._figures = world, figures
        self.port = Port(figures.server_link_bytes_per_s)
        self.lane = Lane(world.clock, world.cores)
        quota = figures.mode.quota if isinstance(figures.mode, Async) else figures.steps
        self._gathering = Gathering(
            RUN, max_staleness=max_staleness(figures.mode), steps_per_version=quota, shards=figures.clients
        )
        self._closing = closing_for(figures.mode, quota)
        self._there = frozenset(range(figures.clients))
        self._sizes = {shard: [figures.batch] * figures.steps for shard in range(figures.clients)}
        self._alarm_s = math.inf
        self._is_closing = self._will_look = False
        self._closed_s = 0.0
        self.version = Version(0)
        self.counted = self.late = self.dropped = 0
        self.marks: list[tuple[float, int]] = []
        """Of each version, when it was recorded and how many steps had counted by then."""
        self.clients: list[ClientNode] = []
        self.servers: list[SplitServer] = []

    def begin(self) -> None:
        """Ask for the steps of the present version, and publish its weights."""
        figures, version, now_s = self._figures, self.version, self._world.clock.now_s
        is_async = isinstance(figures.mode, Async)
        expected = (
            None
            if is_async
            else [step_cid(RUN, shard, version, k) for shard in self._sizes for k in range(figures.steps)]
        )
        late = self._gathering.begin(version, expected)
        self._closing.began(version, self._sizes, now_s)
        self._is_closing, self._alarm_s = False, math.inf
        for step in late:
            self._closing.arrived(step, figures.batch, now_s)
        for server in self.servers:
            self._publish(server, figures.body_weights_bytes)
        for client in self.clients:
            self._publish(client, figures.client_weights_bytes)
        self._look()

    def _publish(self, node: ClientNode | SplitServer, size_bytes: float) -> None:
        clock, latency_s = self._world.clock, self._figures.latency_s
        self.port.send(clock, node.port, size_bytes + HEADER_BYTES, latency_s, self._followed, node, self.version)

    def _followed(self, node: ClientNode | SplitServer, version: Version) -> None:
        node.lane.do(self._figures.follow_s, self._took, node, version)

    def _took(self, node: ClientNode | SplitServer, version: Version) -> None:
        if isinstance(node, ClientNode) and version:
            self._world.spent_s["versions"] += node.shards * (self._world.clock.now_s - self._closed_s)
        node.took(version)

    def came(self, cid: Cid, version: Version, part: PartName) -> None:
        """A contribution is there."""
        self.lane.do(self._figures.part_s, self._take, cid, version, part, self._world.clock.now_s)

    def _take(self, cid: Cid, version: Version, part: PartName, came_s: float) -> None:
        self._world.spent_s["parts"] += self._world.clock.now_s - came_s
        samples = self._figures.batch
        one = Contribution(
            cid=cid,
            part=part,
            version=version,
            n=samples,
            loss_sum=None,
            samples=samples,
            grads={},
            buffers={},
            node="",
        )
        if not self._gathering.arrived(one):
            return
        now_s = self._world.clock.now_s
        for step in self._gathering.completed(cid):
            self._closing.arrived(step, samples, now_s)
            self._look_soon()

    def _look_soon(self) -> None:
        """At once; where that goes through many clients, for all that comes within a moment together."""
        if self._figures.clients <= MANY or isinstance(self._figures.mode, Exact):
            self._look()
        elif not self._will_look:
            self._will_look = True
            now_s, ends_s = self._world.clock.now_s, [0.0, *(when_s for when_s, _ in self.marks[-2:])]
            wait_s = (ends_s[-1] - ends_s[-2]) / LOOKS if self.marks else now_s / FIRST_LOOKS
            self._world.clock.at(now_s + wait_s, self._look)

    def _look(self) -> None:
        """Whether the version is over, and when to look again if nothing comes."""
        now_s, self._will_look = self._world.clock.now_s, False
        if self._is_closing:
            return
        if self._closing.closes(self._there, now_s):
            self._is_closing, self._closed_s = True, now_s
            self.lane.do(self._figures.version_s, self._record)
        elif (next_s := self._closing.next_deadline_s()) < self._alarm_s:
            self._alarm_s = next_s
            self._world.clock.at(next_s, self._alarmed, self.version)

    def _alarmed(self, version: Version) -> None:
        if version == self.version:
            self._alarm_s = math.inf
            self._look()

    def _record(self) -> None:
        window, dropped = self._gathering.take()
        self._gathering.end()
        own = [parse_cid(one.cid).version for one in window if one.part == "client"]
        self.counted += len(own)
        self.late += sum(version < self.version for version in own)
        self.dropped += len(dropped)
        self.marks.append((self._world.clock.now_s, self.counted))
        self.version = Version(self.version + 1)
        if _is_enough(self._figures, self.marks):
            self._world.clock.stop()
        self.begin()


def simulate(figures: Figures, most_events: int = MOST_EVENTS) -> Outcome:
    """What becomes of a run; the same each time. ConfigError where nothing at all is done within `most_events`."""
    world = World(figures)
    aggregator = Aggregator(world)
    world.collector = aggregator
    servers = {server.name: server for server in (SplitServer(world, n) for n in range(figures.split_servers))}
    loads = {name: server.admission.load for name, server in servers.items()}
    clients = [ClientNode(world, number, shards, servers, loads) for number, shards in enumerate(_shared(figures))]
    aggregator.servers, aggregator.clients = list(servers.values()), clients
    if len(servers) * len(clients) <= BEATS_OF:
        for server in servers.values():
            world.clock.at(BEAT_S, _beat, world, server, clients)
    world.clock.at(0.0, aggregator.begin)
    world.clock.run(most_events)
    return _outcome(world, aggregator, servers, clients)


def _shared(figures: Figures) -> list[range]:
    """Which shards each process has."""
    bounds = [figures.clients * number // figures.nodes for number in range(figures.nodes + 1)]
    return [range(first, after) for first, after in itertools.pairwise(bounds)]


def _beat(world: World, server: SplitServer, clients: list[ClientNode]) -> None:
    load = server.admission.load
    for client in clients:
        client.heard(server.name, load)
    world.clock.at(world.clock.now_s + BEAT_S, _beat, world, server, clients)


def _begun(figures: Figures, marks: Sequence[tuple[float, int]]) -> int | None:
    """The version after which it counts; None while there is none."""
    warm = max(1.0, min(WARM_STEPS * figures.clients, LEAST_STEPS))
    return next((number for number, (_, steps) in enumerate(marks) if steps >= warm), None)


def _is_enough(figures: Figures, marks: Sequence[tuple[float, int]]) -> bool:
    if marks[-1][1] < LEAST_STEPS:
        return False
    begun = _begun(figures, marks)
    return begun is not None and begun < len(marks) - 1 and marks[-1][1] - marks[begun][1] >= LEAST_STEPS


def _outcome(
    world: World,
    aggregator: Aggregator,
    servers: Mapping[NodeId, SplitServer],
    clients: list[ClientNode],
) -> Outcome:
    figures, now_s = world.figures, max(world.clock.now_s, 1e-12)
    marks, begun = aggregator.marks, _begun(figures, aggregator.marks)
    if begun is not None and begun < len(marks) - 1:
        (from_s, before), (to_s, after), versions = marks[begun], marks[-1], len(marks) - 1 - begun
    else:
        from_s, to_s, versions = now_s / 2, now_s, 0
        before, after = bisect.bisect(world.served_s, from_s), len(world.served_s)
    seconds, steps = max(to_s - from_s, 1e-12), after - before
    busy = _busy(world, aggregator, servers, clients, now_s)
    spent = {name: total / max(len(world.served_s), 1) for name, total in world.spent_s.items()}
    return Outcome(
        split_servers=figures.split_servers,
        steps_per_s=steps / seconds,
        version_s=seconds / versions if versions else math.inf,
        steps_per_version=steps / versions if versions else math.nan,
        busy=busy,
        spent_s=spent,
        bottleneck=_bottleneck(busy, spent),
        refused=world.refused,
        late=aggregator.late,
        dropped=aggregator.dropped,
        events=world.clock.events,
        is_whole=versions > 0,
    )


def _busy(
    world: World,
    aggregator: Aggregator,
    servers: Mapping[NodeId, SplitServer],
    clients: list[ClientNode],
    now_s: float,
) -> dict[Place, float]:
    def mean(values: list[float]) -> float:
        return min(1.0, sum(values) / len(values) / now_s)

    def link(ports: list[Port]) -> float:
        return max(mean([port.out_busy_s for port in ports]), mean([port.in_busy_s for port in ports]))

    busy: dict[Place, float] = {
        "clients": mean([client.lane.busy_s for client in clients]),
        "client links": link([client.port for client in clients]),
        "split servers": mean([server.lane.busy_s for server in servers.values()]),
        "server links": link([server.port for server in servers.values()]),
        "aggregator": mean([aggregator.lane.busy_s]),
        "aggregator link": link([aggregator.port]),
    }
    if world.cores is not None:
        busy["cores"] = world.cores.busy_s / now_s / world.figures.cores
    return busy


def _bottleneck(busy: Mapping[Place, float], spent: Mapping[str, float]) -> Place:
    """Who is at work nearly all the time; where nobody is, whom a step waits for longest."""
    most = max(busy, key=lambda place: busy[place])
    if busy[most] >= BUSY:
        return most
    waits: dict[Place, float] = {
        "clients": spent.get("clients", 0.0),
        "client links": spent.get("link", 0.0),
        "split servers": spent.get("servers", 0.0) + spent.get("room", 0.0),
        "aggregator": spent.get("parts", 0.0) + spent.get("versions", 0.0),
    }
    return max(waits, key=lambda place: waits[place])
