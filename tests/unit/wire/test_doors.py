"""Sockets with a lock: who has no key, the wrong one or a revoked one is turned away, told of once and counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import zmq
from helpers.doors import Machine, machines
from helpers.waiting import HANG_S, eventually
from helpers.wires import HOST

from zsfl.errors import ConfigError, DeadlineExceeded, NoPeer, Unauthorised
from zsfl.ids import BODY, PROTOCOL, Address, NodeCard, NodeId, PublicKey, Role, RunId, Version
from zsfl.keys.machine import machine_id
from zsfl.keys.nodes import new_node_id
from zsfl.metrics import Counters
from zsfl.settings import NodeSettings
from zsfl.wire.connection import Connection
from zsfl.wire.door import MAX_NOTED, Door, door_for
from zsfl.wire.framing import Buffer, Header, encode
from zsfl.wire.gatekeeper import ENDPOINT, _keepers, kept
from zsfl.wire.greeting import mechanism_at
from zsfl.wire.messages import (
    Announcement,
    Beat,
    Broadcast,
    FetchWeights,
    Goodbye,
    Hello,
    Ok,
    ReleaseSpills,
    RunState,
    Welcome,
)
from zsfl.wire.permits import hearers
from zsfl.wire.pubsub import Publisher, Subscriber
from zsfl.wire.server import Server

WEIGHTS = FetchWeights(portion=BODY, version=Version(1))
GREETING_WITHOUT_KEYS = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Of ZMTP 3.1, section 3.2."""
SHORT_S = 0.3
"""For what never comes."""


def count(counters: Counters, name: str) -> float:
    return counters.snapshot().get(name, 0.0)


async def in_vain(connection: Connection, seen: Callable[[], object]) -> None:
    """Ask, until the other side has seen it; nothing is answered."""
    asking = asyncio.ensure_future(connection.request(WEIGHTS, deadline_s=HANG_S))
    await eventually(seen)
    assert not asking.done()
    connection.close()
    with pytest.raises(NoPeer):
        await asking


def hello(machine: Machine, node: str, role: Role) -> Hello:
    card = NodeCard(id=NodeId(node), name=node, role=role, host=HOST, control_port=1, key=machine.key)
    return Hello(protocol=PROTOCOL, facts={}, card=card, codecs=())


