"""Clients that stop, crash, leave and come back while a run goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.exact import Case, assert_equal, in_process, spills_left
from helpers.jobs import unhurried
from helpers.ledger import ledger, shards
from helpers.processes import Command, command
from helpers.rounds import Rounds
from helpers.waiting import eventually
from safetensors.torch import load_file

import zsfl
from zsfl.reports import ADVICE, AnyReport, Note, RoundReport

RETURN_S = 4.0
LONG_S = 20.0
CASE = Case(sizes=(13, 7, 20, 10), batches="proportional", batch_size=6)
QUICK: dict[str, Any] = {"mdns": False, "split_servers": 1, "lost_after_s": 1.0, "beat_s": 0.2}


class Watch:
    """Who was said to be gone, how to start a client again, and the rounds."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.commands: list[str] = []
        self.rounds: list[RoundReport] = []

    def on(self, report: AnyReport) -> None:
        """For `LocalCluster(on_report=...)`."""
        if isinstance(report, Note) and " is gone: " in report.message:
            self.gone.add(report.message.split()[0])
        if isinstance(report, Note) and report.level == ADVICE:
            self.commands.append(report.message.splitlines()[-1])
        if isinstance(report, RoundReport):
            self.rounds.append(report)


async def until_without(rounds: Rounds, client: str, watch: Watch) -> None:
    """Until it is known that this client is gone, and three rounds in a row ended without its steps."""
    without = 0
    while without < 3 or client not in watch.gone:
        [report] = await rounds.until(lambda _: True)
        without = 0 if client in report.serving else without + 1


@pytest.mark.parametrize("mode", [zsfl.Elastic(quorum=0.5), zsfl.Async(), zsfl.Exact(return_s=RETURN_S)])
async def test_clients_that_are_stopped_or_killed_are_done_without_until_they_are_back(
    mode: zsfl.Elastic | zsfl.Async | zsfl.Exact, tmp_path: Path
) -> None:
    watch = Watch()
    job = unhurried(replace(CASE, mode=mode).job_file(tmp_path))
    async with zsfl.LocalCluster(job, runs=tmp_path, on_report=watch.on, **QUICK) as cluster:
        rounds = Rounds(cluster)
        await rounds.until_with("client-1")
        pid = cluster.nodes["client-1"].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        try:
            await until_without(rounds, "client-1", watch)
            if isinstance(mode, zsfl.Async):  # so long that nobody asks for it any more every other second
                await rounds.until(lambda _: time.monotonic() > stopped_s + LONG_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        await rounds.until_with("client-1")
        await cluster.kill("client-2")
        await until_without(rounds, "client-2", watch)
        await cluster.start_client("2")
        await rounds.until_with("client-2")
    records = ledger(tmp_path / "exact")
    if isinstance(mode, zsfl.Exact):
        halted = next(version for version, record in enumerate(records) if 1 not in shards(record))
        assert shards(records[halted - 1]) == {0, 1, 2, 3}
        assert shards(records[halted]) == {0, 2, 3}
        assert next(report for report in watch.rounds if report.version > halted).seconds >= RETURN_S


async def test_exact_mode_waits_for_a_return_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    case = replace(CASE, dropout=0.2, optimizer="adam", rounds=15)
    quiet = await in_process(case, tmp_path, run="quiet")
    settings = {**QUICK, "lost_after_s": 4.0}  # nobody else is to be taken for gone
    watch = Watch()
    cluster = zsfl.LocalCluster(case.job_file(tmp_path), runs=tmp_path, run="struck", on_report=watch.on, **settings)
    by_hand: Command | None = None
    async with cluster, AsyncExitStack() as stack:
        async for report in cluster.train():
            if report.round == 1:
                pid = cluster.nodes["client-2"].pid
                assert pid is not None
                if sys.platform == "linux":
                    assert Path(f"/proc/{pid}/cmdline").read_text().startswith("zsfl node client --name client-2 ")
                os.kill(pid, signal.SIGKILL)
                await eventually(lambda: watch.commands)
                zsfl_, *again = shlex.split(watch.commands[0])
                assert (zsfl_, again[:2]) == ("zsfl", ["node", "client"])
                by_hand = await stack.enter_async_context(command(*again, cwd=tmp_path))
            if report.round == 3:
                pid = cluster.nodes["client-1"].pid
                assert pid is not None
                os.kill(pid, signal.SIGSTOP)
                try:
                    await eventually(lambda: "client-1" in watch.gone)
                finally:
                    os.kill(pid, signal.SIGCONT)
        assert by_hand is not None
        by_hand.signal(signal.SIGINT)
        assert await by_hand.ended() == 0, by_hand.text
        assert "has left; the run goes on without its shards" in by_hand.text
    assert watch.gone == {"client-1", "client-2"}
    assert_equal(load_file(tmp_path / "struck" / "model.safetensors"), quiet.weights)
    assert all(shards(record) == {0, 1, 2, 3} for record in ledger(tmp_path / "struck"))
    assert spills_left(tmp_path) == []


async def test_the_last_client_cannot_be_done_without(tmp_path: Path) -> None:
    job = replace(CASE, mode="elastic").job_file(tmp_path)

    async def run() -> None:
        async with zsfl.LocalCluster(job, runs=tmp_path, client_processes=1, **QUICK) as cluster:
            async for report in cluster.train(10_000):
                if report.round == 2:
                    await cluster.kill("client-0-3")

    with pytest.raises(zsfl.RunFailed, match="client-0-3 was killed by signal 9, and there is no other client"):
        await run()


@pytest.mark.parametrize("victim", ["split-server", "client"])
async def test_a_merged_batch_whose_server_or_client_is_killed_is_made_anew_with_the_same_result(
    victim: str, tmp_path: Path
) -> None:
    """Batch norm over the merged batch, dropout and a schedule: what is made anew draws and steps the same."""
    case = replace(CASE, norm=True, batch_norm="merged", dropout=0.3, rounds=12, mode=zsfl.Exact(return_s=1000.0))
    quiet = await in_process(case, tmp_path, run="quiet")
    settings = {**QUICK, "split_servers": 2, "lost_after_s": 1.0}
    cluster = zsfl.LocalCluster(case.job_file(tmp_path), runs=tmp_path, run="struck", **settings)
    async with cluster:
        async for report in cluster.train():
            if report.round in (2, 5) and victim == "client":
                await cluster.kill("client-1")
                await cluster.start_client("1")
            if report.round == 3 and victim == "split-server":
                await cluster.kill("split-server-0")
    assert_equal(load_file(tmp_path / "struck" / "model.safetensors"), quiet.weights)
    records = ledger(tmp_path / "struck")
    assert [shards(record) for record in records] == len(records) * [{0, 1, 2, 3}]
    assert len(records) == len(ledger(tmp_path / "quiet"))
