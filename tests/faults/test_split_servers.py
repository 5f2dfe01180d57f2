"""Split servers that come, go and crash while a run goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.jobs import write_job
from helpers.waiting import eventually

import zsfl
from zsfl.reports import AnyReport, RoundReport, WindowReport

ROUNDS = 40


class Watch:
    """Which server took whose last step, and when that was last heard of."""

    def __init__(self) -> None:
        self.last_s: dict[str, float] = {}
        self.rounds: list[RoundReport] = []

    def on(self, report: AnyReport) -> None:
        """For `LocalCluster(on_report=...)`."""
        if isinstance(report, WindowReport):
            self.last_s |= dict.fromkeys(report.serving.values(), time.monotonic())
        if isinstance(report, RoundReport):
            self.rounds.append(report)
            served = {server for servers in report.serving.values() for server in servers}
            self.last_s |= dict.fromkeys(served, time.monotonic())


async def _weights(cluster: zsfl.LocalCluster, meanwhile: Callable[[], object]) -> bytes:
    """The bytes of the model after `ROUNDS` rounds, during which `meanwhile` happens."""

    async def train() -> None:
        async for _ in cluster.train(ROUNDS):
            pass

    async with asyncio.TaskGroup() as tasks:
        training = tasks.create_task(train())
        await meanwhile()  # type: ignore[misc]
        await training
    assert cluster.result is not None
    return (Path(cluster.result.folder) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the same run ends with when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")

    async def run() -> bytes:
        cluster = zsfl.LocalCluster(write_job(folder), split_servers=1, in_process=True, runs=folder)
        async with cluster:
            return await _weights(cluster, lambda: asyncio.sleep(0))

    return asyncio.run(run())


async def test_servers_that_come_crash_and_leave_change_no_bit(tmp_path: Path, undisturbed: bytes) -> None:
    watch = Watch()

    async def meanwhile() -> None:
        await eventually(lambda: len(watch.rounds) > 1)
        await cluster.start_split_server("late")
        ready_s = time.monotonic()
        await eventually(lambda: "late" in watch.last_s)
        assert watch.last_s["late"] - ready_s < 2
        await cluster.kill("split-server-0")
        killed_s = time.monotonic()
        seen = len(watch.rounds)
        await eventually(lambda: len(watch.rounds) > seen + 2)
        assert watch.last_s["split-server-0"] - killed_s < 3
        await cluster.stop("split-server-1")
        seen = len(watch.rounds)
        await eventually(lambda: len(watch.rounds) > seen + 1)
        assert {server for servers in watch.rounds[-1].serving.values() for server in servers} == {"late"}

    cluster = zsfl.LocalCluster(write_job(tmp_path), split_servers=2, runs=tmp_path, on_report=watch.on)
    async with cluster:
        weights = await _weights(cluster, meanwhile)
    assert [report.round for report in watch.rounds] == list(range(1, ROUNDS + 1))
    assert weights == undisturbed


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