async def test_machines_that_trust_each_other_talk(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        connection = bob.connect(anna.serve(), anna.key)
        answer = await connection.request(WEIGHTS, [b"x" * 100_000], deadline_s=HANG_S)
        assert bytes(answer.parts[0]) == b"x" * 100_000
        assert not anna.notes


async def test_a_frame_as_long_as_it_may_be_is_encrypted(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna") as (anna,):
        connection = anna.connect(anna.serve(), anna.key)
        for size in (anna.limits.frame_bytes, anna.limits.frame_bytes + 1):
            answer = await connection.request(WEIGHTS, [bytes(size)], deadline_s=HANG_S)
            assert len(bytes(answer.parts[0])) == size


async def test_nodes_of_one_machine_talk_without_any_file(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna") as (anna,):
        assert (await anna.connect(anna.serve(), anna.key).request(WEIGHTS, deadline_s=HANG_S)).body == Ok()


async def test_who_has_no_key_is_turned_away(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        server = anna.serve()
        for times in range(1, 4):
            reader, writer = await asyncio.open_connection(HOST, server.port)
            writer.write(GREETING_WITHOUT_KEYS)
            await eventually(lambda times=times: count(anna.counters, "refused_without_key") == times)
            assert len(await reader.read()) <= len(GREETING_WITHOUT_KEYS)  # and then the connection was closed
            writer.close()
        with pytest.raises(DeadlineExceeded):
            await bob.connect(server, "", door=None).request(WEIGHTS, deadline_s=SHORT_S)
        assert [note for note in anna.notes if "uses no keys" in note] == anna.notes
        assert len(anna.notes) == 1
        assert count(anna.counters, "bytes_received") == 0


async def test_who_takes_a_node_for_another_machine_is_turned_away(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        await in_vain(bob.connect(anna.serve(), bob.key), lambda: count(anna.counters, "refused_wrong_key") >= 2)
        assert anna.notes == [], "whoever only has an address tries the keys that it trusts"
        assert count(anna.counters, "bytes_received") == 0


async def test_an_untrusted_key_is_turned_away_and_learns_why_at_once(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        server = anna.serve()
        for _ in range(3):
            with pytest.raises(
                Unauthorised, match=r"them does not trust this machine, .*: pair them with `zsfl invite`"
            ):
                await bob.connect(server, anna.key, watch=True).request(WEIGHTS, deadline_s=HANG_S)
        assert count(anna.door.counters, "refused_keys") == 3
        assert len(anna.notes) == 1
        assert f"the machine {machine_id(PublicKey(bob.key))} at" in anna.notes[0]
        assert bob.key not in anna.notes[0], "to trust it is no command to copy before the ids were compared"
        assert count(anna.counters, "bytes_received") == 0
        anna.trusts(bob)
        assert (await bob.connect(server, anna.key).request(WEIGHTS, deadline_s=HANG_S)).body == Ok()


async def test_a_revoked_key_is_cut_off_and_stays_out(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob", "carl") as (anna, bob, carl):
        anna.trusts(bob)
        anna.trusts(carl)
        server = anna.serve()
        revoked, other = bob.connect(server, anna.key), carl.connect(server, anna.key)
        for connection in (revoked, other):
            await connection.request(WEIGHTS, deadline_s=HANG_S)
        anna.revokes(bob)
        server.cut()
        await eventually(lambda: count(anna.door.counters, "refused_keys"), 30)  # it came again, and was refused
        before = count(anna.counters, "bytes_received")
        with pytest.raises(DeadlineExceeded):
            await revoked.request(WEIGHTS, deadline_s=SHORT_S)
        assert count(anna.counters, "bytes_received") == before
        assert count(anna.counters, "connections_cut") == 1
        assert (await other.request(WEIGHTS, deadline_s=HANG_S)).body == Ok()


async def test_what_a_revoked_key_says_before_it_is_cut_off_is_refused(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        connection = bob.connect(anna.serve(), anna.key)
        await connection.request(WEIGHTS, deadline_s=HANG_S)
        anna.revokes(bob)
        with pytest.raises(Unauthorised, match="does not trust the key of this machine any more"):
            await connection.request(WEIGHTS, deadline_s=HANG_S)


async def test_the_right_key_in_the_wrong_role_is_refused(tmp_path: Path) -> None:
    def welcoming(request: object, _parts: Sequence[Buffer]) -> tuple[Welcome | Ok, Sequence[Buffer]]:
        if isinstance(request, Hello):
            return Welcome(card=request.card, codecs=(), peers=()), ()
        return Ok(), ()

    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob, frozenset({Role.CLIENT}))
        node = new_node_id(bob.key)
        connection = bob.connect(anna.serve(welcoming), anna.key, own_id=node)
        with pytest.raises(Unauthorised, match="as client, and not as aggregator"):
            await connection.request(hello(bob, node, Role.AGGREGATOR), deadline_s=HANG_S)
        await connection.request(hello(bob, node, Role.CLIENT), deadline_s=HANG_S)
        for _ in range(3):
            with pytest.raises(Unauthorised, match="ReleaseSpills is not for a client to say to anna"):
                await connection.request(ReleaseSpills(cids=()), deadline_s=HANG_S)
        await connection.request(WEIGHTS, deadline_s=HANG_S)
        assert count(anna.counters, "unauthorised") == 4
        assert len([note for note in anna.notes if "ReleaseSpills" in note]) == 1


async def test_a_stolen_routing_id_is_refused(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob", "eve") as (anna, bob, eve):
        anna.trusts(bob)
        anna.trusts(eve)
        server, b1 = anna.serve(), new_node_id(bob.key)
        honest = bob.connect(server, anna.key, own_id=b1)
        await honest.request(WEIGHTS, deadline_s=HANG_S)
        thief = eve.connect(server, anna.key, own_id=b1)
        for _ in range(2):
            with pytest.raises(Unauthorised, match=f"node id {b1} is that of another machine"):
                await thief.request(WEIGHTS, deadline_s=HANG_S)
        assert (await honest.request(WEIGHTS, deadline_s=HANG_S)).body == Ok()
        assert count(anna.counters, "unauthorised") == 2
        assert len(anna.notes) == 1


def is_gone(server: Server, routing_id: bytes) -> bool:
    """Whether ZeroMQ has buried the connection that was called so."""
    try:
        server._socket.send_multipart([routing_id, b""], zmq.DONTWAIT)  # pyright: ignore[reportPrivateUsage]
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        return error.errno == zmq.EHOSTUNREACH
    finally:
        server._pump.touched()  # pyright: ignore[reportPrivateUsage] - what arrived meanwhile is told of no more
    return False


async def test_what_one_key_began_under_a_routing_id_another_does_not_go_on_with(tmp_path: Path) -> None:
    """A DEALER with the very identity of one that is gone sends the rest of its message."""
    async with machines(tmp_path, "anna", "bob", "eve") as (anna, bob, eve):
        anna.trusts(bob)
        anna.trusts(eve)
        heard: list[int] = []

        def listening(_request: object, parts: Sequence[Buffer]) -> tuple[Ok, Sequence[Buffer]]:
            heard.append(sum(len(bytes(part)) for part in parts))
            return Ok(), ()

        server = anna.serve(listening)
        header = Header(kind="request", id=1, deadline_s=5.0, body=WEIGHTS)
        first, *rest = encode(header, [bytes(40 << 20)], anna.limits)
        for machine, pieces in ((bob, [first]), (eve, rest)):
            socket = cast(Any, machine.context).socket(zmq.DEALER, socket_class=zmq.Socket)
            socket.linger, socket.routing_id = 0, b"b1/7"
            machine.door.unlock(socket, anna.key)
            socket.connect(f"tcp://{HOST}:{server.port}")
            before = count(anna.counters, "bytes_received")
            for piece in pieces:
                await asyncio.to_thread(socket.send_multipart, piece)
            await eventually(lambda before=before: count(anna.counters, "bytes_received") > before)
            socket.close(linger=0)
            await eventually(lambda: is_gone(server, b"b1/7"))  # before, nobody else can be called so
        assert heard == []


async def test_while_the_authenticator_is_away_nobody_comes_in(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        server = anna.serve()
        before = bob.connect(server, anna.key)
        await before.request(WEIGHTS, deadline_s=HANG_S)
        keeper = _keepers[anna.context]
        keeper._pump.close(RuntimeError("killed"))  # pyright: ignore[reportPrivateUsage] - what would never happen
        await eventually(lambda: keeper._socket.closed)  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(DeadlineExceeded):
            await bob.connect(server, anna.key).request(WEIGHTS, deadline_s=SHORT_S)
        with pytest.raises(DeadlineExceeded):
            await bob.connect(server, "", door=None).request(WEIGHTS, deadline_s=SHORT_S)
        assert (await before.request(WEIGHTS, deadline_s=HANG_S)).body == Ok()
        assert count(anna.door.counters, "authenticator_failures") == 1
        assert "lets nobody in until it is back: RuntimeError('killed')" in anna.notes[0]
        # It begins anew by itself.
        assert (await bob.connect(server, anna.key).request(WEIGHTS, deadline_s=HANG_S)).body == Ok()


async def test_an_authenticator_that_fails_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        anna.trusts(bob)
        monkeypatch.setattr(anna.door, "admits", lambda *_: 1 / 0)
        connection = bob.connect(anna.serve(), anna.key)
        await in_vain(connection, lambda: count(anna.door.counters, "authenticator_failures"))
        assert len(anna.notes) == 1
        assert "let nobody in: ZeroDivisionError" in anna.notes[0]


def test_however_many_strangers_came_a_node_tells_of_what_is_its_own(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "anna")
    for number in range(MAX_NOTED + 9):
        assert not machine.door.admits(number.to_bytes(32, "little"), "192.168.1.9")
    machine.context.term()
    assert len(machine.notes) == MAX_NOTED
    for _ in range(2):
        machine.door.tell_once("ended", "the authenticator ended")
    assert machine.notes[MAX_NOTED:] == ["the authenticator ended"]


async def test_without_any_authenticator_nobody_comes_in(tmp_path: Path) -> None:
    bare, bob = Machine(tmp_path, "anna"), Machine(tmp_path, "bob")
    try:
        bare.trusts(bob)
        with pytest.raises(DeadlineExceeded):
            await bob.connect(bare.serve(), bare.key).request(WEIGHTS, deadline_s=SHORT_S)
    finally:
        await bob.close()
        await bare.close()


async def test_two_doors_of_one_context_have_domains_of_their_own(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        second = Door("second", anna.door._keys, bob.trust)  # pyright: ignore[reportPrivateUsage]
        with kept(anna.context, second):
            assert (anna.door.domain, second.domain) == ("zsfl", "zsfl-2")
            # bob is trusted by the second alone.
            assert (
                await bob.connect(anna.serve(door=second), anna.key).request(WEIGHTS, deadline_s=HANG_S)
            ).body == Ok()
            with pytest.raises(Unauthorised):
                await bob.connect(anna.serve(), anna.key, watch=True).request(WEIGHTS, deadline_s=HANG_S)


async def test_another_authenticator_in_the_same_context_is_a_clear_error(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "anna")
    taken = cast(Any, machine.context).socket(zmq.REP, socket_class=zmq.Socket)
    try:
        taken.bind(ENDPOINT)
        with pytest.raises(ConfigError, match="another authenticator"), kept(machine.context, machine.door):
            pass
    finally:
        taken.close(linger=0)
        await machine.close()


async def test_who_comes_right_after_the_last_one_left_finds_the_endpoint_free(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "anna")
    try:
        for _ in range(1_000):  # ZeroMQ gives an endpoint back whenever its own thread gets to it
            with kept(machine.context, machine.door):
                pass
    finally:
        await machine.close()


# --- broadcasts -------------------------------------------------------------------------------------------

GOODBYE = Goodbye(node=NodeId("a1"), reason="bye")


class Ears:
    """Subscriptions to one publisher, and what they heard."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._tasks: list[asyncio.Task[None]] = []

    def listen(self, machine: Machine, key: str, role: Role | None = None) -> list[Broadcast]:
        heard: list[Broadcast] = []
        wired = {"limits": machine.limits, "counters": machine.counters, "door": machine.door}
        endpoint = f"tcp://{HOST}:{self._publisher.port}"
        ear = Subscriber(
            machine.context, endpoint, [b"t"], lambda said, _: heard.append(said), **wired, key=key, role=role
        )
        self._tasks.append(asyncio.create_task(ear.run()))
        return heard

    async def say(self, until_heard: list[Broadcast], body: Broadcast = GOODBYE) -> None:
        """Say it until somebody hears it: who subscribes hears nothing at first."""

        def said() -> bool:
            self._publisher.publish(b"t", body)
            return bool(until_heard)

        await eventually(said)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_only_who_is_trusted_hears_broadcasts_and_a_revoked_key_no_more(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna", "bob", "carl") as (anna, bob, carl):
        anna.trusts(bob)
        anna.trusts(carl)
        publisher = Publisher(anna.context, HOST, limits=anna.limits, counters=anna.counters, door=anna.door)
        ears = Ears(publisher)
        try:
            bobs, carls = ears.listen(bob, anna.key), ears.listen(carl, anna.key)
            await ears.say(bobs)
            await ears.say(carls)
            anna.revokes(bob)
            publisher.cut()
            # As nodes do that hear nothing any more, they listen anew; ZeroMQ by itself comes back most of the time.
            bobs_again, carls_again = ears.listen(bob, anna.key), ears.listen(carl, anna.key)
            await eventually(lambda: count(anna.door.counters, "refused_keys"))
            for heard in (bobs, bobs_again):
                heard.clear()
            await ears.say(carls_again)
            assert bobs_again == []
            assert bobs == []
        finally:
            await ears.close()
            publisher.close()


async def test_what_a_run_publishes_is_heard_by_whose_roles_need_it_and_by_nobody_else(tmp_path: Path) -> None:
    """A key that is trusted to watch comes to the socket with the weights, and gets nothing; nor once it is no client
    any more.
    """
    async with machines(tmp_path, "anna", "bob", "eve") as (anna, bob, eve):
        anna.trusts(bob, frozenset({Role.CLIENT}))
        anna.trusts(eve, frozenset({Role.OBSERVER}))
        wired: dict[str, Any] = {"limits": anna.limits, "counters": anna.counters, "door": anna.door}
        publisher = Publisher(anna.context, HOST, **wired, hearers=hearers(Role.AGGREGATOR))
        ears = Ears(publisher)
        try:
            bobs, eves, others = ears.listen(bob, anna.key), ears.listen(eve, anna.key), ears.listen(eve, anna.key)
            await eventually(lambda: count(anna.door.counters, "refused_roles") >= 2)
            await ears.say(bobs)
            assert (eves, others) == ([], [])
            (said,) = anna.notes
            assert f"the machine {machine_id(eve.key)} at 127.0.0.1 may not listen to what anna publishes" in said
            assert "it is trusted as observer, and that is for aggregator, client, split-server, standby" in said
            anna.trusts(bob, frozenset({Role.OBSERVER}))
            publisher.cut()
            bobs_again = ears.listen(bob, anna.key)  # as nodes do: ZeroMQ by itself comes back most of the time
            await eventually(lambda: len(anna.notes) == 2)
            own, later = ears.listen(anna, anna.key), Goodbye(node=GOODBYE.node, reason="later")
            await ears.say(own, later)
            assert later not in bobs  # what was said before may still come
            assert (bobs_again, eves, others) == ([], [], [])
        finally:
            await ears.close()
            publisher.close()
        server = anna.serve()
        with pytest.raises(Unauthorised, match="FetchWeights is not for a key that is trusted for observer to say"):
            await eve.connect(server, anna.key).request(WEIGHTS, deadline_s=HANG_S)


async def test_a_broadcast_that_is_not_for_its_sender_is_not_heard(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna") as (anna,):
        publisher = Publisher(anna.context, HOST, limits=anna.limits, counters=anna.counters, door=anna.door)
        ears = Ears(publisher)
        try:
            heard = ears.listen(anna, anna.key, Role.CLIENT)
            await ears.say(heard)
            card = hello(anna, "a1", Role.CLIENT).card
            state = RunState(
                run=RunId("abcdef"), phase="finished", version=Version(1), round=1, rounds=1, window=1, windows=1
            )
            publisher.publish(b"t", Announcement(node=NodeId("a1"), state=state))
            publisher.publish(b"t", Beat(card=card, peers=(), counters={}, state=state))
            heard.clear()
            await ears.say(heard, Beat(card=card, peers=(), counters={}))
            assert {type(said) for said in heard} <= {Beat, Goodbye}
            assert not any(isinstance(said, Beat) and said.state for said in heard)
            assert count(anna.counters, "unauthorised") == 2
        finally:
            await ears.close()
            publisher.close()


# --- which door a node has --------------------------------------------------------------------------------


async def test_what_listens_says_whether_it_uses_keys(tmp_path: Path) -> None:
    async with machines(tmp_path, "anna") as (anna,):
        for server, says in ((anna.serve(), "CURVE"), (anna.serve(door=None), "NULL")):
            assert await mechanism_at(Address(f"{HOST}:{server.port}"), 5) == says
        listening = await asyncio.start_server(lambda _, writer: writer.close(), HOST, 0)
        port = listening.sockets[0].getsockname()[1]
        assert await mechanism_at(Address(f"{HOST}:{port}"), 5) == ""
        listening.close()
        await listening.wait_closed()
        assert await mechanism_at(Address(f"{HOST}:{port}"), 5) is None


def test_a_node_that_only_this_machine_reaches_needs_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    notes: list[str] = []
    assert not door_for(NodeSettings(), "n", notes.append).locked
    assert not list(tmp_path.iterdir())
    assert not notes


def test_a_lan_without_keys_is_refused_unless_it_is_asked_for_and_then_said_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    notes: list[str] = []
    with pytest.raises(ConfigError, match=r"other machines can reach 192.0.2.7.*zsfl invite.*--insecure"):
        door_for(NodeSettings(host="192.0.2.7"), "n", notes.append)
    assert not door_for(NodeSettings(host="192.0.2.7", insecure=True), "n", notes.append).locked
    assert len(notes) == 1
    assert notes[0].startswith("INSECURE: whoever reaches 192.0.2.7")
    with pytest.raises(ConfigError, match="other machines can reach this node or its peers"):
        door_for(NodeSettings(behind_nat=True), "n", notes.append)


def test_an_enrolled_machine_uses_its_keys_on_a_lan_without_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    one = Machine(tmp_path, "zsfl")
    other = Machine(tmp_path, "other")
    one.trusts(other)
    door = door_for(NodeSettings(host="192.0.2.7", zap_domain="mine"), "n", lambda _: None)
    assert (door.locked, door.key, door.domain) == (True, one.key, "mine")
    assert door.guard.has_keys
    assert not door_for(NodeSettings(), "n", lambda _: None).locked
    assert door_for(NodeSettings(keys=str(tmp_path / "third")), "n", lambda _: None).locked  # named: also here
    for machine in (one, other):
        machine.context.destroy(linger=0)
