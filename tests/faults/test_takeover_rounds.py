"""Whoever takes over trains as many rounds as the run was to have, also after it was started again."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from helpers.exact import Case
from helpers.ledger import ledger, versions
from helpers.processes import Command, command
from helpers.waiting import HANG_S, eventually

from zsfl.aggregator.audit import audit
from zsfl.aggregator.standing import Standing
from zsfl.ids import Role
from zsfl.reports import Finished, RoundReport, reports_in

CASE = Case(sizes=(200, 200), rounds=1)
ROUNDS = 3
HELD = """
import dataclasses, pathlib, time
from torch.utils.data import TensorDataset

ends_s = time.monotonic() + {hang_s}  # of a test that failed


class Held(TensorDataset):
    # A subclass is read sample by sample.
    read = 0

    def __getitem__(self, index):
        Held.read += 1
        while Held.read > {first} and not pathlib.Path({go!r}).exists() and time.monotonic() < ends_s:
            time.sleep(0.005)
        return super().__getitem__(index)


def held(shard, shards, data=job.data):
    train, test = data(shard, shards)
    return Held(*train.tensors), test


job = dataclasses.replace(job, data=held)
"""
"""Nobody can read the samples of the second round before the test lets them."""


async def test_a_standby_that_was_started_again_alone_trains_as_many_rounds_as_were_ordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSFL_LOST_AFTER_S", "1")
    monkeypatch.setenv("ZSFL_BEAT_S", "0.2")
    job, copy, go = CASE.job_file(tmp_path), tmp_path / "mine.standby", tmp_path / "go"
    with job.open("a") as file:
        file.write(HELD.format(first=CASE.sizes[0], go=str(go), hang_s=2 * HANG_S))
    peers: list[str] = []
    async with asyncio.timeout(2 * HANG_S), AsyncExitStack() as stack:

        async def start(role: Role, name: str, *flags: str) -> Command:
            """It knows all that were started before."""
            known = [flag for peer in peers for flag in ("--peer", peer)]
            where = ("--runs", tmp_path, "--run", "mine", "--name", name, "--no-mdns")
            node = await stack.enter_async_context(command("node", role, job, *where, *known, *flags, cwd=tmp_path))
            peers.append(await node.address())
            return node

        leader = await start(Role.AGGREGATOR, "leader", "--rounds", str(ROUNDS))
        standby = await start(Role.STANDBY, "standby")
        await start(Role.SPLIT_SERVER, "server")
        for shard in ("0", "1"):
            await start(Role.CLIENT, f"client-{shard}", "--shard", shard)
        await eventually(lambda: versions(copy) and Standing.of(copy).shared)
        for node in (leader, standby):
            node.signal(signal.SIGKILL)
            await node.ended()
        assert ledger(copy)[-1]["round"] < ROUNDS - 1, "the run was over before it was disturbed"
        rounds = [report for report in reports_in(copy) if isinstance(report, RoundReport)]
        before_s = sum(report.seconds for report in rounds[:-1])  # the last may be made again
        go.touch()
        alone = await start(Role.STANDBY, "standby")
        assert await alone.ended() == 0
    [finished] = [report for report in alone.reports() if isinstance(report, Finished)]
    assert finished.seconds > before_s
    assert ledger(copy)[-1]["round"] == ROUNDS - 1
    assert audit(copy).faults == []
