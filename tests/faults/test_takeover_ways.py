"""Takeovers in every mode, by one alone or by a person, and from aggregators that leave in an orderly way."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio
from helpers.jobs import patch_nodes
from helpers.ledger import ledger, shards, versions
from helpers.rounds import Rounds
from helpers.takeover import (
    CASE,
    LEASE_S,
    READY,
    Seen,
    assert_one_history,
    assert_undisturbed,
    cluster,
    folder_of,
    led_by,
    says,
    trained,
)
from helpers.waiting import HANG_S, eventually

import zsfl
from zsfl.aggregator.audit import audit
from zsfl.aggregator.standing import Standing
from zsfl.ids import Role
from zsfl.learning.job import load_job
from zsfl.reports import RoundReport
from zsfl.roles import run_role
from zsfl.settings import NODE_FLAGS, add_flags, load_settings

LED, COPY = "mine", "mine.standby-0"


def parsed(flags: str) -> dict[str, Any]:
    """What these flags of an aggregator mean."""
    parser = argparse.ArgumentParser()
    add_flags(parser, NODE_FLAGS[Role.AGGREGATOR])
    return {name: value for name, value in vars(parser.parse_args(flags.split())).items() if value is not None}


@pytest.mark.parametrize("mode", ["elastic", "async"])
async def test_in_modes_that_wait_for_nobody_there_is_one_history_too(mode: str, tmp_path: Path) -> None:
    seen, rounds = Seen(), 15
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, replace(CASE, mode=mode)) as nodes:
        await seen.wait_for(says(READY))
        training = asyncio.create_task(trained(nodes, rounds))
        await eventually(lambda: versions(tmp_path / COPY), 30)
        begun_s = time.monotonic()
        await nodes.kill("aggregator")
        killed_s = time.monotonic()
        assert await training == rounds
        assert nodes.result is not None
        assert nodes.result.seconds > killed_s - begun_s, "not of the second one alone"
        assert folder_of(nodes) == tmp_path / COPY
    records = ledger(tmp_path / COPY)
    assert_one_history(ledger(tmp_path / LED), records)
    assert records[-1]["round"] == rounds - 1
    assert audit(tmp_path / COPY).faults == []


async def test_with_half_of_the_clients_one_takes_over_alone_where_it_is_told_to(tmp_path: Path) -> None:
    """Two machines, and one of them is gone, with the aggregator and half of the clients."""
    seen, case = Seen(), replace(CASE, sizes=(13, 18), mode=zsfl.Exact(return_s=0.5))
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, case, takeover="always") as nodes:
        await seen.wait_for(says(READY))
        rounds = Rounds(nodes)
        await rounds.until(led_by("aggregator"))
        for name in ("aggregator", "split-server-0", "client-0"):
            await nodes.kill(name)
        await rounds.until(led_by("standby-0"))
        assert seen.notes("going on without a client for shard 0, until they are back")
        await nodes.restart("client-0")
        await rounds.until_with("client-0")
    first, second = ledger(tmp_path / LED), ledger(tmp_path / COPY)
    assert_one_history(first, second)
    alone = next(record for record in second if record["epoch"] > first[-1]["epoch"])
    assert (shards(first[0]), shards(alone), alone["without"]) == ({0, 1}, {1}, [0])
    assert audit(tmp_path / COPY).faults == []


async def test_where_none_may_take_over_a_person_goes_on_from_the_copy(tmp_path: Path) -> None:
    seen, advice = Seen(), f"--run {COPY} --resume"
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, takeover="never") as nodes:
        await seen.wait_for(says(READY))
        await Rounds(nodes).until(led_by("aggregator"))
        await eventually(lambda: versions(tmp_path / COPY), 30)
        await nodes.kill("aggregator")
        await seen.wait_for(says(advice, "standby-0"))
        await nodes.stop("standby-0")
        copied = versions(tmp_path / COPY)
        flags = parsed(advice) | {
            "name": "person",
            "runs": tmp_path,
            "mdns": False,
            "peers": (nodes.nodes["client-0"].address,),
            "lost_after_s": LEASE_S,
            "beat_s": 0.2,
        }
        context, stop = zmq.asyncio.Context(), asyncio.Event()
        try:
            job, settings = load_job(tmp_path / "exact.py"), load_settings(flags, {})
            person = asyncio.create_task(run_role(Role.AGGREGATOR, job, settings, seen, context=context, stop=stop))
            await seen.wait_for(
                lambda report: isinstance(report, RoundReport) and report.node == "person" and report.version > copied
            )
            stop.set()
            await person
        finally:
            context.destroy(linger=0)
    assert not any(map(says("taking over", "standby-0"), seen.reports))
    assert_one_history(ledger(tmp_path / LED), ledger(tmp_path / COPY))
    await assert_undisturbed(tmp_path / COPY, tmp_path)


async def test_an_aggregator_that_is_asked_to_leave_hands_over_all_it_has_recorded(tmp_path: Path) -> None:
    seen = Seen()
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen) as nodes:
        await seen.wait_for(says(READY))
        rounds = Rounds(nodes)
        await rounds.until(led_by("aggregator"))
        await nodes.stop("aggregator")  # SIGTERM, as what zsfl drain does
        assert nodes.nodes["aggregator"].exit_code == 0
        assert seen.notes("leaving the run to whoever stands by")
        await rounds.until(led_by("standby-0"))
    first, second = ledger(tmp_path / LED), ledger(tmp_path / COPY)
    assert second[: len(first)] == first
    assert second[len(first)]["epoch"] > first[-1]["epoch"]
    await assert_undisturbed(tmp_path / COPY, tmp_path)


@pytest.mark.parametrize("durability", ["process", "replica"])
async def test_one_that_stands_by_and_leaves_changes_nothing(durability: str, tmp_path: Path) -> None:
    seen = Seen()
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, durability=durability) as nodes:
        await seen.wait_for(says(READY))
        rounds = Rounds(nodes)
        [*_, last] = await rounds.until(led_by("aggregator"))
        await nodes.stop("standby-0")
        if durability == "replica":
            await seen.wait_for(says("standby-0 was the last that stood by, and durability is replica"))
            await nodes.restart("standby-0")
        after = await rounds.until(lambda report: report.round > last.round + 2)
    assert {report.node for report in after} == {"aggregator"}
    await assert_undisturbed(tmp_path / LED, tmp_path)


BAD_DISK = """
import errno, os
from zsfl.node import Node

