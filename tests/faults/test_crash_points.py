"""Every role is killed on purpose at every named point of its work, once each: the outcome is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from helpers.exact import Case, Ran, assert_equal, in_process, spills_left
from helpers.ledger import ledger

import zsfl
from zsfl.aggregator.audit import audit, replay_versions

CASE = Case(optimizer="adam", dropout=0.2, sizes=(13, 7, 20, 18), rounds=10_000)
MOST_ROUNDS = 400


class Point(NamedTuple):
    """Where a process is killed: before or after what this function of that module does, in its `call`th call."""

    module: str
    function: str
    when: str
    call: int = 3
    only: str = ""
    """Of a store of spills, what its folder's name begins with: clients and split servers have the same."""


POINTS = {
    "client: the head is through, nothing sent": Point("zsfl.client.local", "LocalParts.begin", "after"),
    "client: before its part is in place": Point("zsfl.client.driver", "StepDriver._put", "before"),
    "client: its part is in place and offered": Point("zsfl.client.driver", "StepDriver._put", "after"),
    "client: before it deletes what is counted": Point("zsfl.client.driver", "StepDriver._drop_settled", "after"),
    "server: after a forward": Point("zsfl.split_server.body", "BodyWorker.forward_all", "after"),
    "server: before the spill is in place": Point("zsfl.split_server.body", "BodyWorker._put", "before"),
    "server: the spill is in place, not acknowledged": Point("zsfl.split_server.body", "BodyWorker._put", "after"),
    "server: acknowledged": Point("zsfl.split_server.role", "SplitServerRole._acknowledged", "after"),
    "server: heard the commit that names its spills, deleted none": Point(
        "zsfl.spill.store", "SpillStore.release", "before", only="split-server"
    ),
    "aggregator: a contribution is in the journal": Point("zsfl.aggregator.journal", "Journal.keep", "after", 10),
    "aggregator: the step is made, not recorded": Point("zsfl.aggregator.commit", "Ledger.commit", "before"),
    "aggregator: recorded, nothing published": Point("zsfl.aggregator.commit", "Ledger.commit", "after"),
    "aggregator: published, nothing released": Point("zsfl.aggregator.training", "Training.publish_weights", "after"),
    "aggregator: a round is over, the next one asked for, no checkpoint": Point(
        "zsfl.aggregator.progress", "Progress.save", "before", 2
    ),
    "aggregator: a checkpoint is half written": Point("zsfl.learning.master", "Master.save", "after", 2),
    "aggregator: old checkpoints are dropped": Point("zsfl.aggregator.progress", "Progress.keep_from", "after", 2),
    "standby: contributions are copied, their record is not": Point(
        "zsfl.aggregator.mirror", "Mirror._has", "after", 7
    ),
    "standby: a record is copied, and nobody knows": Point("zsfl.aggregator.mirror", "Mirror._extend", "after"),
    "aggregator: others have the version, and nobody knows": Point(
        "zsfl.aggregator.mirror", "Source.piece", "after", 8
    ),
}
KILLING = '''
import functools, importlib, os, signal, sys

def _kill(module, function, when, call, only, once):
    """The process ends in that call of this function, the first process that gets there."""
    owner, _, name = function.rpartition(".")
    owner = functools.reduce(getattr, owner.split("."), importlib.import_module(module))
    does, calls = getattr(owner, name), []

    def end():
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(does)
    def killing(*args, **kwargs):
        if only and not args[0].folder.name.startswith(only):
            return does(*args, **kwargs)
        calls.append(1)
        if len(calls) == call and when == "before":
            end()
        result = does(*args, **kwargs)
        if len(calls) == call and when == "after":
            end()
        return result

    setattr(owner, name, killing)
'''


async def test_killed_at_every_named_point_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    killed = {name: tmp_path / f"killed-{number}" for number, name in enumerate(POINTS)}
    job = CASE.job_file(tmp_path)
    kills = "\n".join(f"_kill(*{tuple(point)!r}, {str(killed[name])!r})" for name, point in POINTS.items())
    job.write_text(f"{job.read_text()}\n{KILLING}\n{kills}\n")
    rounds = 0
    settings = {"mdns": False, "keep_alive": True, "beat_s": 0.2, "lost_after_s": 1.0}
    cluster = zsfl.LocalCluster(job, run="killed", split_servers=2, standbys=1, runs=tmp_path, **settings)  # type: ignore[arg-type]
    async with cluster:
        while not all(path.exists() for path in killed.values()):
            rounds += len([report async for report in cluster.train(2)])
            left = [name for name, path in killed.items() if not path.exists()]
            assert rounds < MOST_ROUNDS, f"nobody came to {left}"
        rounds += len([report async for report in cluster.train(1)])
        assert cluster.result is not None
        ran = Ran(Path(cluster.result.folder), [])
    case = replace(CASE, rounds=rounds)
    straight = await in_process(case, tmp_path, run="straight")
    assert_equal(ran.weights, straight.weights)
    assert [r["weights"] for r in ledger(ran.folder)] == [r["weights"] for r in ledger(straight.folder)]
    found = audit(ran.folder)
    assert (found.faults, found.pending, found.dropped) == ([], 0, 0)
    assert found.versions == 4 * rounds
    if ran.folder.name == "killed":  # a copy keeps what a restart needs, and no more
        assert found.verified == found.versions
        again = replay_versions(ran.folder, case.job(), 1, found.versions)
        assert [int(version) for version in again] == list(range(1, found.versions + 1))
    assert [path for path in spills_left(tmp_path) if path.name != ".lock"] == []
