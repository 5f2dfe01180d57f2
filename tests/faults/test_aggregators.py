"""Aggregators that are killed at any moment: the run goes on from its last commit, and nothing is counted twice."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.ledger import ledger
from helpers.nodes import Nodes
from helpers.waiting import HANG_S, eventually

import zsfl
from zsfl.aggregator.audit import audit
from zsfl.aggregator.commit import Ledger, Record
from zsfl.aggregator.progress import Progress
from zsfl.ids import Role, parse_cid
from zsfl.reports import AnyReport, Waiting
from zsfl.spill.layout import decode, encode
from zsfl.spill.segments import Segment

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
        await asyncio.wait([nodes.tasks["first"]], timeout=HANG_S)
        assert nodes.tasks["first"].cancelled()
        left = (runs / "nodes" / "ledger.jsonl").read_bytes()
        await nodes.start("second", Role.AGGREGATOR, resume=True, peers=(client,))
        async with asyncio.timeout(HANG_S):
            await asyncio.gather(*(nodes.tasks[name] for name in ("second", "server-0", "server-1", "clients")))
    finally:
        await nodes.close()
    return nodes, left


async def test_what_was_refused_or_clipped_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions since the checkpoint are made again by the same rule, of the same steps, as short as they were made."""
    bound = zsfl.NormBound(0.6)
    case = replace(
        CASE, dropout=0.0, average=zsfl.TrimmedMean(), norm_bound=bound, protect=zsfl.gaussian_noise(std=0.1)
    )
    case = replace(case, protect=replace(case.protect, secret=False))
    straight = await in_process(case, tmp_path, run="straight")
    await _taken_over(case, tmp_path, monkeypatch, WINDOWS + 2)
    assert_equal(Ran(tmp_path / "nodes", []).weights, straight.weights)
    assert_clean(tmp_path / "nodes")
    records = ledger(tmp_path / "nodes")
    assert any(record["clipped"] for record in records[WINDOWS : WINDOWS + 2])
    mine, theirs = (
        [[one["by"] for one in r["clipped"].values()] for r in ledger(tmp_path / run)] for run in ("nodes", "straight")
    )
    assert mine == theirs


@pytest.mark.parametrize(
    ("versions", "merge"), [(1, False), (WINDOWS + 2, False), (WINDOWS + 2, True), (2 * WINDOWS, False)]
)
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


@pytest.mark.parametrize("mode", [zsfl.Elastic(grace=HANG_S), zsfl.Async()], ids=["elastic", "async"])
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


