"""Nodes of every role are killed again and again: the run ends with the weights it would have had."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.exact import Case, Ran, assert_equal, in_process
from helpers.jobs import write_job
from helpers.ledger import ledger
from helpers.waiting import HANG_S

import zsfl
from zsfl.aggregator.audit import audit
from zsfl.cluster import keeper as keeper_module
from zsfl.cluster.chaos import Chaos
from zsfl.cluster.keeper import EARLY_S, MOST_DEATHS, MOST_EARLY_DEATHS, Keeper
from zsfl.cluster.nodes import NodeInfo
from zsfl.errors import ConfigError
from zsfl.ids import Address, Role
from zsfl.reports import Failed

CASE = Case(optimizer="adam", dropout=0.2, sizes=(13, 7, 20, 18))


async def test_what_is_killed_comes_back_and_no_bit_is_another(tmp_path: Path) -> None:
    chaos = Chaos(kills=12, every_s=0.3, seed=1)
    rounds = 0
    cluster = zsfl.LocalCluster(
        replace(CASE, rounds=10_000).job_file(tmp_path),
        run="wrecked",
        split_servers=2,
        standbys=1,
        runs=tmp_path,
        mdns=False,
        chaos=chaos,
        beat_s=0.2,
        lost_after_s=1.0,
    )
    async with cluster:
        while len(cluster.killed) < chaos.kills:
            rounds += len([report async for report in cluster.train(1)])
        assert cluster.result is not None
        ran = Ran(Path(cluster.result.folder), [])
    roles = [cluster.nodes[name].role for name in cluster.killed]
    killed = {role: roles.count(Role(role)) for role in chaos.roles}
    killed[Role.AGGREGATOR] += roles.count(Role.STANDBY)
    assert killed == dict.fromkeys(chaos.roles, 4)
    straight = await in_process(replace(CASE, rounds=rounds), tmp_path, run="straight")
    assert_equal(ran.weights, straight.weights)
    found = audit(ran.folder)
    assert (found.faults, found.pending, found.dropped) == ([], 0, 0)
    records = ledger(ran.folder)
    assert len(records) == 4 * rounds
    assert [record["weights"] for record in records] == [record["weights"] for record in ledger(straight.folder)]


async def test_all_killed_at_once_find_one_another_again(tmp_path: Path) -> None:
    job = replace(CASE, rounds=10_000).job_file(tmp_path)
    settings = {"run": "killed", "split_servers": 1, "client_processes": 1, "mdns": False, "beat_s": 0.2}
    async with zsfl.LocalCluster(job, runs=tmp_path, keep_alive=True, lost_after_s=1.0, **settings) as cluster:  # type: ignore[arg-type]
        rounds = len([report async for report in cluster.train(1)])
        training = asyncio.create_task(_trained(cluster, 2))
        await cluster.until(lambda: cluster.is_training)
        await asyncio.gather(*(cluster.kill(name) for name in cluster.nodes))
        async with asyncio.timeout(HANG_S):
            rounds += await training
    straight = await in_process(replace(CASE, rounds=rounds), tmp_path, run="straight")
    assert_equal(Ran(tmp_path / "killed", []).weights, straight.weights)


async def _trained(cluster: zsfl.LocalCluster, rounds: int) -> int:
    return len([report async for report in cluster.train(rounds)])


def test_equal_seeds_make_equal_plans_and_roles_take_turns() -> None:
    plan = list(Chaos(kills=9, seed=3).plan())
    assert plan == list(Chaos(kills=9, seed=3).plan()) != list(Chaos(kills=9, seed=4).plan())
    for first in (0, 3, 6):
        assert {role for _, role, _ in plan[first : first + 3]} == {Role.CLIENT, Role.SPLIT_SERVER, Role.AGGREGATOR}
    assert all(pause_s > 0 and 0 <= place < 1 for pause_s, _, place in plan)
    assert {role for _, role, _ in Chaos(kills=5, roles=["client"]).plan()} == {Role.CLIENT}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kills": -1}, "0 kills or more"),
        ({"every_s": 0}, "a time above 0"),
        ({"roles": ["cook"]}, "name some of client"),
    ],
)
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chaos(**wrong)  # type: ignore[arg-type]


def test_whom_it_is_of_use_to_start_again() -> None:
    now_s, again, up = 1000.0, "start again", "give up"

    def ended(
        code: int, *, lived_s: float | None = EARLY_S + 1, failed: bool = False, killed: bool = False
    ) -> NodeInfo:
        words = Failed(node="a", kind="ConfigError", message="wrong job") if failed else None
        node = NodeInfo(Role.CLIENT, exit_code=code, failed=words, was_killed=killed)
        if lived_s is not None:
            node.address, node.ready_s = Address("x:1"), now_s - lived_s
        return node

    keeper = Keeper()

    def decided(name: str, node: NodeInfo, times: int) -> list[str]:
        return [keeper.decide(name, node, now_s) for _ in range(times)]

    assert decided("a", ended(0), 1) == ["let go"], "it left on purpose"
    assert decided("a", ended(1, failed=True), 1) == ["let go"], "it would fail again"
    assert decided("a", ended(-9), 20) == [again] * 20
    assert decided("a", ended(-9, lived_s=0.1, killed=True), 20) == [again] * 20, "that was somebody's wish"
    assert decided("b", ended(-9, lived_s=None), MOST_DEATHS + 1) == [*[again] * MOST_DEATHS, up]
    assert decided("c", ended(-9, lived_s=0.1), MOST_EARLY_DEATHS + 1) == [*[again] * MOST_EARLY_DEATHS, up]
    assert decided("d", ended(-9, lived_s=0.1), MOST_EARLY_DEATHS) == [again] * MOST_EARLY_DEATHS
    assert decided("d", ended(-9), 1) == decided("d", ended(-9, lived_s=0.1), 1) == [again]


DYING = """
import os, pathlib

class Dying(nn.Tanh):
    def forward(self, x):
        if pathlib.Path({gate!r}).exists():
            os._exit(7)
        return super().forward(x)

def dying():
    parts = model()
    parts.body[1] = Dying()
    return parts

job = __import__("dataclasses").replace(job, model=dying)
"""


async def test_a_node_that_dies_whenever_it_is_ready_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MOST_EARLY_DEATHS", 2)
    monkeypatch.setattr(keeper_module, "EARLY_S", 2 * HANG_S)
    job, gate = write_job(tmp_path, rounds=10_000), tmp_path / "gate"
    job.write_text(job.read_text() + DYING.format(gate=str(gate)))
    cluster = zsfl.LocalCluster(
        job, split_servers=1, client_processes=1, runs=tmp_path, mdns=False, keep_alive=True, lost_after_s=1.0
    )
    said = r"split-server-0 died 3 times, .* at last with exit code 7: it is not .*See .*logs/split-server-0\.log"
    async with cluster:
        await _trained(cluster, 1)
        await cluster.kill("split-server-0")
        gate.touch()
        with pytest.raises(zsfl.RunFailed, match=said):
            await _trained(cluster, 1)
