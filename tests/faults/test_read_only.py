"""Folders that become read-only under nodes at work, or files that cannot be opened: they say so, wait, and go on as if
nothing had happened.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.descriptors import none_left
from helpers.disks import read_only
from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.ledger import ledger
from helpers.waiting import HANG_S

import zsfl
from zsfl import waits
from zsfl.aggregator.audit import audit
from zsfl.reports import AnyReport, Failed, Note, Waiting

CASE = Case(optimizer="adam", dropout=0.2, rounds=10_000)
REFUSED = r"(Read-only file system|Permission denied)"


class Told:
    """What nodes say, and when it is said."""

    def __init__(self) -> None:
        self.words: list[tuple[str, str]] = []
        self._more = asyncio.Event()

    def on(self, report: AnyReport) -> None:
        """For `LocalCluster(on_report=...)`."""
        match report:
            case Note() | Failed():
                self.words.append((report.node, report.message))
            case Waiting():
                self.words.append((report.node, report.what))
            case _:
                pass
        self._more.set()

    def has(self, node: str, pattern: str) -> bool:
        """Whether this node said the like."""
        return any(name == node and re.search(pattern, words) for name, words in self.words)

    async def until(self, true: Callable[[], object]) -> None:
        """Returns once `true` is, which is looked at whenever something is said."""
        async with asyncio.timeout(HANG_S):
            while not true():
                self._more.clear()
                await self._more.wait()


async def _rounds(cluster: zsfl.LocalCluster, rounds: int) -> int:
    return len([report async for report in cluster.train(rounds)])


async def assert_as_if_nothing_had_happened(runs: Path, rounds: int) -> None:
    """The run `mine`, of so many rounds."""
    straight = await in_process(replace(CASE, rounds=rounds), runs, run="straight")
    assert_equal(Ran(runs / "mine", []).weights, straight.weights)
    found = audit(runs / "mine")
    assert (found.faults, found.pending, found.dropped) == ([], 0, 0)
    assert [path for path in spills_left(runs) if path.name != ".lock"] == []


@pytest.mark.parametrize(
    ("node", "path", "advice"),
    [
        (
            "split-server-0",
            "spills/mine/split-server-0",
            f"steps are refused until their spills can be written: cannot write spills in .*: {REFUSED}; check that it",
        ),
        ("client-1", "spills/mine/client-1", f"a disk: cannot write spills in .*: {REFUSED}; check that it exists and"),
        ("aggregator", "mine/journal", f"a disk: cannot keep the contributions .*: {REFUSED}; check that disk"),
        (
            "aggregator",
            "mine/ledger.jsonl",
            rf"a disk: cannot write .*ledger\.jsonl \({REFUSED}\); check that the",
        ),
        ("aggregator", "mine/checkpoint", f"a disk: the weights cannot be saved in .*{REFUSED}.*; make room there or"),
        ("aggregator", "mine", f"a disk: cannot .*mine.*{REFUSED}.*check that"),
    ],
)
async def test_it_is_said_and_waited_for_and_nothing_is_lost(
    node: str, path: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "FIRST_WORD_S", 0.2)
    told = Told()
    cluster = zsfl.LocalCluster(
        CASE.job(), in_process=True, split_servers=1, runs=tmp_path, run="mine", beat_s=0.1, on_report=told.on
    )
    async with cluster:
        rounds = await _rounds(cluster, 1)
        with read_only(tmp_path / path):
            training = asyncio.create_task(_rounds(cluster, 2))
            await told.until(lambda: told.has(node, advice))
            assert not training.done()
        rounds += await training
        assert all(one.is_there for one in cluster.nodes.values())
    await assert_as_if_nothing_had_happened(tmp_path, rounds)


async def test_connections_that_take_all_file_descriptors_are_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "FIRST_WORD_S", 0.2)
    told = Told()
    cluster = zsfl.LocalCluster(
        CASE.job(), in_process=True, split_servers=1, runs=tmp_path, run="mine", beat_s=0.1, on_report=told.on
    )
    async with cluster:
        reports = cluster.train(5)
        await anext(reports)
        with none_left():
            await told.until(lambda: any("this process may open no more files" in said for _, said in told.words))
        rounds = 1 + len([report async for report in reports])
        assert all(one.is_there for one in cluster.nodes.values())
    await assert_as_if_nothing_had_happened(tmp_path, rounds)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("spills/mine/split-server-0", f"no split server took a step for 3 s.*: cannot write spills in .*: {REFUSED}"),
        ("spills/mine/client-1", f"client-1: cannot write spills in .*: {REFUSED}; check that it exists and is writ"),
        ("mine", rf"aggregator: cannot .*mine.*{REFUSED}.*\(version \d+ is kept in .*mine\)"),
    ],
)
async def test_one_that_stays_so_ends_the_run_which_a_resume_takes_up(path: str, message: str, tmp_path: Path) -> None:
    def cluster(**flags: Any) -> zsfl.LocalCluster:
        return zsfl.LocalCluster(
            CASE.job(), in_process=True, split_servers=1, runs=tmp_path, run="mine", beat_s=0.1, patience_s=3.0, **flags
        )

    async with cluster(keep_alive=True) as first:
        await _rounds(first, 1)
        with read_only(tmp_path / path), pytest.raises(zsfl.RunFailed, match=message):
            await _rounds(first, 1)
    async with cluster(resume=True) as second:
        await _rounds(second, 1)
    if any(record["without"] for record in ledger(tmp_path / "mine")):
        # The aggregator heard a client say goodbye before it was ended itself, and had gone on without.
        assert audit(tmp_path / "mine").faults == []
    else:
        await assert_as_if_nothing_had_happened(tmp_path, 2)


async def test_a_server_killed_there_is_not_started_over_and_over(tmp_path: Path) -> None:
    told = Told()
    cluster = zsfl.LocalCluster(
        CASE.job_file(tmp_path),
        split_servers=2,
        client_processes=1,
        runs=tmp_path,
        run="mine",
        mdns=False,
        keep_alive=True,
        beat_s=0.2,
        lost_after_s=1.0,
        on_report=told.on,
    )
    server, folder = "split-server-0", tmp_path / "spills" / "mine" / "split-server-0"
    async with cluster:
        rounds = await _rounds(cluster, 1)
        with read_only(folder):
            await cluster.kill(server)
            advice = f"cannot write in {folder}: {REFUSED}; choose another folder with --runs"
            await told.until(lambda: told.has(server, advice) and cluster.nodes[server].exit_code is not None)
            rounds += await _rounds(cluster, 1)
            assert len([words for name, words in told.words if name == server and re.search(advice, words)]) == 1
        await cluster.restart(server)
        rounds += await _rounds(cluster, 1)
    await assert_as_if_nothing_had_happened(tmp_path, rounds)


async def test_a_run_whose_first_checkpoint_cannot_be_written_does_not_begin(tmp_path: Path) -> None:
    """Later ones are waited for; of a run that has not begun nothing is lost, and somebody is there to hear of it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoint").write_text("a file where the folder is to be")
    what = r"the run cannot begin: .*mine/checkpoint.*; make room there or choose another folder with --runs"
    with pytest.raises(zsfl.RunFailed, match=what):
        await in_process(CASE, tmp_path, run="mine")
