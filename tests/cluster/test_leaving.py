"""Which nodes of a local cluster leave first."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.exact import Case
from helpers.ledger import ledger
from helpers.waiting import until

from zsfl.cluster.spawner import NodeCommand, Spawner
from zsfl.cluster.spawners import spawner_for
from zsfl.ids import Role
from zsfl.reports import AnyReport, Exited, Ready, RoundReport

CASE = Case(rounds=10_000)
LEADING = ["aggregator", "standby"]
OTHERS = ["split-server", *(f"client-{shard}" for shard in range(len(CASE.sizes)))]


async def _heard(spawner: Spawner, kind: type[AnyReport]) -> AnyReport:
    while not isinstance(report := await until(spawner.reports.get()), kind):
        assert not isinstance(report, Exited), report
    return report


@pytest.mark.parametrize("in_process", [True, False])
async def test_a_cluster_that_is_closed_in_mid_run_leaves_no_version_that_lacks_somebody(
    in_process: bool, tmp_path: Path
) -> None:
    job = CASE.job() if in_process else CASE.job_file(tmp_path)
    spawner = spawner_for(job, tmp_path / "logs", in_process=in_process)
    common = {"mdns": False, "runs": tmp_path, "clients": len(CASE.sizes)}
    try:
        await spawner.open()
        await spawner.start(NodeCommand(name="aggregator", role=Role.AGGREGATOR, flags={**common, "run": "mine"}))
        ready = await _heard(spawner, Ready)
        assert isinstance(ready, Ready)
        common["peers"] = (ready.address,)
        await spawner.start(NodeCommand(name="standby", role=Role.STANDBY, flags=common))
        for name in OTHERS:
            role = Role.SPLIT_SERVER if name == "split-server" else Role.CLIENT
            shards = {"shards": name[-1]} if role is Role.CLIENT else {}
            await spawner.start(NodeCommand(name=name, role=role, flags={**common, **shards}))
        await _heard(spawner, RoundReport)
    finally:
        await spawner.close()
    left = [spawner.reports.get_nowait() for _ in range(spawner.reports.qsize())]
    exits = {report.node: report.code for report in left if isinstance(report, Exited)}
    names = list(exits)
    assert (sorted(names[:2]), sorted(names[2:])) == (LEADING, sorted(OTHERS))
    assert set(exits.values()) == {0}
    assert [record for record in ledger(tmp_path / "mine") if record["without"]] == []
