"""Aggregators that are killed at any moment: the run goes on from its last commit, and nothing is counted twice."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.ledger import ledger
from helpers.nodes import Nodes

import zsfl
from zsfl.aggregator.audit import audit
from zsfl.aggregator.commit import Ledger, Record
from zsfl.ids import Role, parse_cid

CASE = Case(optimizer="adam", dropout=0.2, sizes=(13, 7, 20, 18), rounds=4)
WINDOWS, VERSIONS = 4, 16


def assert_clean(folder: Path) -> None:
    found = audit(folder)
    assert found.faults == []
    assert found.verified == found.versions


async def _taken_over(case: Case, runs: Path, monkeypatch: pytest.MonkeyPatch, versions: int) -> tuple[Nodes, bytes]:
    """Run with an aggregator that ends right after it recorded so many versions, and then another one.

    The ledger as the first one left it.
    """
    nodes = Nodes(case.job(), runs)
    commit = Ledger.commit

    def commit_and_end(self: Ledger, record: Record) -> None:
        commit(self, record)
        if record.version == versions:
            monkeypatch.setattr(Ledger, "commit", commit)
            nodes.tasks["first"].cancel()
            raise asyncio.CancelledError

    monkeypatch.setattr(Ledger, "commit", commit_and_end)
    try:
        address = await nodes.start("first", Role.AGGREGATOR)
        for name in ("server-0", "server-1"):
            await nodes.start(name, Role.SPLIT_SERVER, peers=(address,))
        client = await nodes.start("clients", Role.CLIENT, shards="0-3", peers=(address,))
        await asyncio.wait([nodes.tasks["first"]], timeout=30)
        assert nodes.tasks["first"].cancelled()
        left = (runs / "nodes" / "ledger.jsonl").read_bytes()
        await nodes.start("second", Role.AGGREGATOR, resume=True, peers=(client,))
        async with asyncio.timeout(40):
            await asyncio.gather(*(nodes.tasks[name] for name in ("second", "server-0", "server-1", "clients")))
    finally:
        await nodes.close()
    return nodes, left


@pytest.mark.parametrize("merge", [False, True], ids=["single", "merged"])
@pytest.mark.parametrize("versions", [1, WINDOWS + 2, 2 * WINDOWS])
async def test_another_aggregator_goes_on_from_the_last_commit(
    versions: int, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, merge=merge, dropout=0.0 if merge else CASE.dropout)
    straight = await in_process(case, tmp_path, run="straight")
    nodes, left = await _taken_over(case, tmp_path, monkeypatch, versions)
    ran = Ran(tmp_path / "nodes", [])
    if merge:  # who waits together is a matter of chance, and so is the last bit of their sum
        for name, tensor in ran.weights.items():
            assert (tensor - straight.weights[name]).abs().max() < 1e-10
    else:
        assert_equal(ran.weights, straight.weights)
    records = ledger(ran.folder)
    assert len(records) == VERSIONS
    assert (ran.folder / "ledger.jsonl").read_bytes().startswith(left)
    assert left.count(b"\n") == versions
    assert len({parse_cid(cid).run for record in records for cid in record["counted"]}) == 1
    assert_clean(ran.folder)
    assert not [note for note in nodes.notes if "of another run" in note]
    reports = {report.round: report for report in nodes.rounds}
    assert {number: report.steps for number, report in reports.items()} == dict.fromkeys(range(1, 5), 13)
    assert all(report.samples == 58 for report in reports.values())
    assert spills_left(tmp_path) == []


@pytest.mark.parametrize("mode", [zsfl.Elastic(), zsfl.Async()], ids=["elastic", "async"])
async def test_modes_that_do_not_wait_go_on_from_the_last_commit_too(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, mode=mode, batches="proportional", optimizer="momentum")
    _, left = await _taken_over(case, tmp_path, monkeypatch, WINDOWS + 2)
    folder = tmp_path / "nodes"
    records = ledger(folder)
    assert (folder / "ledger.jsonl").read_bytes().startswith(left)
    assert len({parse_cid(cid).run for record in records for cid in record["counted"]}) == 1
    if isinstance(mode, zsfl.Async):
        assert sum(record["samples"] for record in records) >= CASE.rounds * 58
    else:
        assert sum(record["samples"] for record in records) == CASE.rounds * 58
    assert_clean(folder)
