"""Many shards in one process, and what a cluster leaves behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
from helpers.exact import Case, in_process
from helpers.waiting import eventually

from zsfl.lane import compute


async def test_more_shards_in_one_client_than_a_connection_carries_and_nothing_is_left(tmp_path: Path) -> None:
    await in_process(Case(sizes=(2,), rounds=1), tmp_path / "first")  # starts what stays for good
    await compute(int)
    tasks, descriptors = asyncio.all_tasks(), psutil.Process().num_fds()
    crowd = Case(sizes=(2,), copies=300, rounds=1, tested=1)
    ran = await in_process(crowd, tmp_path / "crowd", slots=4, client_processes=1)
    assert [report.steps for report in ran.reports] == [300]
    await eventually(lambda: asyncio.all_tasks() <= tasks)
    await eventually(lambda: psutil.Process().num_fds() <= descriptors)
