"""What a node says of peers that come without end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.doors import Machine, machines

from zsfl import front
from zsfl import peers as peers_module
from zsfl.discovery.events import Welcomed
from zsfl.errors import Rejected
from zsfl.front import Front
from zsfl.ids import PROTOCOL, NodeCard, NodeId, Role
from zsfl.keys.machine import machine_id
from zsfl.keys.nodes import new_node_id
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
