"""Messages of every kind, right and wrong, to every socket of every node of a run: it goes on as if nothing were said.

Left out are those that may rightly end or change it, whoever sends them: to drain a node, and to promise that somebody
else will aggregate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import zmq
import zmq.asyncio
from helpers.jobs import write_job
from helpers.nodes import Nodes
from helpers.waiting import eventually
from helpers.wild import message

from zsfl.ids import PROTOCOL, NodeCard, NodeId, Role
from zsfl.learning.job import Job, load_job
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.tensors.spec import SUPPORTED
from zsfl.wire.connection import Connection
from zsfl.wire.framing import Arrived, Assembler, Header, encode
from zsfl.wire.messages import Beat, FetchSpills, Hello, Welcome

HOST = "127.0.0.1"
LEFT_OUT = (b"drain", b"grant", b"goodbye")
MESSAGES = 60
"""To each socket."""


def wild(rng: Random) -> bytes:
    """A message, but for those that are left out."""
    while True:
        head = message(rng, wrong=rng.random() < 0.6)
        if not any(name in head for name in LEFT_OUT):
            return head


async def ask(context: zmq.asyncio.Context, endpoint: str, rng: Random) -> None:
    """Send wild messages, then one that is right: returns once that is answered."""
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(endpoint)
    for _ in range(MESSAGES):
        parts = [rng.randbytes(rng.randrange(40)) for _ in range(rng.choice((0, 0, 1, 2)))]
        await dealer.send_multipart([wild(rng), *parts])
    last = 1 << 61
    request = Header(kind="request", id=last, body=FetchSpills(wanted=()))
    await dealer.send_multipart(next(encode(request, (), WireLimits())))
    answers: Iterator[Arrived] = iter(())
    assembler = Assembler(WireLimits())
    while not any(answer.id == last for answer in answers):
        answers = assembler.feed(await dealer.recv_multipart())
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

    async def speak(self, rng: Random) -> None:
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


@pytest.mark.timeout(240)
async def test_a_run_goes_on_whatever_is_said_to_its_nodes(tmp_path: Path) -> None:
    job = replace(load_job(write_job(tmp_path, rounds=60)), shards=2)
    rng, context = Random(11), zmq.asyncio.Context()
    nodes, addresses = Nodes(job, tmp_path / "runs"), list[str]()
    ghosts: list[Ghost] = []
    try:
        addresses.append(await nodes.start("aggregator", Role.AGGREGATOR))
        addresses.append(await nodes.start("server", Role.SPLIT_SERVER, peers=(addresses[0],)))
        for shard in ("0", "1"):
            addresses.append(await nodes.start(f"client-{shard}", Role.CLIENT, peers=(addresses[0],), shards=shard))
        await eventually(lambda: nodes.rounds, 60)
        ghosts = [Ghost(context, job, role) for role in (Role.OBSERVER, Role.SPLIT_SERVER, Role.CLIENT)]
        cards = [await ghost.greet(address) for ghost in ghosts for address in addresses][: len(addresses)]
        endpoints = [card.endpoint(port) for card in cards for port in (card.control_port, card.data_port)]
        asking = (ask(context, endpoint, rng) for endpoint in endpoints)
        async with asyncio.timeout(120):
            await asyncio.gather(*asking, *(ghost.speak(Random(5)) for ghost in ghosts))
        assert not any(task.done() and task.exception() for task in nodes.tasks.values())
        done = len(nodes.rounds)
        await eventually(lambda: len(nodes.rounds) > done or len(nodes.rounds) == job.rounds, 60)
    finally:
        for ghost in ghosts:
            ghost.close()
        await nodes.close()
        context.destroy(linger=0)
