"""A network that is slow, torn, or lets nothing through in one direction: the run ends as if nothing had happened."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.leaks import nothing_left
from helpers.ledger import ledger, versions
from helpers.network import Network
from helpers.nodes import Nodes
from helpers.waiting import HANG_S, eventually
from torch import Tensor

from zsfl import member
from zsfl.aggregator import role as aggregator_role
from zsfl.aggregator.audit import audit
from zsfl.ids import Role

CASE = Case(optimizer="adam", dropout=0.2, sizes=(13, 7, 20, 18), rounds=8)
WINDOWS = 4
"""That a round has."""
QUICK: dict[str, Any] = {"beat_s": 0.1, "lost_after_s": 0.6, "request_s": 1.0, "patience_s": HANG_S}
LATENCY_S = 0.02
ENDS_S = 2 * HANG_S
"""No run takes longer, whatever is done to it and however busy the machine."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the run ends with when nothing happens."""
    return asyncio.run(in_process(CASE, tmp_path_factory.mktemp("quiet"))).weights


class Cluster:
    """An aggregator, two split servers, two clients, one of them behind NAT, and the network between them."""

    def __init__(self, runs: Path, network: Network) -> None:
        self.network = network
        self.nodes = Nodes(CASE.job(), runs, network)
        self._folder = runs / "nodes"
        self.alone = 0
        """A round that was made by one server while no other could be reached."""

    def versions(self) -> int:
        """How many there are."""
        return versions(self._folder)

    async def start(self) -> None:
        address = await self.nodes.start("aggregator", Role.AGGREGATOR, **QUICK)
        for name in ("server-0", "server-1"):
            await self.nodes.start(name, Role.SPLIT_SERVER, peers=(address,), **QUICK)
        await self.nodes.start("client-0", Role.CLIENT, shards="0-1", peers=(address,), **QUICK)
        hidden = {"behind_nat": True, "insecure": True}
        await self.nodes.start("client-1", Role.CLIENT, shards="2-3", peers=(address,), **hidden, **QUICK)

    async def until_version(self, more: int = 1) -> None:
        """Until so many more versions are made."""
        wanted = self.versions() + more
        await eventually(lambda: self.versions() >= wanted)

    def joined(self, name: str) -> int:
        """How often the aggregator has found this node."""
        return sum(note.startswith(f"{name} joined from ") for note in self.nodes.notes)

    async def until_noticed(self, name: str) -> None:
        """Until somebody has said of this node that it is gone."""
        await eventually(lambda: any(note.startswith(f"{name} is gone: ") for note in self.nodes.notes))

    def serving(self, round_: int) -> set[str]:
        """Who served in a round."""
        report = self.nodes.rounds[round_ - 1]
        return {server for servers in report.serving.values() for server in servers}


@asynccontextmanager
async def disturbed(
    runs: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Tensor]
) -> AsyncIterator[Cluster]:
    """A run that has begun, to do something to; it ends in time, with the same weights, and leaves nothing behind."""
    async with nothing_left():
        network = Network(monkeypatch)
        cluster = Cluster(runs, network)
        try:
            async with asyncio.timeout(ENDS_S):
                await cluster.start()
                await cluster.until_version(2)
                yield cluster
                await asyncio.gather(*cluster.nodes.tasks.values())
        except BaseException as error:
            error.add_note("the nodes said:\n" + "\n".join(cluster.nodes.notes))
            raise
        finally:
            await cluster.nodes.close()
            await network.close()
    assert_equal(Ran(runs / "nodes", []).weights, undisturbed)
    assert len(ledger(runs / "nodes")) == WINDOWS * CASE.rounds
    assert audit(runs / "nodes").faults == []


async def late(cluster: Cluster, name: str) -> None:
    cluster.network.latency_s = LATENCY_S


async def dribbling(cluster: Cluster, name: str) -> None:
    cluster.network.dribble(name, 400, 0.001)
    await cluster.until_version(3)
    cluster.network.heal()


async def torn(cluster: Cluster, name: str) -> None:
    for _ in range(3):
        cluster.network.reset(name)
        await cluster.until_version()


async def cut(cluster: Cluster, name: str) -> None:
    cluster.network.cut(name)
    await cluster.until_noticed(name)
    if name == "server-0":  # and now it alone is left, so that the run is not over before it is found again
        cluster.network.cut("server-1")
        await cluster.until_noticed("server-1")
        cluster.network.heal()
        cluster.network.cut("server-1")
        cluster.alone = cluster.versions() // WINDOWS + 2
        await eventually(lambda: cluster.versions() >= WINDOWS * cluster.alone)
        before = cluster.joined("server-1")
        cluster.network.heal()
        cluster.network.block(*itertools.product(("client-0", "client-1"), ("server-0", "server-1")))
        await eventually(lambda: cluster.joined("server-1") > before)  # so that it hears of the end
    cluster.network.heal()


async def deaf(cluster: Cluster, name: str) -> None:
    cluster.network.block_to(name)
    await cluster.until_noticed("aggregator" if name.startswith("server") else "server-1")
    cluster.network.heal()


async def mute(cluster: Cluster, name: str) -> None:
    cluster.network.block_from(name)
    cluster.network.block_from("client-1")  # which nobody can dial to hear it again
    await cluster.until_noticed(name)
    await cluster.until_noticed("client-1")
    cluster.network.heal()


@pytest.mark.parametrize("name", ["server-0", "aggregator"])
@pytest.mark.parametrize("fault", [late, dribbling, torn, cut, deaf, mute])
async def test_a_run_ends_as_if_nothing_had_happened(
    fault: Callable[[Cluster, str], Awaitable[None]],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, Tensor],
) -> None:
    async with disturbed(tmp_path, monkeypatch, undisturbed) as cluster:
        await fault(cluster, name)
    assert all(cluster.network.carried[flow] for flow in (("client-0", name), (name, "client-0")))
    assert spills_left(tmp_path) == []
    if cluster.alone:
        assert cluster.serving(cluster.alone) == {name}


TO_SERVER = [("client-0", "server-0"), ("client-1", "server-0")]


@pytest.mark.parametrize(
    ("blocked", "carries"),
    [
        (TO_SERVER, True),
        ([(server, client) for client, server in TO_SERVER], True),
        ([("server-0", "aggregator")], True),
        ([("aggregator", "server-0")], True),
        ([("aggregator", "server-0")], False),
    ],
    ids=["from clients", "to clients", "to aggregator", "from aggregator", "from aggregator, which has to fetch"],
)
async def test_a_server_of_which_one_direction_is_cut_off_is_done_without(
    blocked: list[tuple[str, str]],
    carries: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, Tensor],
) -> None:
    monkeypatch.setattr(aggregator_role, "FAREWELL_S", 1.0)  # for the server that cannot hear of the end
    if not carries:
        monkeypatch.setattr(member, "MAX_CARRIED_BYTES", 0)  # as of spills that have to be fetched
    async with disturbed(tmp_path, monkeypatch, undisturbed) as cluster:
        cluster.network.block(*blocked)
        await asyncio.wait([cluster.nodes.tasks["aggregator"]])
        cut_off = cluster.nodes.tasks.pop("server-0")  # it may not hear of the end
        cut_off.cancel()
        await asyncio.wait([cut_off])
    assert {path.parent.name for path in spills_left(tmp_path)} <= {"server-0"}
    assert "server-0" not in cluster.serving(CASE.rounds)