async def _resumed_after(case: Case, runs: Path, monkeypatch: pytest.MonkeyPatch, versions: int, **flags: Any) -> None:
    """Run in one process until something fails just after so many versions are recorded, the last of which is lost."""
    commit = Ledger.commit

    def commit_and_end(self: Ledger, record: Record) -> None:
        commit(self, record)
        if record.version == versions:
            raise zsfl.RunFailed("ended on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "commit", commit_and_end)
        with pytest.raises(zsfl.RunFailed, match="ended on purpose"):
            await in_process(case, runs, run="mine", **flags)


@pytest.mark.parametrize("mode", [zsfl.Exact(), zsfl.Elastic(), zsfl.Async()], ids=["exact", "elastic", "async"])
async def test_what_is_offered_before_all_are_back_waits(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first version is in progress when the aggregator ends, and a client comes back late."""
    nodes = Nodes(replace(CASE, mode=mode, rounds=2).job(), tmp_path)
    commit = Ledger.commit

    def end(_: Ledger, __: Record) -> None:
        monkeypatch.setattr(Ledger, "commit", commit)
        nodes.tasks["first"].cancel()
        raise asyncio.CancelledError

    monkeypatch.setattr(Ledger, "commit", end)
    try:
        address = await nodes.start("first", Role.AGGREGATOR)
        await nodes.start("server", Role.SPLIT_SERVER, peers=(address,), beat_s=0.1)
        client = await nodes.start("clients", Role.CLIENT, shards="0-2", peers=(address,), beat_s=0.1)
        await nodes.start("late", Role.CLIENT, shards="3", peers=(address,), beat_s=0.1)
        await asyncio.wait([nodes.tasks["first"]], timeout=HANG_S)
        nodes.tasks["late"].cancel()
        await nodes.start("second", Role.AGGREGATOR, resume=True, peers=(client,), patience_s=HANG_S)
        heard = [note for note in nodes.notes if "clients joined" in note]
        await eventually(lambda: len([note for note in nodes.notes if "clients joined" in note]) > len(heard))
        await nodes.start("late-again", Role.CLIENT, shards="3", peers=(client,), beat_s=0.1)
        async with asyncio.timeout(HANG_S):
            await nodes.tasks["second"]
    finally:
        await nodes.close()
    assert_clean(tmp_path / "nodes")


async def test_of_what_came_twice_the_copy_that_was_counted_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a body part is made again by another server, whose last bits are others."""
    await _resumed_after(CASE, tmp_path, monkeypatch, WINDOWS + 2)
    path = tmp_path / "mine" / "journal" / f"v{WINDOWS + 1:012d}.spills"
    meta, tensors = decode(_first_spill(path))
    other = encode(meta, {name: tensor * 1.5 for name, tensor in tensors.items()})
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + len(other).to_bytes(8, "little") + other + whole)
    straight = await in_process(CASE, tmp_path, run="straight")
    ran = await in_process(CASE, tmp_path, run="mine", resume=True)
    assert_equal(ran.weights, straight.weights)
    assert_clean(ran.folder)


def _first_spill(path: Path) -> bytes:
    segment = Segment(path, sealed=True)
    place, size = next(segment.frames())
    return segment.read(place, size)


async def test_where_versions_were_lost_the_run_has_another_id_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    await _resumed_after(CASE, tmp_path, monkeypatch, WINDOWS + 3)
    (tmp_path / "mine" / "journal" / f"v{WINDOWS + 1:012d}.spills").unlink()
    await _resumed_after(CASE, tmp_path, monkeypatch, WINDOWS + 4, resume=True)
    ran = await in_process(CASE, tmp_path, run="mine", resume=True)
    runs = [parse_cid(record["counted"][0]).run for record in ledger(ran.folder)]
    assert len(set(runs[: WINDOWS + 1])) == len(set(runs[WINDOWS + 1 :])) == 1
    assert runs[0] != runs[-1]
    assert_equal(ran.weights, straight.weights)
    found = audit(ran.folder)
    assert (found.faults, found.pending) == ([], 0)


async def test_a_corrupt_checkpoint_is_no_end_where_an_older_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = await in_process(CASE, tmp_path, run="straight")
    await _resumed_after(CASE, tmp_path, monkeypatch, 2 * WINDOWS + 1)
    (tmp_path / "mine" / "checkpoint" / "round-000002" / "master.safetensors").write_bytes(b"no tensors")
    ran = await in_process(CASE, tmp_path, run="mine", resume=True)
    assert_equal(ran.weights, straight.weights)


async def test_training_that_was_to_end_early_ends_there_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(replace(CASE, rounds=6).job(), evaluate_every=1, stop_after=2)

    async def run(name: str, **flags: Any) -> tuple[zsfl.Finished, list[int]]:
        async with zsfl.LocalCluster(job, in_process=True, runs=tmp_path, run=name, **flags) as cluster:
            rounds = [report.round async for report in cluster.train()]
        assert cluster.result is not None
        return cluster.result, rounds

    straight, rounds = await run("straight")
    assert straight.early
    keep_model = Progress.keep_model

    def end(self: Progress, state: Any) -> None:
        monkeypatch.setattr(Progress, "keep_model", keep_model)
        raise zsfl.RunFailed("ended on purpose")

    monkeypatch.setattr(Progress, "keep_model", end)
    with pytest.raises(zsfl.RunFailed, match="ended on purpose"):
        await run("mine")
    resumed, after = await run("mine", resume=True)
    assert (resumed.version, resumed.rounds, resumed.best_version) == (
        straight.version,
        straight.rounds,
        straight.best_version,
    )
    assert after == rounds
    ran, whole = (Ran(tmp_path / name, []) for name in ("mine", "straight"))
    assert_equal(ran.weights, whole.weights)


async def test_one_that_is_back_before_it_was_missed_finds_every_window_made(tmp_path: Path) -> None:
    """Its clients are in the middle of a window when they hear that another one has its address, and the same run."""
    stuck = asyncio.Event()

    def on_report(report: AnyReport) -> None:
        if isinstance(report, Waiting) and report.node == "aggregator" and "the steps of" in report.what:
            stuck.set()

    cluster = zsfl.LocalCluster(
        replace(CASE, rounds=10_000).job_file(tmp_path),
        run="mine",
        split_servers=1,
        runs=tmp_path,
        mdns=False,
        keep_alive=True,
        on_report=on_report,
        beat_s=0.2,
        lost_after_s=HANG_S,
        patience_s=HANG_S,
    )
    async with asyncio.timeout(2 * HANG_S), cluster:
        server = cluster.nodes["split-server-0"].pid
        assert server is not None
        os.kill(server, signal.SIGSTOP)
        try:
            training = asyncio.create_task(_reports(cluster))
            await stuck.wait()
            first = cluster.nodes["aggregator"]
            await cluster.kill("aggregator")
            await cluster.until(lambda: (now := cluster.nodes["aggregator"]) is not first and now.address)
        finally:
            os.kill(server, signal.SIGCONT)
        assert cluster.nodes["aggregator"].address == first.address
        assert await training == [1]
    straight = await in_process(replace(CASE, rounds=1), tmp_path, run="straight")
    assert_equal(Ran(tmp_path / "mine", []).weights, straight.weights)
    assert_clean(tmp_path / "mine")


async def _reports(cluster: zsfl.LocalCluster) -> list[int]:
    return [report.round async for report in cluster.train(1)]
