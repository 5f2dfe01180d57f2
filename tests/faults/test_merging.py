"""Servers that are killed in the middle of merged passes: every step counts once all the same."""

from __future__ import annotations

from pathlib import Path

from helpers.exact import Case, assert_close, ordinary, spills_left
from helpers.jobs import patch_nodes
from helpers.ledger import counted, ledger
from safetensors.torch import load_file

import zsfl

CASE = Case(merge=True, copies=3, sizes=(13, 7, 20), steps=2, rounds=20, optimizer="momentum")
MERGING = """
from zsfl.split_server.merging import MergePolicy
MergePolicy.pays = lambda _self, _kind, count: count > 1
"""
"""Whatever this machine measures."""
KILLED_AT = {4: "split-server-0", 11: "split-server-1"}


async def test_killed_servers_change_nothing_and_no_step_counts_twice(tmp_path: Path) -> None:
    job = CASE.job_file(tmp_path)
    patch_nodes(job, MERGING)
    cluster = zsfl.LocalCluster(job, mdns=False, split_servers=3, runs=tmp_path)
    reports: list[zsfl.RoundReport] = []
    async with cluster:
        async for report in cluster.train():
            reports.append(report)
            if report.round in KILLED_AT:
                await cluster.kill(KILLED_AT[report.round])
    assert cluster.result is not None
    folder = Path(cluster.result.folder)
    assert_close(load_file(folder / "model.safetensors"), ordinary(CASE))
    assert sum(peer.get("merged", 0.0) for report in reports for peer in report.peers.values()) > 0
    records = ledger(folder)
    assert not any(record["dropped"] for record in records)
    per_round = sum(-(-size // CASE.batch_size) for size in CASE.sizes) * CASE.copies
    assert sum(1 for _ in counted(records)) == per_round * CASE.rounds
    killed = set(KILLED_AT.values())
    assert [path for path in spills_left(tmp_path) if path.parent.name not in killed] == []
