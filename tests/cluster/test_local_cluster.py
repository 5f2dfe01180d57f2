"""LocalCluster as its users see it: what it yields, what it leaves, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from helpers.jobs import write_job
from helpers.processes import MARK, marked
from helpers.waiting import eventually

import zsfl
from zsfl.lane import compute
from zsfl.reports import AnyReport

DIGITS = Path(zsfl.__file__).with_name("demo.py")


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Every process that the test starts carries it."""
    monkeypatch.setenv(MARK, str(tmp_path))
    return str(tmp_path)


def _held() -> tuple[int, int, int]:
    """Descriptors, threads and children of this process."""
    me = psutil.Process()
    return me.num_fds(), threading.active_count(), len(me.children(recursive=True))


@asynccontextmanager
async def _nothing_left(mark: str) -> AsyncIterator[None]:
    await compute(int)  # the thread that torch runs in stays
    before, tasks = _held(), asyncio.all_tasks()
    yield
    await eventually(lambda: not marked(mark))
    await eventually(lambda: asyncio.all_tasks() == tasks)
    await eventually(lambda: _held()[0] <= before[0] and _held()[1:] == before[1:])


async def test_a_cluster_of_processes_trains_and_leaves_its_results_whatever_its_block_raises(
    tmp_path: Path, mark: str
) -> None:
    class Boom(Exception):
        pass

    cluster = zsfl.LocalCluster(DIGITS, clients=3, split_servers=2, runs=tmp_path)
    reports: list[zsfl.RoundReport] = []

    async def run() -> None:
        async with cluster:
            async for report in cluster.train(rounds=2):
                reports.append(report)
            raise Boom

    async with _nothing_left(mark):
        with pytest.raises(Boom):
            await run()
    pids = {node.pid for node in cluster.nodes.values()}
    assert len(pids - {os.getpid()}) == 6
    assert [report.round for report in reports] == [1, 2]
    assert all(report.accuracy is not None for report in reports)
    assert cluster.result is not None
    folder = Path(cluster.result.folder)
    left = {path.name for path in folder.iterdir()}
    assert {"metrics.jsonl", "plot.png", "model.safetensors", "load_model.py", "settings.json"} <= left


