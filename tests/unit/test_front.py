"""What a node says of peers that come without end, and what it keeps of them."""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.doors import Machine, machines
from zmq.utils import z85

from zsfl import front
from zsfl import peers as peers_module
from zsfl.discovery.events import Candidate, Event, Left, Welcomed
from zsfl.errors import Rejected, Unauthorised
from zsfl.front import Front
from zsfl.ids import PROTOCOL, NodeCard, NodeId, PublicKey, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.nodes import new_node_id
from zsfl.keys.trusted import Trusted, TrustFile
from zsfl.peers import MAX_NOTED, Peers
from zsfl.reports import AnyReport, Met, Note
from zsfl.settings import NodeSettings
from zsfl.wire.messages import Hello

CARD = NodeCard(id=NodeId("x"), name="eve", role=Role.OBSERVER, host="127.0.0.1", control_port=1)


@contextmanager
def node(machine: Machine, said: list[AnyReport]) -> Iterator[Front]:
    """An aggregator that does not run, with sockets."""
    one = Front(
        Role.AGGREGATOR,
        name="aggregator",
        settings=NodeSettings(mdns=False),
        facts={"name": "mine"},
        codecs=(),
        report=said.append,
        context=machine.context,
        door=machine.door,
    )
    try:
        yield one
    finally:
        one._leave()


async def test_of_ever_new_nodes_of_one_machine_only_the_first_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "MAX_MET", 3)
    said: list[AnyReport] = []
    async with machines(tmp_path, "anna", "eve", "bob") as (anna, eve, bob):
        with node(anna, said) as one:
            for _ in range(10):
                one._say_met(msgspec.structs.replace(CARD, id=new_node_id(eve.key), key=eve.key))
            one._say_met(msgspec.structs.replace(CARD, id=new_node_id(bob.key), key=bob.key))
            await asyncio.sleep(0)
    assert [report.machine for report in said if isinstance(report, Met)] == [machine_id(eve.key)] * 3 + [
        machine_id(bob.key)
    ]
    (note,) = (report.message for report in said if isinstance(report, Note))
    assert note == f"3 times somebody came as observer from machine {machine_id(eve.key)}: no more is said of it"


async def test_why_somebody_is_no_peer_is_said_so_often_whatever_they_call_themselves(tmp_path: Path) -> None:
    said: list[AnyReport] = []
    async with machines(tmp_path, "anna") as (anna,):
        with node(anna, said) as one:
            peers = Peers(one, one.card, one.settings, one.facts, (), one.start)
            for job in range(MAX_NOTED + 9):
                card = msgspec.structs.replace(CARD, control_port=1 + job // 100)
                hello = Hello(protocol=PROTOCOL, facts={"name": f"other-{job}"}, card=card, codecs=())
                for _ in range(2):
                    with pytest.raises(Rejected, match="another job"):
                        peers.answer(hello)
    assert len({report.message for report in said if isinstance(report, Note)}) == len(said) == MAX_NOTED


async def test_however_many_ask_to_be_greeted_few_are_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[asyncio.Task[None]] = []
    monkeypatch.setattr(peers_module, "MAX_DIALS", 3)

    def start(work: Coroutine[Any, Any, None], _name: str) -> asyncio.Task[None]:
        begun.append(asyncio.ensure_future(work))
        return begun[-1]

    async with machines(tmp_path, "anna") as (anna,):
        with node(anna, []) as one:
            peers = Peers(one, one.card, one.settings, one.facts, (), start)
            monkeypatch.setattr(peers, "_dial", lambda _: asyncio.sleep(0))
            for port in (1, 1, 2, 3, 4):
                peers.greet(msgspec.structs.replace(CARD, control_port=port))
            assert len(begun) == 3
            await asyncio.gather(*begun)
            await asyncio.sleep(0)
            peers.greet(msgspec.structs.replace(CARD, control_port=4))
            assert len(begun) == 4
            await asyncio.gather(*begun)


async def test_who_cannot_be_dialled_takes_nobody_elses_place_in_what_others_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "MAX_PEERS_EXCHANGED", 1)
    async with machines(tmp_path, "anna") as (anna,):
        with node(anna, []) as one:
            peers = Peers(one, one.card, one.settings, one.facts, (), one.start)
            hidden = msgspec.structs.replace(CARD, id=NodeId("h"), name="hidden", behind_nat=True)
            other = msgspec.structs.replace(CARD, control_port=2)
            for card in (hidden, other):
                peers.table.on(Welcomed(card=card, address=card.address, by="them"), 0.0)
            assert [hint.id for hint in peers.hints()] == [other.id]


