"""One takeover after another, copies that were cut short, and clients that die in the moment of the handover."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from helpers.jobs import patch_nodes
from helpers.ledger import ledger, versions
from helpers.rounds import Rounds
from helpers.takeover import READY, Seen, assert_undisturbed, cluster, led_by, says
from helpers.waiting import HANG_S, eventually

from zsfl.aggregator.standing import Standing


async def test_of_two_that_stand_by_one_leads_and_the_other_takes_over_from_it(tmp_path: Path) -> None:
    seen, both = Seen(), {"standby-0", "standby-1"}
    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, standbys=2) as nodes:
        await seen.wait_for(says(READY, "aggregator"))
        for name in both:
            await seen.wait_for(says("standing by aggregator", name))
        rounds = Rounds(nodes)
        await rounds.until(led_by("aggregator"))
        await nodes.kill("aggregator")
        [*_, last] = await rounds.until(led_by(*both))
        second, third = last.node, *(both - {last.node})
        await seen.wait_for(says(f"standing by {second}", third))
        await nodes.kill(second)
        await rounds.until(led_by(third))
    records = ledger(tmp_path / f"mine.{third}")
    assert len({record["epoch"] for record in records} - {0, 1}) >= 2
    await assert_undisturbed(tmp_path / f"mine.{third}", tmp_path)


KILL = '''
import os, signal
from zsfl.aggregator.mirror import Mirror

_has, _files = Mirror._has, []


def _killed(self, file):
    """So many files after it was armed the process that copies is killed."""
    _has(self, file)
    if os.path.exists(armed):
        _files.append(file)
        if len(_files) == int(open(armed).read()):
            os.unlink(armed)
            os.kill(os.getpid(), signal.SIGKILL)


Mirror._has = _killed
'''


async def test_one_that_is_killed_while_it_copies_copies_the_rest_when_it_is_back(tmp_path: Path) -> None:
    seen, armed, copy = Seen(), tmp_path / "armed", tmp_path / "mine.standby-0"
    nodes = cluster(tmp_path, seen)
    patch_nodes(tmp_path / "exact.py", KILL, armed=armed)
    async with asyncio.timeout(2 * HANG_S), nodes:
        await seen.wait_for(says(READY))
        await nodes.kill("standby-0")
        rounds = Rounds(nodes)
        await rounds.until(lambda report: report.round > 1)
        for files in (2, 4):
            armed.write_text(str(files))
            await nodes.restart("standby-0")
            await eventually(lambda: nodes.nodes["standby-0"].exit_code is not None)
            assert not armed.exists()
            assert versions(copy) < versions(tmp_path / "mine")
        made = versions(tmp_path / "mine")
        await nodes.restart("standby-0")
        await eventually(lambda: versions(copy) >= made and Standing.of(copy).shared)
        await nodes.kill("aggregator")
        await rounds.until(led_by("standby-0"))
    await assert_undisturbed(copy, tmp_path)


async def test_clients_that_die_in_the_moment_of_the_handover_are_waited_for(tmp_path: Path) -> None:
    """Most of them with the aggregator, so that there is nobody to agree, and most of them once others have agreed."""
    seen = Seen()

    def pids(*names: str) -> list[int]:
        return [nodes.nodes[name].pid or 0 for name in names]

    async with asyncio.timeout(2 * HANG_S), cluster(tmp_path, seen, keep_alive=True) as nodes:
        await seen.wait_for(says(READY))
        rounds = Rounds(nodes)
        await rounds.until(led_by("aggregator"))
        leader = nodes.nodes["aggregator"].pid or 0
        os.kill(leader, signal.SIGSTOP)  # else it might be back before it is succeeded
        for pid in pids("client-0", "client-1", "client-2"):
            os.kill(pid, signal.SIGKILL)
        await seen.wait_for(says("taking over", "standby-0"))
        for pid in (leader, *pids("client-1", "client-2", "client-3")):
            os.kill(pid, signal.SIGKILL)
        await rounds.until(led_by("standby-0"))
    await assert_undisturbed(tmp_path / "mine.standby-0", tmp_path)
