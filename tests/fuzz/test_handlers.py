"""Messages of every kind, right and wrong, to every socket of every node of a run: it goes on as if nothing were said.

Those that may rightly end or change it come in a test of their own, in which nodes leave: to drain one, to ask for the
promise that somebody else may aggregate, to say goodbye.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import zmq
import zmq.asyncio
from helpers.jobs import write_job
from helpers.nodes import Nodes
from helpers.waiting import HANG_S, eventually
from helpers.wild import message

from zsfl.ids import PROTOCOL, NodeCard, NodeId, Role
from zsfl.learning.job import Job, load_job
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.tensors.spec import SUPPORTED
from zsfl.wire.connection import Connection
from zsfl.wire.framing import Arrived, Assembler, Header, encode
from zsfl.wire.messages import Beat, Drain, FetchSpills, Goodbye, Hello, Request, Welcome
from zsfl.wire.succession import Grant

HOST = "127.0.0.1"
Wild = Callable[[Random], bytes]
NOTHING = FetchSpills(wanted=())
MAY_END_IT = (Drain, Grant, Goodbye)
MESSAGES = 60
"""To each socket."""


def harmless(rng: Random) -> bytes:
    """A message, but for those that may end a run."""
    while True:
        head = message(rng, wrong=rng.random() < 0.6)
        if not any(str(kind.__struct_config__.tag).encode() in head for kind in MAY_END_IT):
            return head


def ending(rng: Random) -> bytes:
    """One of those that may, mostly; half of them as they should be."""
    kinds = MAY_END_IT if rng.random() < 0.8 else None
    return message(rng, wrong=rng.random() < 0.5, kinds=kinds)


async def ask(
    context: zmq.asyncio.Context, endpoint: str, rng: Random, wild: Wild = harmless, last: Request = NOTHING
) -> None:
    """Send wild messages, then one that is right: returns once that is answered."""
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    try:
        dealer.connect(endpoint)
        for _ in range(MESSAGES):
            parts = [rng.randbytes(rng.randrange(40)) for _ in range(rng.choice((0, 0, 1, 2)))]
            await dealer.send_multipart([wild(rng), *parts])
        number = 1 << 61
        await dealer.send_multipart(next(encode(Header(kind="request", id=number, body=last), (), WireLimits())))
        answers: Iterator[Arrived] = iter(())
        assembler = Assembler(WireLimits())
        while not any(answer.id == number for answer in answers):
            answers = assembler.feed(await dealer.recv_multipart())
    finally:
        dealer.close()


class Ghost:
    """A peer as far as HELLO and heartbeats go, that says whatever it likes."""

    def __init__(self, context: zmq.asyncio.Context, job: Job, role: Role) -> None:
        self._context = context
        self._voice = context.socket(zmq.PUB)
        self._voice.linger = 0
        port = self._voice.bind_to_random_port(f"tcp://{HOST}")
        self.card = NodeCard(
            id=NodeId(f"ghost-{role}"), name=f"ghost-{role}", role=role, host=HOST, control_port=port, data_port=port,
            pub_port=port, news_port=port,
        )  # fmt: skip
        facts = job.facts(job.build_cuts()) | {"cluster": ""}
        self._hello = Hello(protocol=PROTOCOL, facts=facts, card=self.card, codecs=SUPPORTED)

    async def greet(self, address: str) -> NodeCard:
        """Become a peer of a node; its card."""
        connection = Connection(
            self._context, f"tcp://{address}", peer="victim", own_id="ghost", limits=WireLimits(), counters=Counters()
        )
        welcome = (await connection.request(self._hello, deadline_s=30)).expect(Welcome)
        connection.close()
        return welcome.card

    async def speak(self, rng: Random, wild: Wild = harmless) -> None:
        """Heartbeats of its own among all kinds of other things."""
        beat = next(
            encode(Header(kind="publish", id=1, body=Beat(card=self.card, peers=(), counters={})), (), WireLimits())
        )
        for _ in range(MESSAGES):
            head = wild(rng)
            if rng.random() < 0.5:  # as itself
                head = head.replace(b"server", self.card.id.encode()[:6])
            for topic in (b"node", b"offers", b"state", b"body"):
                await self._voice.send_multipart([topic, head, *[rng.randbytes(9)] * rng.choice((0, 1))])
                await self._voice.send_multipart([topic, *beat])
            await asyncio.sleep(0)

    def close(self) -> None:
        self._voice.close()


@dataclass
class Run:
    """One that trains, peers that are none, and all sockets of its nodes that answer."""

    nodes: Nodes
    rounds: int
    addresses: list[str]
    ghosts: list[Ghost]
    endpoints: list[str]
    context: zmq.asyncio.Context


@asynccontextmanager
async def running(folder: Path, rounds: int = 60) -> AsyncIterator[Run]:
    """An aggregator, a split server and two clients, one of them behind NAT."""
    job = replace(load_job(write_job(folder, rounds=rounds)), shards=2)
    context, nodes = zmq.asyncio.Context(), Nodes(job, folder / "runs")
    run = Run(nodes, job.rounds, [], [], [], context)
    try:
        run.addresses.append(await nodes.start("aggregator", Role.AGGREGATOR))
        seed = (run.addresses[0],)
        run.addresses.append(await nodes.start("server", Role.SPLIT_SERVER, peers=seed))
        for shard in ("0", "1"):
            patient = {"join_s": 600.0, "patience_s": 600.0, "shards": shard}
            hidden = {"behind_nat": shard == "1", "insecure": shard == "1"}
            run.addresses.append(await nodes.start(f"client-{shard}", Role.CLIENT, peers=seed, **patient, **hidden))
        await eventually(lambda: nodes.rounds)
        run.ghosts += [Ghost(context, job, role) for role in (Role.OBSERVER, Role.SPLIT_SERVER, Role.CLIENT)]
        cards = [await ghost.greet(address) for ghost in run.ghosts for address in run.addresses][: len(run.addresses)]
        run.endpoints += [card.endpoint(port) for card in cards for port in (card.control_port, card.data_port)]
        yield run
    finally:
        for ghost in run.ghosts:
            ghost.close()
        await nodes.close()
        context.destroy(linger=0)


@pytest.mark.timeout(240)
async def test_a_run_goes_on_whatever_is_said_to_its_nodes(tmp_path: Path) -> None:
    rng = Random(11)
    async with running(tmp_path) as run:
        asking = (ask(run.context, endpoint, rng) for endpoint in run.endpoints)
        async with asyncio.timeout(120):
            await asyncio.gather(*asking, *(ghost.speak(Random(5)) for ghost in run.ghosts))
        assert not any(task.done() and task.exception() for task in run.nodes.tasks.values())
        done = len(run.nodes.rounds)
        await eventually(lambda: len(run.nodes.rounds) > done or len(run.nodes.rounds) == run.rounds, 60)


@pytest.mark.timeout(240)
async def test_nodes_that_are_told_to_leave_in_all_ways_do_so_in_order(tmp_path: Path) -> None:
    rng = Random(13)
    async with running(tmp_path, rounds=100_000) as run:
        for ghost in run.ghosts:
            await ghost.speak(Random(5), ending)
        assert not any(task.done() for task in run.nodes.tasks.values())  # nobody but ghosts has said goodbye
        asking = [asyncio.ensure_future(ask(run.context, one, rng, ending, Drain())) for one in run.endpoints]
        try:
            async with asyncio.timeout(HANG_S):
                await asyncio.wait(run.nodes.tasks.values())
        finally:
            for one in asking:  # as who has left answers nobody any more
                one.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        assert {name: task.exception() for name, task in run.nodes.tasks.items()} == dict.fromkeys(run.nodes.tasks)
