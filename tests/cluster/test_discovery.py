"""Nodes that nobody introduces find one another."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import write_job
from helpers.network import free_port
from helpers.processes import command
from helpers.waiting import until

from zsfl.cluster.processes import ProcessSpawner
from zsfl.cluster.spawner import NodeCommand, Spawner
from zsfl.ids import Role
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
