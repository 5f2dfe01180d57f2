"""Whoever reaches a node's ports may do to them what it likes: training goes on, and no node's memory grows with it."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.jobs import write_job
from helpers.waiting import eventually

import zsfl
from zsfl.reports import AnyReport, Failed, Ready

SECONDS = 0.5
"""Of each attack, at least one strike of it."""
MOST_MIB = 768
"""More than before, of any node: what is claimed by one attack alone is many times that."""
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


class Watched:
    """What is to be attacked, and how it fares."""

    def __init__(self) -> None:
        self.nodes: dict[str, Ready] = {}
        self.failed: list[str] = []

    def on(self, report: AnyReport) -> None:
        """For `LocalCluster(on_report=...)`."""
        match report:
            case Ready():
                self.nodes[report.node] = report
            case Failed():
                self.failed.append(report.message)
            case _:
                pass

    def ports(self) -> tuple[int, ...]:
        """Of every socket on which the split server and the aggregator listen."""
        pids = [ready.pid for ready in self.nodes.values() if ready.role != "client"]
        open_ = [one for pid in pids for one in psutil.Process(pid).net_connections("tcp")]
        return tuple(sorted(one.laddr.port for one in open_ if one.status == psutil.CONN_LISTEN))

    def mib(self) -> dict[str, int]:
        """Memory of each node."""
        return {name: psutil.Process(ready.pid).memory_info().rss >> 20 for name, ready in self.nodes.items()}


@pytest.mark.timeout(240)
async def test_training_goes_on_under_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    attacks: dict[str, Any] = importlib.import_module("_attacks").ATTACKS
    watched = Watched()
    cluster = zsfl.LocalCluster(
        write_job(tmp_path, rounds=1), clients=2, split_servers=1, runs=tmp_path / "runs", on_report=watched.on
    )
    async with cluster:
        assert [report.round async for report in cluster.train(1)] == [1]
        ports, before = watched.ports(), watched.mib()
        assert len(ports) == 8  # control, data and two to publish on, of both
        for number, (name, attack) in enumerate(attacks.items(), 2):
            striking = asyncio.ensure_future(asyncio.to_thread(attack, "127.0.0.1", ports, SECONDS))
            assert [report.round async for report in cluster.train(1)] == [number], name
            assert await striking > 0, name
            # What came last may be in hand still, with all that it takes once it is unpacked.
            await eventually(lambda: all(mib - before[node] < MOST_MIB for node, mib in watched.mib().items()), 30)
        assert [report.round async for report in cluster.train(1)] == [len(attacks) + 2]
    assert watched.failed == []