def entries(root: object) -> dict[str, int]:
    """Entries of every container of zsfl's own objects that can be reached from this one, by where they are."""
    found, seen, rest = Counter[str](), set[int](), [("", root)]
    while rest:
        where, one = rest.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict | list | set | frozenset | deque | tuple):
            found[where] += len(one)
            held = [*one.keys(), *one.values()] if isinstance(one, dict) else list(one)
            rest += [(where, inner) for inner in held]
        elif type(one).__module__.startswith("zsfl") and not isinstance(one, type):
            names = [*getattr(one, "__dict__", ()), *getattr(type(one), "__slots__", ())]
            rest += [(f"{type(one).__name__}.{name}", getattr(one, name, None)) for name in names]
    return dict(found)


async def test_nothing_grows_with_all_who_ever_came_and_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines are trusted, say HELLO, ask for what is not theirs, leave or do not, and are revoked."""
    monkeypatch.setattr(front, "soon_in_lane", lambda _: None)
    monkeypatch.setattr(peers_module, "MAX_PEERS", 100)
    monkeypatch.setattr(peers_module, "objection", lambda *_: None)
    said: list[AnyReport] = []

    def come_and_go(one: Front, peers: Peers, trust: TrustFile, count: int) -> None:
        for number in range(count):
            raw = os.urandom(32)
            key = PublicKey(z85.encode(raw).decode())
            assert not one._door.admits(raw, "192.0.2.1")
            trust._known = {**trust.known, key: Trusted(key=key, name="other", roles=frozenset({Role.CLIENT}))}
            one._door.lost_trust()
            assert one._door.admits(raw, "192.0.2.1")
            assert not one._door.admits(raw, "192.0.2.1", frozenset({Role.STANDBY}))
            node_id = new_node_id(key)
            kind = {"role": Role.CLIENT, "host": f"192.0.2.{number % 250 + 1}", "behind_nat": number % 2 == 0}
            card = msgspec.structs.replace(CARD, id=node_id, name=f"node-{number}", key=key, **kind)
            hello = Hello(protocol=PROTOCOL, facts={}, card=card, codecs=())
            one._door.guard.check(f"{node_id}/1".encode(), key, hello)
            peers.answer(hello)
            assert peers.table.get(node_id) is not None
            one._door.tell_once((key, Hello), "a request was turned away")
            if number % 3:
                peers._on(Left(node_id=node_id, reason="left: done"))
            trust._known = {one: entry for one, entry in trust.known.items() if one != key}
            one._revoked()
            with pytest.raises(Unauthorised):
                one._door.guard.check(f"{node_id}/1".encode(), key, hello)

    async with machines(tmp_path, "anna") as (anna,):
        with node(anna, said) as one:
            one._peers = peers = Peers(one, one.card, one.settings, one.facts, (), one.start, anna.door)
            come_and_go(one, peers, anna.trust, 1200)
            before = entries([one, peers])
            come_and_go(one, peers, anna.trust, 1200)
            after = entries([one, peers])
    grew = {where: (before.get(where), count) for where, count in after.items() if count > before.get(where, 0) + 9}
    assert grew == {}


async def test_a_node_behind_nat_that_is_trusted_again_is_not_dialled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address is one of another network, and may be anybody's in this one."""
    async with machines(tmp_path, "anna", "bob") as (anna, bob):
        with node(anna, []) as one:
            peers = Peers(one, one.card, one.settings, one.facts, (), one.start, anna.door)
            met: list[Candidate] = []
            for number, hidden in enumerate((True, False)):
                at = {"name": f"bob-{number}", "control_port": 7 + number, "behind_nat": hidden}
                card = msgspec.structs.replace(CARD, id=new_node_id(bob.key), key=bob.key, **at)
                peers.table.on(Welcomed(card=card, address=card.address, by="them"), 0.0)

            def on(event: Event) -> None:
                if isinstance(event, Candidate):
                    met.append(event)
                else:
                    peers.table.on(event, 0.0)

            monkeypatch.setattr(peers, "_on", on)
            peers.trust_changed()
            assert (peers.table.peers(), met) == ((), [])
            anna.trusts(bob)
            peers.trust_changed()
            assert [one.address for one in met] == ["127.0.0.1:8"]
