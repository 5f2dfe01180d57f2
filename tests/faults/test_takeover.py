"""Aggregators that stand by: one takes over when the one that leads is gone, and there is one history."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.exact import Ran, assert_equal, in_process
from helpers.jobs import patch_nodes
from helpers.ledger import ledger
from helpers.takeover import CASE, READY, Seen, cluster, folder_of, says, trained
from helpers.waiting import HANG_S

from zsfl.aggregator.audit import audit
from zsfl.ids import parse_cid


async def test_one_that_is_killed_is_succeeded_and_stands_by_when_it_is_back(tmp_path: Path) -> None:
    seen = Seen()
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, keep_alive=True) as nodes:
        await seen.wait_for(says(READY))
        rounds = await trained(nodes, 1)
        os.kill(nodes.nodes["aggregator"].pid or 0, signal.SIGSTOP)  # so that it is not back before it is succeeded
        await seen.wait_for(says("taking over"))
        await nodes.kill("aggregator")
        rounds += await trained(nodes, 2)
        await seen.wait_for(says("standing by standby-0"))
        await nodes.kill("standby-0")
        rounds += await trained(nodes, 1)
        last = folder_of(nodes)
    straight = await in_process(replace(CASE, rounds=rounds), tmp_path, run="straight")
    wanted = [record["weights"] for record in ledger(straight.folder)]
    for name in ("mine", "mine.standby-0"):
        records = ledger(tmp_path / name)
        assert [record["weights"] for record in records] == wanted[: len(records)]
    assert_equal(Ran(last, []).weights, straight.weights)
    found = audit(last)
    assert (found.faults, found.pending, found.versions) == ([], 0, len(wanted))
    epochs = [record["epoch"] for record in ledger(last)]
    assert epochs == sorted(epochs)
    assert epochs[-1] >= 2


@pytest.mark.parametrize("durability", ["process", "replica"])
async def test_one_that_was_stopped_and_wakes_adds_nothing(durability: str, tmp_path: Path) -> None:
    seen = Seen()
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, durability=durability) as nodes:
        await seen.wait_for(says(READY))
        rounds = await trained(nodes, 1)
        training = asyncio.create_task(trained(nodes, 6))
        stopped = nodes.nodes["aggregator"].pid or 0
        os.kill(stopped, signal.SIGSTOP)
        await seen.wait_for(says("taking over"))
        os.kill(stopped, signal.SIGCONT)
        rounds += await training
        await seen.wait_for(says("standing by standby-0"))
        rounds += await trained(nodes, 1)
    assert not seen.notes("no commit record")
    straight = await in_process(replace(CASE, rounds=rounds), tmp_path, run="straight")
    first, second = ledger(tmp_path / "mine"), ledger(tmp_path / "mine.standby-0")
    assert first == second[: len(first)]
    assert [record["weights"] for record in second] == [record["weights"] for record in ledger(straight.folder)]
    found = audit(tmp_path / "mine.standby-0")
    assert (found.faults, found.pending) == ([], 0)
    if durability == "replica":  # nothing was lost, so that nothing was made under another id
        assert len({parse_cid(cid).run for record in second for cid in record["counted"]}) == 1


async def test_without_most_clients_nobody_takes_over_unless_told_so(tmp_path: Path) -> None:
    seen = Seen()
    # Long enough that nobody who is there is taken for gone.
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, keep_alive=True, lost_after_s=4.0) as nodes:
        await seen.wait_for(says(READY))
        rounds = await trained(nodes, 1)
        clients = [nodes.nodes[f"client-{shard}"].pid or 0 for shard in (0, 1)]
        leader = nodes.nodes["aggregator"].pid or 0
        for pid in (*clients, leader):
            os.kill(pid, signal.SIGSTOP)
        await seen.wait_for(says("consent of most clients to take over (2 of 4 shards, 3 are needed)"))
        assert not seen.notes("taking over")
        for pid in (*clients, leader):
            os.kill(pid, signal.SIGCONT)
        rounds += await trained(nodes, 1)
        last = folder_of(nodes)
    straight = await in_process(replace(CASE, rounds=rounds), tmp_path, run="straight")
    assert_equal(Ran(last, []).weights, straight.weights)


FULL_DISK = """
import errno, os
_sync = os.fdatasync


def sync(file):
    if "/mine.standby-0/" in os.readlink(f"/proc/self/fd/{file}") and os.path.exists(full):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    _sync(file)


os.fdatasync = sync
"""
SLOW_DISK = """
import os, time
_sync = os.fdatasync


def slow(file):
    _sync(file)
    path = os.readlink(f"/proc/self/fd/{file}")
    if path.endswith("/mine/ledger.jsonl") and os.path.exists(slow_once):
        os.unlink(slow_once)
        time.sleep(1.5)


os.fdatasync = slow
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
async def test_a_record_that_takes_the_disk_longer_than_a_lease_is_written_once(tmp_path: Path) -> None:
    seen, slow_once = Seen(), tmp_path / "slow"
    nodes = cluster(tmp_path, seen, durability="power")
    patch_nodes(tmp_path / "exact.py", SLOW_DISK, slow_once=slow_once)
    async with asyncio.timeout(2 * HANG_S), nodes:
        await seen.wait_for(says(READY))
        rounds = await trained(nodes, 1)
        slow_once.touch()
        rounds += await trained(nodes, 1)
        assert not slow_once.exists()
        last = folder_of(nodes)
    straight = await in_process(replace(CASE, rounds=rounds), tmp_path, run="straight")
    assert [record["weights"] for record in ledger(last)] == [record["weights"] for record in ledger(straight.folder)]
    found = audit(last)
    assert (found.faults, found.pending) == ([], 0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
async def test_a_standby_whose_disk_is_full_says_so_and_goes_on_once_it_has_room(tmp_path: Path) -> None:
    seen, full = Seen(), tmp_path / "full"
    nodes = cluster(tmp_path, seen, durability="power")
    patch_nodes(tmp_path / "exact.py", FULL_DISK, full=full)
    async with asyncio.timeout(2 * HANG_S), nodes:
        await seen.wait_for(says(READY))
        rounds = await trained(nodes, 1)
        full.touch()
        rounds += await trained(nodes, 1)
        await seen.wait_for(says("mine.standby-0 cannot be written: No space left on device; make room there"))
        full.unlink()
        rounds += await trained(nodes, 1)
        await nodes.kill("aggregator")
        rounds += await trained(nodes, 1)
    straight = await in_process(replace(CASE, rounds=rounds), tmp_path, run="straight")
    weights = [record["weights"] for record in ledger(tmp_path / "mine.standby-0")]
    assert weights == [record["weights"] for record in ledger(straight.folder)]
    found = audit(tmp_path / "mine.standby-0")
    assert (found.faults, found.pending) == ([], 0)
