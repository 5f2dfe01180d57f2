"""Nodes behind NAT: who asks them waits, and they dial; keys, and who may say what, are as everywhere."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.doors import Machine, machines
from helpers.waiting import HANG_S, eventually, until
from helpers.wires import HOST, echo

from zsfl.errors import DeadlineExceeded, Unauthorised
from zsfl.ids import NodeCard, NodeId, Role
from zsfl.keys.nodes import new_node_id
from zsfl.metrics import Counters
from zsfl.settings import WireLimits
from zsfl.wire import calling
from zsfl.wire.calling import Call, CallBack, Called, Switchboard, topic_of
from zsfl.wire.connection import Dialer
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Broadcast, Goodbye, Hello, Ok, ReleaseSpills, Reply, Request
from zsfl.wire.pubsub import Publisher, Subscriber
from zsfl.wire.server import Server

TOPIC = b"node"
HIDDEN = NodeCard(
    id=NodeId("n"), name="hidden", role=Role.CLIENT, host="10.9.9.9", control_port=1, data_port=2, behind_nat=True
)
"""Nobody has that address."""
ASKING = ReleaseSpills(cids=())


def board(told: list[NodeId] | None = None, *, behind_nat: bool = False) -> Switchboard:
    return Switchboard(HOST, behind_nat, (told if told is not None else []).append)


def dialler(machine: Machine, own: Switchboard) -> Dialer:
    """Of an aggregator on that machine."""
    wired = {"limits": WireLimits(), "counters": machine.counters, "door": machine.door}
    return Dialer(machine.context, new_node_id(machine.key), board=own, **wired)


def called(own: Switchboard, server: Server | Publisher) -> str:
    """What somebody says who waits for the node, heard by it, which dials."""
    ((_port, endpoint, there),) = Called(HIDDEN).by(
        NodeCard(id=NodeId("a"), name="asker", role=Role.AGGREGATOR, host=HOST, control_port=1),
        own.call_back(HIDDEN.id).calls,
    )
    server.dial(endpoint, there=there)
    return endpoint


async def test_a_node_that_nobody_can_dial_is_asked_by_its_own_key_alone(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob", "eve") as (anna, bob, eve):
        for one, other in ((anna, bob), (bob, anna), (anna, eve), (eve, anna)):
            one.trusts(other)
        said: list[bytes] = []

        async def keep(request: Request, parts: Sequence[Buffer]) -> tuple[Reply, Sequence[Buffer]]:
            said.extend(bytes(part) for part in parts)
            return await echo(request, parts)

        own = board()
        with closing(dialler(anna, own)) as asking:
            server = bob.serve(keep)
            card = NodeCard(**{**_fields(HIDDEN), "key": bob.key, "data_port": server.port})
            connection = asking.connect(card, card.data_port)
            ((_, at),) = own.call_back(card.id).calls
            # Whoever else comes, with a key that is not the node's, or with nothing to say, takes nothing away.
            other = eve.serve(keep)
            await anna.connect(other, eve.key).request(ASKING, deadline_s=HANG_S)  # it runs
            other.dial(f"tcp://{HOST}:{at}", there=True)
            with closing(socket.create_connection((HOST, at))):
                waiting = asyncio.ensure_future(connection.request(ASKING, [b"a" * 100_000], deadline_s=HANG_S))
                await eventually(lambda: eve.counters.snapshot().get("refused_wrong_key", 0) > 0)
                assert said == []
                called(own, server)
                answer = await until(waiting)
            assert [bytes(part) for part in answer.parts] == said == [b"a" * 100_000]
            with pytest.raises(Unauthorised, match="introduces itself"):
                await connection.request(_hello(), deadline_s=HANG_S)  # the guard is that of any request


async def test_a_node_that_nobody_can_dial_is_heard(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        bob.trusts(anna)
        heard: list[Broadcast] = []
        publisher = Publisher(bob.context, HOST, limits=WireLimits(), counters=Counters(), door=bob.door)
        own = board()
        ear = Subscriber(
            anna.context,
            HIDDEN.endpoint(2),
            [TOPIC, topic_of(NodeId("me"))],
            lambda broadcast, _: heard.append(broadcast),
            limits=WireLimits(),
            counters=anna.counters,
            door=anna.door,
            key=bob.key,
            role=Role.CLIENT,
            line=own.line(HIDDEN, 2),
        )
        listening = asyncio.ensure_future(ear.run())
        await eventually(lambda: own.nodes() != [])
        called(own, publisher)
        back = CallBack(node=NodeId("me"), calls=(Call(1, 2),))

        def says() -> bool:
            publisher.publish(topic_of(NodeId("me-not")), CallBack(node=NodeId("me-not"), calls=()))
            publisher.publish(topic_of(NodeId("me")), back)
            publisher.publish(TOPIC, Goodbye(node=NodeId("n"), reason="x"))
            return len(heard) > 1

        await eventually(says)
        assert heard[0] == back
        assert isinstance(heard[1], Goodbye)
        listening.cancel()
        await asyncio.wait([listening])
        assert own.call_back(HIDDEN.id).calls == ()
        publisher.close()


async def test_who_hangs_up_is_not_asked_any_more_and_may_come_again(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        bob.trusts(anna)
        own = board()
        with closing(dialler(anna, own)) as asking:
            server = bob.serve()
            card = NodeCard(**{**_fields(HIDDEN), "key": bob.key, "data_port": server.port})
            connection = asking.connect(card, card.data_port)
            endpoint = called(own, server)
            assert (await connection.request(ASKING, deadline_s=HANG_S)).expect(Ok)
            server.dial(endpoint, there=False)
            server.dial(endpoint, there=False)  # which is not connected
            with pytest.raises(DeadlineExceeded):
                await connection.request(ASKING, deadline_s=0.2)
            server.dial(endpoint, there=True)
            assert (await connection.request(ASKING, deadline_s=HANG_S)).expect(Ok)
            connection.close()
            assert own.call_back(card.id).calls == ()


def test_who_waits_where_is_told_and_who_was_lost_is_told_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "MOST_LOST", 2)
    told: list[NodeId] = []
    own = board(told)
    assert own.line(NodeCard(**{**_fields(HIDDEN), "behind_nat": False}), 2) is None
    assert board(behind_nat=True).line(HIDDEN, 2) is None
    own.joined(HIDDEN)
    assert own.nodes() == []
    own.changed(HIDDEN.id, Call(2, 4000), there=True)
    own.changed(HIDDEN.id, Call(1, 4001), there=True)
    own.joined(HIDDEN)
    assert own.call_back(HIDDEN.id).calls == (Call(1, 4001), Call(2, 4000))
    for call in (Call(1, 4001), Call(2, 4000)):
        own.changed(HIDDEN.id, call, there=False)
    assert own.call_back(HIDDEN.id).calls == ()
    assert own.nodes() == [HIDDEN.id]
    assert told == [HIDDEN.id] * 4
    own.joined(HIDDEN)
    assert own.nodes() == []
    for node in map(NodeId, "abc"):
        own.changed(node, Call(1, 1), there=True)
        own.changed(node, Call(1, 1), there=False)
    assert own.nodes() == ["b", "c"]


def test_what_is_dialled_is_what_was_said_last() -> None:
    ours, card = Called(HIDDEN), NodeCard(id=NodeId("a"), name="a", role=Role.AGGREGATOR, host=HOST, control_port=1)
    assert list(ours.by(card, ())) == []
    assert list(ours.by(card, (Call(1, 10), Call(2, 20)))) == [
        (1, f"tcp://{HOST}:10", True),
        (2, f"tcp://{HOST}:20", True),
    ]
    assert list(ours.by(card, (Call(1, 10), Call(2, 20)))) == []
    assert list(ours.by(card, (Call(2, 20), Call(2, 21)))) == [
        (1, f"tcp://{HOST}:10", False),
        (2, f"tcp://{HOST}:21", True),
    ]
    assert {endpoint for _, endpoint, there in ours.by(card, ()) if not there} == {
        f"tcp://{HOST}:20",
        f"tcp://{HOST}:21",
    }


def test_a_line_that_somebody_else_claims_too_is_ended_by_nobody_but_all_of_them() -> None:
    ours, card = Called(HIDDEN), NodeCard(id=NodeId("a"), name="a", role=Role.AGGREGATOR, host=HOST, control_port=1)
    liar = NodeCard(**{**_fields(card), "id": NodeId("l"), "control_port": 2})
    line = (1, f"tcp://{HOST}:10")
    assert list(ours.by(card, (Call(1, 10),))) == [(*line, True)]
    assert list(ours.by(liar, (Call(1, 10),))) == list(ours.by(liar, ())) == []
    assert list(ours.by(liar, (Call(1, 10),))) == list(ours.by(card, ())) == []
    assert list(ours.by(liar, ())) == [(*line, False)]


def test_no_socket_dials_itself_as_to_hang_up_would_be_to_listen_no_more() -> None:
    liar = NodeCard(**{**_fields(HIDDEN), "id": NodeId("l"), "behind_nat": False})
    assert list(Called(HIDDEN).by(liar, (Call(2, 2), Call(2, 3)))) == [(2, HIDDEN.endpoint(3), True)]


async def test_who_waits_with_a_revoked_key_is_not_told_any_more_though_another_claims_its_line(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        bob.trusts(anna)
        publisher = Publisher(bob.context, HOST, limits=WireLimits(), counters=Counters(), door=bob.door)
        own = board()
        wired: dict[str, Any] = {"limits": WireLimits(), "counters": anna.counters, "door": anna.door, "key": bob.key}
        heard: list[Broadcast] = []
        line = own.line(HIDDEN, publisher.port)
        ear = Subscriber(anna.context, "", [TOPIC], lambda broadcast, _: heard.append(broadcast), line=line, **wired)
        listening = asyncio.ensure_future(ear.run())
        await eventually(lambda: own.nodes() != [])
        called(own, publisher)

        def says() -> list[Broadcast]:
            publisher.publish(TOPIC, Goodbye(node=NodeId("n"), reason="x"))
            return heard

        await eventually(says)
        bob.revokes(anna)
        publisher.cut()
        await eventually(lambda: bob.door.counters.snapshot().get("refused_keys", 0) > 0)
        listening.cancel()
        await asyncio.wait([listening])
        publisher.close()


def _fields(card: NodeCard) -> dict[str, object]:
    return {name: getattr(card, name) for name in card.__struct_fields__}


def _hello() -> Hello:
    return Hello(protocol=1, facts={}, card=HIDDEN, codecs=())
