"""An aggregator that leaves: it records nothing more, and whoever stands by may take over at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zsfl.aggregator.reign import COPYING_S, Reign
from zsfl.aggregator.stage import Stage
from zsfl.aggregator.standing import Standing
from zsfl.ids import NodeCard, NodeId, Role, Version
from zsfl.lease import Candidate, Promise, clock_s
from zsfl.settings import NodeSettings
from zsfl.wire.succession import Follow, Grant, Granted

LEASE_S = 1000.0
STANDBY = NodeCard(id=NodeId("standby"), name="standby", role=Role.STANDBY, host="127.0.0.1", control_port=1)


class FakeNode:
    """A node with clients, which hold a shard each and keep their promises, and one that stands by."""

    def __init__(self, clients: int = 1, **settings: Any) -> None:
        self.name, self.card = "me", SimpleNamespace(id=NodeId("me"), key="")
        self.settings = NodeSettings(lost_after_s=LEASE_S, **settings)
        self.promises = [Promise(clock_s() - LEASE_S, LEASE_S) for _ in range(clients)]
        self.promise = self.promises[0]
        self.notes: list[str] = []
        self.clients = [
            NodeCard(id=NodeId(f"client-{k}"), name="client", role=Role.CLIENT, host="127.0.0.1", control_port=2 + k)
            for k in range(clients)
        ]
        self.there = [STANDBY, *self.clients]

    def peers(self, role: Role) -> list[NodeCard]:
        return [card for card in self.there if card.role is role]

    def peer(self, node: NodeId) -> NodeCard | None:
        return next((card for card in self.there if card.id == node), None)

    def note(self, message: str, level: str = "info") -> None:
        self.notes.append(message)

    def publish(self, broadcast: object) -> None:
        pass

    async def persistently(self, write: Any) -> Any:
        return write()

    def link(self, card: NodeCard) -> Any:
        shard = self.clients.index(card)
        promise = self.promises[shard]

        async def request(grant: Grant, deadline_s: float) -> Any:
            by = candidate(grant.holder, grant.epoch, grant.known, grant.version)
            refused = promise.ask(by, grant.lease_s, clock_s())
            epoch, version = promise.newest
            granted = Granted(
                shards=(shard,),
                refused=refused,
                lease_s=grant.lease_s,
                epoch=promise.epoch,
                newest=(epoch, Version(version)),
            )
            return SimpleNamespace(expect=lambda _: granted)

        return SimpleNamespace(request=request)


def candidate(holder: str, epoch: int, known: int, version: int) -> Candidate:
    return Candidate(holder=holder, name=holder, epoch=epoch, known=known, version=version)


def reigning(node: FakeNode, folder: Path) -> Reign:
    reign = Reign(cast(Any, node), folder, Stage(cast(Any, node)), shards=len(node.promises), bound=0)
    reign.begin(Version(0))
    return reign


def follow(reign: Reign, version: int) -> None:
    """Whoever stands by asks for what it has not, having this version."""
    reign.answer(
        Follow(node=STANDBY.id, version=Version(version), ledger_bytes=0, last="", since=Version(0), checkpoint=None)
    )


async def until_shared(reign: Reign, node: FakeNode) -> asyncio.Task[None]:
    running = asyncio.create_task(reign.run())
    while not node.notes:
        await asyncio.sleep(0)
    return running


async def test_who_leaves_frees_the_clients_once_others_have_what_is_recorded(tmp_path: Path) -> None:
    node = FakeNode()
    reign = reigning(node, tmp_path)
    follow(reign, 0)
    running = await until_shared(reign, node)
    await reign.recorded(Version(3))
    assert reign.is_held
    successor = candidate("successor", 2, 1, 3)
    assert "s are promised to" in node.promise.ask(successor, LEASE_S, clock_s())
    leaving = asyncio.create_task(reign.abdicate(30.0))
    await asyncio.sleep(0)
    assert not reign.is_held
    assert node.promise.ask(successor, LEASE_S, clock_s())
    follow(reign, 3)
    assert await leaving
    assert not reign.is_held
    assert node.promise.ask(successor, LEASE_S, clock_s()) == ""
    running.cancel()


async def test_who_leaves_and_has_no_successor_keeps_its_lease(tmp_path: Path) -> None:
    node = FakeNode()
    reign = reigning(node, tmp_path)
    assert not await reign.abdicate(30.0)
    assert reign.is_held
    follow(reign, 0)
    assert not await reign.abdicate(30.0), "nobody may take over yet"


async def test_a_successor_that_leaves_too_is_not_waited_for(tmp_path: Path) -> None:
    node = FakeNode()
    reign = reigning(node, tmp_path)
    follow(reign, 0)
    running = await until_shared(reign, node)
    await reign.recorded(Version(1))
    leaving = asyncio.create_task(reign.abdicate(30.0))
    await asyncio.sleep(0)
    reign.lost(STANDBY)
    assert not await leaving
    running.cancel()


async def test_an_epoch_that_most_promised_it_before_a_restart_is_its_own(tmp_path: Path) -> None:
    node = FakeNode(clients=3)
    reign = reigning(node, tmp_path)
    follow(reign, 0)
    running = await until_shared(reign, node)
    running.cancel()
    # One client has promised a later epoch to somebody who never came to lead in it.
    rival = node.promises[2] = Promise(clock_s() - LEASE_S, LEASE_S)
    assert rival.ask(candidate("rival", 2, 1, 0), LEASE_S, clock_s()) == ""
    assert await reign._renew()
    write, node.persistently = node.persistently, killed
    with pytest.raises(Killed):
        await reign._renew()
    node.persistently = write
    assert [promise.epoch for promise in node.promises] == [3, 3, 2]
    again = reigning(node, tmp_path)
    assert not again.is_held
    assert not await again._renew()
    assert again.is_held
    assert Standing.of(tmp_path).epoch == 3


class Killed(Exception):
    """The process ended here."""


async def killed(write: Any) -> Any:
    raise Killed


@pytest.mark.parametrize("durability", ["process", "replica"])
async def test_that_nobody_stands_by_any_more_is_told_where_it_holds_up_the_run(
    durability: str, tmp_path: Path
) -> None:
    node = FakeNode(durability=durability)
    reign = reigning(node, tmp_path)
    follow(reign, 0)
    reign.lost(STANDBY)
    said = [note for note in node.notes if "was the last that stood by" in note]
    assert len(said) == (durability == "replica")


async def test_a_finished_run_stays_for_as_long_as_somebody_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("zsfl.aggregator.reign.clock_s", lambda: now_s)
    reign = reigning(FakeNode(patience_s=60.0), tmp_path)
    follow(reign, 0)
    seeing_off = asyncio.create_task(reign.seen_off())
    for _ in range(3):
        now_s += COPYING_S / 2
        follow(reign, 0)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not seeing_off.done()
    now_s += COPYING_S
    await asyncio.wait_for(seeing_off, 5.0)
