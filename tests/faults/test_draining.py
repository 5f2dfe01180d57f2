"""Nodes that are asked to leave: they finish, hand over what they hold, and nothing is made twice for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.gated import gated_job
from helpers.jobs import write_job
from helpers.ledger import ledger, shards, versions
from helpers.nodes import Nodes
from helpers.processes import finished
from helpers.waiting import HANG_S, eventually, until

import zsfl
from zsfl.aggregator.audit import audit
from zsfl.cluster.leaving import drain
from zsfl.ids import Address, Role
from zsfl.reports import AnyReport, Note, RoundReport

CASE = Case(optimizer="adam", dropout=0.2, sizes=(13, 7, 20, 18), rounds=4)


class Watch:
    """What nodes said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rounds: list[RoundReport] = []

    def on(self, report: AnyReport) -> None:
        """For `LocalCluster(on_report=...)`."""
        if isinstance(report, Note):
            self.notes.append(report.message)
        if isinstance(report, RoundReport):
            self.rounds.append(report)

    def assert_nothing_made_twice(self) -> None:
        assert [note for note in self.notes if note.startswith("driving")] == []
        assert [peers for report in self.rounds for peers in report.peers.values() if peers.get("recomputed")] == []


def model(runs: Path, job: str) -> bytes:
    return (runs / job / "model.safetensors").read_bytes()


async def rounds_of(cluster: zsfl.LocalCluster, rounds: int) -> None:
    async for _ in cluster.train(rounds):
        pass


async def test_a_server_that_holds_steps_of_an_open_version_leaves_at_once_and_none_is_made_again(
    tmp_path: Path,
) -> None:
    job, gate = gated_job(tmp_path, "'exact'")
    async with zsfl.LocalCluster(job, in_process=True, split_servers=1, runs=tmp_path / "quiet") as quiet:
        await rounds_of(quiet, 3)
    watch, runs = Watch(), tmp_path / "runs"
    cluster = zsfl.LocalCluster(job, mdns=False, client_processes=2, runs=runs, on_report=watch.on, lost_after_s=HANG_S)
    async with cluster:
        await rounds_of(cluster, 1)
        gate.close()
        training = asyncio.create_task(rounds_of(cluster, 2))
        await gate.is_reached()
        spills = runs / "spills" / "gated"
        for shard in (2, 3):  # whose clients are not held up: once their own parts are there, the servers' are
            await eventually(lambda shard=shard: holds(spills / "client-2-3", shard))
        [leaver, *_] = [
            name for name in ("split-server-0", "split-server-1") if any(holds(spills / name, s) for s in (2, 3))
        ]
        node = cluster.nodes[leaver]
        assert node.address is not None
        assert await drain(node.address, HANG_S) == leaver
        await eventually(lambda: node.exit_code is not None)
        assert node.exit_code == 0
        seen = len(watch.rounds)
        assert seen == 1, "the version is open still"
        gate.open()
        await training
    for report in watch.rounds[seen + 1 :]:
        assert all(leaver not in servers for servers in report.serving.values())
    watch.assert_nothing_made_twice()
    assert model(runs, "gated") == model(tmp_path / "quiet", "gated")
    assert audit(runs / "gated").faults == []
    assert {path.parent.name for path in spills_left(runs)} <= {leaver}  # until it starts again and offers them


def holds(folder: Path, shard: int) -> bool:
    """Whether a step of this shard is in one of the segments of a node."""
    name = f"-s{shard:05}-".encode()
    return any(name in path.read_bytes() for path in folder.glob("*.spills"))


async def test_servers_that_leave_a_busy_run_one_after_another_change_no_bit(tmp_path: Path) -> None:
    job = write_job(tmp_path, rounds=1_000_000)  # it ends when the test has seen enough, however slow the machine
    watch, runs = Watch(), tmp_path / "runs"
    settings = {"mdns": False, "lost_after_s": HANG_S}  # nobody is to be taken for gone who did not leave
    async with zsfl.LocalCluster(job, split_servers=2, runs=runs, on_report=watch.on, **settings) as cluster:  # type: ignore[arg-type]

        async def leave(name: str) -> None:
            address = cluster.nodes[name].address
            assert address is not None
            code, said = await finished("drain", address, cwd=tmp_path)
            assert (code, said.err) == (0, [])
            assert [line.split(" at ")[0] for line in said.out] == [name, name]
            assert "is leaving: " in said.out[0]
            assert "has left after " in said.out[1]
            await eventually(lambda: cluster.nodes[name].exit_code == 0)

        training = cluster.train()
        await anext(training)
        await leave("split-server-0")
        await anext(training)
        await cluster.start_split_server("late")
        await cluster.stop("split-server-1")  # SIGTERM
        assert cluster.nodes["split-server-1"].exit_code == 0
        seen = versions(runs / "tiny") + 2
        async for report in training:
            if report.version > seen:
                break
    watch.assert_nothing_made_twice()
    records = ledger(runs / "tiny")
    assert audit(runs / "tiny").faults == []
    quiet = zsfl.LocalCluster(job, in_process=True, split_servers=1, runs=tmp_path / "quiet")
    async with quiet:
        async for report in quiet.train():
            if report.version >= len(records):
                break
    undisturbed = ledger(tmp_path / "quiet" / "tiny")[: len(records)]
    assert [record["weights"] for record in records] == [record["weights"] for record in undisturbed]


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """Nodes of the exact case in this process."""
    started = Nodes(CASE.job(), tmp_path)
    yield started
    await started.close()


async def test_an_aggregator_leaves_its_run_to_be_resumed(tmp_path: Path, nodes: Nodes) -> None:
    address = Address(await nodes.start("first", Role.AGGREGATOR, rounds=10_000))
    await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
    client = await nodes.start("clients", Role.CLIENT, shards="0-3", peers=(address,))
    await eventually(lambda: nodes.rounds)
    await until(drain(address, HANG_S))
    await until(nodes.tasks["first"])
    rounds = nodes.rounds[-1].round + 3  # another one may have ended that was not tested yet
    await nodes.start("second", Role.AGGREGATOR, resume=True, rounds=rounds, peers=(client,))
    await until(asyncio.gather(*(nodes.tasks[name] for name in ("second", "server", "clients"))))
    straight = await in_process(CASE, tmp_path, run="straight", rounds=rounds)
    assert_equal(Ran(tmp_path / "nodes", []).weights, straight.weights)
    assert audit(tmp_path / "nodes").faults == []
    assert spills_left(tmp_path) == []


@pytest.mark.parametrize("mode", [zsfl.Exact(return_s=1000.0), "elastic", "async"], ids=["exact", "elastic", "async"])
async def test_a_client_leaves_its_shards_and_the_others_go_on(mode: Any, tmp_path: Path) -> None:
    nodes = Nodes(replace(CASE, mode=mode).job(), tmp_path)
    try:
        address = await nodes.start("first", Role.AGGREGATOR, rounds=10_000)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,))
        await nodes.start("stays", Role.CLIENT, shards="0-2", peers=(address,))
        leaver = await nodes.start("leaves", Role.CLIENT, shards="3", peers=(address,))
        await eventually(lambda: nodes.rounds)
        await until(drain(Address(leaver), HANG_S))
        await until(nodes.tasks["leaves"])
        seen = len(nodes.rounds)
        await eventually(lambda: len(nodes.rounds) > seen + 2)  # exact mode does not wait for who said goodbye
    finally:
        await nodes.close()
    records = ledger(tmp_path / "nodes")
    assert 3 in shards(records[0])
    assert 3 not in shards(records[-1])
    assert audit(tmp_path / "nodes").faults == []
