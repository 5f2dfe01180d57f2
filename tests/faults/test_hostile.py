"""Whoever reaches a node's ports may do to them what it likes: training goes on, and no node's memory grows with it
for long, nor ever beyond what it admits."""

from __future__ import annotations

import asyncio
import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.jobs import write_job
from helpers.waiting import eventually

import zsfl
from zsfl.reports import AnyReport, Failed, Ready
from zsfl.split_server.admission import MAX_HELD_BYTES

SECONDS = 0.5
"""Of each attack, at least one strike of it."""
MOST_MIB = 768
"""More than before, of any node: what is claimed by one attack alone is many times that."""
PROC = Path("/proc")
MOST_PEAK_MIB = (MAX_HELD_BYTES >> 20) + MOST_MIB
"""The same at any time of a split server, with all in hand that it admits: ten times that is claimed by bombs."""
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

    def forget_peaks(self) -> None:
        """What each takes now is the most that it has taken, where the system lets one say so (Linux)."""
        for ready in self.nodes.values():
            with suppress(OSError):
                (PROC / str(ready.pid) / "clear_refs").write_text("5")

    def too_high(self, before: dict[str, int]) -> dict[str, int]:
        """Nodes that took more, at any time since, than they may; by how much it was more than before."""
        peaks = {name: _peak_mib(ready.pid) - before[name] for name, ready in self.nodes.items()}
        most = {name: MOST_PEAK_MIB if ready.role == "split-server" else MOST_MIB for name, ready in self.nodes.items()}
        return {name: peak for name, peak in peaks.items() if peak >= most[name]}


def _peak_mib(pid: int) -> int:
    """Of a process: the most that it has taken; where nobody keeps that, what it takes now."""
    with suppress(OSError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    return psutil.Process(pid).memory_info().rss >> 20


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
            watched.forget_peaks()
            striking = asyncio.ensure_future(asyncio.to_thread(attack, "127.0.0.1", ports, SECONDS))
            assert [report.round async for report in cluster.train(1)] == [number], name
            assert await striking > 0, name
            assert watched.too_high(before) == {}, name
            # What came last may be in hand still, with all that it takes once it is unpacked.
            await eventually(lambda: all(mib - before[node] < MOST_MIB for node, mib in watched.mib().items()), 30)
        assert [report.round async for report in cluster.train(1)] == [len(attacks) + 2]
    assert watched.failed == []
