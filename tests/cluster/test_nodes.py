"""The programs in `nodes/`, started by path as a person would."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import zmq.asyncio
from helpers.gated import gated_job
from helpers.jobs import write_job
from helpers.waiting import until

import zsfl
from zsfl.dashboard.progress import plain_line
from zsfl.ids import Role
from zsfl.reports import AnyReport, Finished, Ready, RoundReport, Waiting, from_line
from zsfl.roles import run_role
from zsfl.settings import NodeSettings

NODES = Path(__file__).resolve().parents[2] / "nodes"


@asynccontextmanager
async def program(
    name: str, *flags: str, cwd: Path, env: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running program of `nodes/`, which does not outlive the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(NODES / name), *flags, cwd=cwd, env=env, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def reports(process: asyncio.subprocess.Process) -> list[AnyReport]:
    """Everything a program said until it ended."""
    said, _ = await process.communicate()
    return [from_line(line) for line in said.splitlines()]


async def test_the_programs_find_each_other_and_finish(tmp_path: Path) -> None:
    alone = {"ZSFL_CLUSTER": secrets.token_hex(4), "ZSFL_CLIENTS": "2"}  # what else runs here is none of ours
    place = {"cwd": tmp_path, "env": {**os.environ, **alone}}
    async with (
        program("client.py", "--shard", "0", **place) as first,
        program("client.py", "--shard", "1", **place) as second,
        program("split_server.py", **place) as server,
        program("aggregator.py", "--rounds", "2", **place) as aggregator,
    ):
        everybody = (first, second, server, aggregator)
        said = await asyncio.gather(*(reports(process) for process in everybody))
    assert [process.returncode for process in everybody] == [0, 0, 0, 0]
    rounds = [report for report in said[3] if isinstance(report, RoundReport)]
    assert [report.round for report in rounds] == [1, 2]
    assert set(rounds[-1].serving) == {"client-0", "client-1"}
    (finished,) = [report for report in said[3] if isinstance(report, Finished)]
    assert (tmp_path / finished.folder / "model.safetensors").is_file()


async def test_a_node_whose_data_takes_long_to_load_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsfl.waits.FIRST_WORD_S", 0.0)
    path, gate = gated_job(tmp_path, '"exact"')
    gate.close()
    told: asyncio.Queue[AnyReport] = asyncio.Queue()
    context = zmq.asyncio.Context()
    settings = NodeSettings(runs=tmp_path, mdns=False, shards="0", name="slow")
    client = run_role(Role.CLIENT, zsfl.load_job(path), settings, told.put_nowait, context=context)
    running = asyncio.create_task(client)
    try:
        await gate.is_reached()
        first = await until(told.get())
        assert isinstance(first, Waiting)
        assert (plain_line(first) or "").startswith("slow waits for its model and data to be loaded (")
        gate.open()
        while not isinstance(await until(told.get()), Ready):
            pass
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        context.destroy(linger=0)


@pytest.mark.parametrize("role", [Role.CLIENT, Role.SPLIT_SERVER, Role.AGGREGATOR, Role.STANDBY])
async def test_a_node_that_is_cancelled_in_its_first_moments_leaves_no_socket_open(tmp_path: Path, role: Role) -> None:
    job = zsfl.load_job(write_job(tmp_path))
    for turns in (0, 1, 2, 3, 5, 10, 30, 100):
        context, ready = zmq.asyncio.Context(), asyncio.Event()

        def told(report: AnyReport, ready: asyncio.Event = ready) -> None:
            if isinstance(report, Ready):
                ready.set()

        settings = NodeSettings(
            runs=tmp_path / f"{turns}", mdns=False, name="brief", shards="0" if role is Role.CLIENT else ""
        )
        running = asyncio.create_task(run_role(role, job, settings, told, context=context))
        await until(ready.wait())
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await until(asyncio.to_thread(context.term))  # which waits for every socket to be closed
