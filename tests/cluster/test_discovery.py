"""Nodes that nobody introduces find one another."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case
from helpers.jobs import write_job
from helpers.network import free_port
from helpers.nodes import Nodes
from helpers.processes import command
from helpers.waiting import until

from zsfl.cluster.processes import ProcessSpawner
from zsfl.cluster.spawner import NodeCommand, Spawner
from zsfl.discovery.announced import Recogniser, job_hash
from zsfl.discovery.folder import STALE_S, Folder
from zsfl.ids import PROTOCOL, NodeCard, NodeId, Role
from zsfl.reports import AnyReport, Failed, Finished, Ready, RoundReport

NODES = {
    "aggregator": Role.AGGREGATOR,
    "server-0": Role.SPLIT_SERVER,
    "server-1": Role.SPLIT_SERVER,
    "client-0": Role.CLIENT,
    "client-1": Role.CLIENT,
}


@asynccontextmanager
async def _spawner(job: Path, folder: Path) -> AsyncIterator[Spawner]:
    spawner = ProcessSpawner(job, folder / "logs")
    try:
        await spawner.open()
        yield spawner
    finally:
        await spawner.close()


async def _until(spawner: Spawner, fits: Callable[[AnyReport], bool], count: int = 1) -> None:
    """Returns at the `count`th report that fits."""
    while count:
        report = await until(spawner.reports.get())
        assert not isinstance(report, Failed), report
        count -= fits(report)


def _all_take_part(report: AnyReport) -> bool:
    return isinstance(report, RoundReport) and {*report.serving, *_servers(report)} == NODES.keys() - {"aggregator"}


def _servers(report: RoundReport) -> set[str]:
    return {server for servers in report.serving.values() for server in servers}


@pytest.mark.parametrize("known", ["server-0", "client-1"])
async def test_without_mdns_the_address_of_any_one_node_is_enough(tmp_path: Path, known: str) -> None:
    port = free_port()
    common: dict[str, Any] = {"mdns": False, "runs": tmp_path / "runs"}
    async with _spawner(write_job(tmp_path, rounds=10_000), tmp_path) as spawner:
        others = [name for name in reversed(NODES) if name != known]  # the aggregator last, the known node after all
        for name in [*others, known]:
            place: dict[str, Any] = {"port": port} if name == known else {"peers": (f"127.0.0.1:{port}",)}
            if NODES[name] is Role.CLIENT:
                place["shards"] = name[-1]
            if name == known:
                await _until(spawner, lambda report: isinstance(report, Ready), len(others))
            await spawner.start(NodeCommand(name=name, role=NODES[name], flags={**common, **place}))
        await _until(spawner, _all_take_part)


async def test_by_mdns_nodes_started_by_hand_find_one_another(tmp_path: Path) -> None:
    job, alone = write_job(tmp_path, shards=4), ("--cluster", secrets.token_hex(4))
    async with (
        command("node", "client", job, "--shards", "0-3", *alone, cwd=tmp_path) as client,
        command("node", "split-server", job, *alone, cwd=tmp_path) as server,
        command("node", "aggregator", job, *alone, "--rounds", "2", cwd=tmp_path) as aggregator,
    ):
        for node in (aggregator, client, server):
            assert await node.ended() == 0, node.text
    (finished,) = (report for report in aggregator.reports() if isinstance(report, Finished))
    assert finished.rounds == 2
    assert (tmp_path / "runs/tiny/model.safetensors").exists()
    assert aggregator.err == client.err == server.err == []


async def test_nodes_that_share_a_folder_find_one_another_in_it_whatever_else_lies_there(tmp_path: Path) -> None:
    case, meet = Case(rounds=2, sizes=(13, 7)), tmp_path / "meet"
    ours = Recogniser(job_hash(case.job().name, ""), PROTOCOL)
    ids = [NodeId(12 * letter) for letter in "abc"]
    for number, node_id in enumerate(ids):  # two that were killed, long ago and just now, and one that makes no sense
        card = NodeCard(id=node_id, name=node_id, role=Role.AGGREGATOR, host="127.0.0.1", control_port=1 + number)
        Folder(meet, card, ours).write()
    old, fresh, broken = (meet / f"{node_id}.zsfl" for node_id in ids)
    long_ago = old.stat().st_mtime - STALE_S - 60
    os.utime(old, (long_ago, long_ago))
    broken.write_bytes(b'{"node": 1')
    nodes = Nodes(case.job(), tmp_path)
    try:
        for name, role, flags in (
            ("clients", Role.CLIENT, {"shards": "0-1"}),
            ("server", Role.SPLIT_SERVER, {}),
            ("aggregator", Role.AGGREGATOR, {}),
        ):
            await nodes.start(name, role, meet=str(meet), **flags)
        await until(asyncio.gather(*nodes.tasks.values()))
    finally:
        await nodes.close()
    assert [report.round for report in nodes.rounds] == [1, 2]
    assert set(meet.iterdir()) == {fresh, broken}
    assert not any(str(meet) in note for note in nodes.notes)