_sync = os.fdatasync


def sync(file):
    if "/mine/" in os.readlink(f"/proc/self/fd/{file}") and os.path.exists(bad):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    _sync(file)


async def once(self, write):
    return write()


os.fdatasync, Node.persistently = sync, once
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
async def test_an_aggregator_whose_disk_stays_bad_leaves_the_run_to_another(tmp_path: Path) -> None:
    """How long it is waited for is left out here."""
    seen, bad = Seen(), tmp_path / "bad"
    nodes = cluster(tmp_path, seen, durability="power")
    patch_nodes(tmp_path / "exact.py", BAD_DISK, bad=bad)
    async with asyncio.timeout(2 * HANG_S), nodes:
        await seen.wait_for(says(READY))
        rounds = Rounds(nodes)
        await rounds.until(led_by("aggregator"))
        bad.touch()
        await rounds.until(led_by("standby-0"))
        failed = nodes.nodes["aggregator"].failed
    assert failed is not None
    assert (failed.kind, "Another aggregator stands by" in failed.message) == ("StorageError", True)
    await assert_undisturbed(tmp_path / COPY, tmp_path)


async def test_where_keys_are_used_whoever_stands_by_knows_whose_shards_are_whose(tmp_path: Path) -> None:
    seen = Seen()
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, keys=str(tmp_path / "keys")) as nodes:
        await seen.wait_for(says(READY))
        await trained(nodes, 1)
        await nodes.kill("aggregator")
        await seen.wait_for(says("taking over"))
        await trained(nodes, 2)
        last = folder_of(nodes)
    (shards,) = Standing.of(last).holders.values()
    assert shards == tuple(range(len(CASE.sizes)))
    assert audit(last).faults == []