async def test_training_goes_on_where_the_last_call_was_left(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    async with zsfl.LocalCluster(job, split_servers=1, runs=tmp_path / "runs", in_process=True) as cluster:
        assert [report.round async for report in cluster.train(rounds=2)] == [1, 2]
        async for report in cluster.train(rounds=3):
            assert report.round == 3
            break
        assert [report.round async for report in cluster.train(rounds=1)] == [6]


@pytest.mark.parametrize("moment", ["starting", "training"])
async def test_cancelled_at_any_moment_nothing_is_left(tmp_path: Path, mark: str, moment: str) -> None:
    came = asyncio.Event()

    async def run() -> None:
        cluster = zsfl.LocalCluster(
            write_job(tmp_path, rounds=10_000), runs=tmp_path / "runs", on_report=lambda _: starting.set()
        )
        async with cluster:
            async for _ in cluster.train():
                came.set()

    starting = asyncio.Event()
    async with _nothing_left(mark):
        task = asyncio.create_task(run())
        await (starting if moment == "starting" else came).wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cluster_of_in_process_nodes_leaves_nothing(tmp_path: Path, mark: str) -> None:
    job = write_job(tmp_path)

    async with _nothing_left(mark), zsfl.LocalCluster(job, runs=tmp_path / "runs", in_process=True) as cluster:
        assert [report.round async for report in cluster.train()] == [1, 2, 3]


async def test_a_job_object_runs_in_process_only(tmp_path: Path) -> None:
    job = zsfl.load_job(write_job(tmp_path))
    async with zsfl.LocalCluster(job, runs=tmp_path, in_process=True) as cluster:
        assert [report.round async for report in cluster.train()] == [1, 2, 3]
    with pytest.raises(zsfl.ConfigError, match=r"real processes is a file.*in_process=True"):
        async with zsfl.LocalCluster(job, runs=tmp_path):
            pass


async def test_two_clusters_of_one_job_do_not_mix(tmp_path: Path) -> None:
    job, settings = write_job(tmp_path), {"split_servers": 1, "client_processes": 1, "runs": tmp_path, "mdns": True}
    async with (
        zsfl.LocalCluster(job, in_process=True, **settings) as one,  # type: ignore[arg-type]
        zsfl.LocalCluster(job, **settings) as other,  # type: ignore[arg-type]
    ):
        for cluster in (one, other):
            assert [report.round async for report in cluster.train()] == [1, 2, 3]
    assert one.result is not None
    assert other.result is not None
    assert one.result.folder != other.result.folder


async def test_names_clash_and_unknown_names_are_said(tmp_path: Path) -> None:
    async with zsfl.LocalCluster(write_job(tmp_path), split_servers=1, runs=tmp_path, in_process=True) as cluster:
        with pytest.raises(zsfl.ConfigError, match="there is a node split-server-0 already"):
            await cluster.start_split_server("split-server-0")
        with pytest.raises(zsfl.ConfigError, match="there is no node nobody; there are aggregator"):
            await cluster.stop("nobody")
        assert await cluster.start_split_server() == "split-server-1"
        assert [report.round async for report in cluster.train()] == [1, 2, 3]


async def test_outside_its_block_a_cluster_says_so(tmp_path: Path) -> None:
    cluster = zsfl.LocalCluster(write_job(tmp_path), runs=tmp_path, in_process=True)
    with pytest.raises(zsfl.RunFailed, match="use it inside its `async with` block"):
        await anext(cluster.train())
    async with cluster:
        training = cluster.train(rounds=10_000)
        await anext(training)
    with pytest.raises(zsfl.RunFailed, match="use it inside its `async with` block"):
        async for _ in training:
            pass


async def test_an_error_in_on_report_comes_out_of_the_cluster(tmp_path: Path) -> None:
    def on_report(report: AnyReport) -> None:
        if isinstance(report, zsfl.RoundReport):
            raise ZeroDivisionError("by the caller")

    async def run() -> None:
        cluster = zsfl.LocalCluster(write_job(tmp_path), runs=tmp_path, in_process=True, on_report=on_report)
        async with cluster:
            async for _ in cluster.train():
                pass

    with pytest.raises(ZeroDivisionError):
        await run()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split_servers": 0}, zsfl.ConfigError, "at least one split server, not 0"),
        ({"clients": 0}, zsfl.ConfigError, "at least one client, not 0"),
        ({"client_processes": 0}, zsfl.ConfigError, "at least one process, not 0"),
        ({"slots": 0}, zsfl.ConfigError, "slots is 0: expected a whole number from 1"),
    ],
)
async def test_settings_that_will_not_do(
    tmp_path: Path, change: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        async with zsfl.LocalCluster(write_job(tmp_path), runs=tmp_path, in_process=True, **change):  # type: ignore[arg-type]
            pass


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(zsfl.ConfigError, match=r"cannot write to .*runs/logs: .*--runs"):
        async with zsfl.LocalCluster(write_job(tmp_path), runs=tmp_path / "runs"):
            pass


async def test_a_job_that_prints_is_no_disturbance(tmp_path: Path, mark: str) -> None:
    job = write_job(tmp_path)
    job.write_text(job.read_text() + "\nprint('no line end', end='', flush=True)\n_model = model\n"
                   "def model():\n    print('{', end='', flush=True)\n    return _model()\n"
                   "import dataclasses\njob = dataclasses.replace(job, model=model)\n")  # fmt: skip
    settings = {"split_servers": 1, "client_processes": 1, "runs": tmp_path / "runs"}
    async with _nothing_left(mark), zsfl.LocalCluster(job, **settings) as cluster:  # type: ignore[arg-type]
        assert [report.round async for report in cluster.train()] == [1, 2, 3]


async def test_many_clients_share_a_few_processes(tmp_path: Path) -> None:
    job = write_job(tmp_path, shards=7)
    async with zsfl.LocalCluster(job, client_processes=2, split_servers=1, runs=tmp_path) as cluster:
        assert [name for name in cluster.nodes if name.startswith("client")] == ["client-0-2", "client-3-6"]
        reports = [report async for report in cluster.train(rounds=1)]
    assert reports[0].samples == sum(40 + shard for shard in range(7))
