"""Split servers that come, go and crash while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.jobs import write_job
from helpers.ledger import ledger
from helpers.waiting import eventually

import zsfl
from zsfl.reports import AnyReport, RoundReport


async def test_servers_that_come_crash_and_leave_change_no_bit(tmp_path: Path) -> None:
    rounds: list[RoundReport] = []

    def on(report: AnyReport) -> None:
        if isinstance(report, RoundReport):
            rounds.append(report)

    async def more(count: int) -> list[set[str]]:
        """Who served in that many more rounds; the first two of them may have begun before."""
        seen = len(rounds)
        await eventually(lambda: len(rounds) >= seen + 2 + count)
        return [served(report) for report in rounds[seen + 2 :]]

    job = write_job(tmp_path, rounds=1_000_000)  # it ends when the test has seen enough, however slow the machine
    async with zsfl.LocalCluster(job, split_servers=2, runs=tmp_path, on_report=on) as cluster:
        training = cluster.train()
        await anext(training)
        await cluster.start_split_server("late")
        await eventually(lambda: "late" in served(rounds[-1]))
        await cluster.kill("split-server-0")
        assert not any("split-server-0" in servers for servers in await more(1))
        await cluster.stop("split-server-1")
        assert {server for servers in await more(1) for server in servers} == {"late"}
        await training.aclose()
    assert [report.round for report in rounds] == list(range(1, len(rounds) + 1))
    records = ledger(tmp_path / "tiny")
    quiet = zsfl.LocalCluster(job, split_servers=1, in_process=True, runs=tmp_path / "quiet")
    async with quiet:
        async for report in quiet.train():
            if report.version >= len(records):
                break
    undisturbed = ledger(tmp_path / "quiet" / "tiny")[: len(records)]
    assert [record["weights"] for record in records] == [record["weights"] for record in undisturbed]


def served(report: RoundReport) -> set[str]:
    """The servers that took steps of a round."""
    return {server for servers in report.serving.values() for server in servers}


@pytest.mark.parametrize(
    ("victims", "message"),
    [
        (("split-server-0", "split-server-1"), r"split-server-. was killed by signal 9, and there is no other"),
        (("client-1",), r"stood still for 5 s without the steps of client-1, which is gone"),
        (("aggregator",), r"aggregator was killed by signal 9"),
    ],
)
async def test_what_a_run_cannot_do_without(tmp_path: Path, victims: tuple[str, ...], message: str) -> None:
    async def run() -> None:
        async with zsfl.LocalCluster(write_job(tmp_path), runs=tmp_path, patience_s=5.0) as cluster:
            async for report in cluster.train(10_000):
                if report.round == 2:
                    for victim in victims:
                        await cluster.kill(victim)

    with pytest.raises(zsfl.RunFailed, match=message):
        await run()
