"""What a test of a job asks of a run: was every step counted once, and are the weights what they would have been?

Nothing here needs pytest; `zsfl.testing.plugin` has its fixtures. A check that fails is an AssertionError that says
what is wrong. Torch is loaded when a check is made, not before.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsfl.errors import ConfigError
from zsfl.words import number_of

if TYPE_CHECKING:
    from zsfl.aggregator.commit import Record
    from zsfl.cluster.local import LocalCluster
    from zsfl.learning.job import Job

__all__ = ["check_equal_weights", "check_history", "check_undisturbed", "train_on"]

MOST_FAULTS = 10
"""Told of one history; the rest is counted."""


def check_history(folder: str | Path, *, may_be_pending: bool = False) -> None:
    """Check what a run left: one unbroken chain of versions, every step counted once or dropped with a reason, what was
    counted there and whole, and nothing acknowledged that is neither.

    `may_be_pending` lets the last hold: for a run that was left in the middle of a round, and for late steps of the
    last version in the modes that wait for nobody.
    """
    from zsfl.aggregator.audit import audit

    found = audit(Path(folder))
    faults = list(found.faults)
    if not found.versions:
        faults.append("no version was made")
    if found.pending and not may_be_pending:
        faults.append(f"acknowledged, and neither counted nor dropped: {found.pending} of its steps")
    if faults:
        told = [*faults[:MOST_FAULTS], *([f"and {len(faults) - MOST_FAULTS} more"] if faults[MOST_FAULTS:] else [])]
        raise AssertionError("\n  ".join([f"the history of {folder} is not clean:", *told]))


def check_equal_weights(folder: str | Path, other: str | Path) -> None:
    """Check that two runs made the same weights, bit for bit, at every version."""
    ours, theirs = _records(folder), _records(other)
    _check_equal(ours, theirs, f"{folder} and {other}")
    if len(ours) != len(theirs):
        raise AssertionError(
            f"{folder} has {number_of(len(ours), 'version')}, {other} has {len(theirs)}: the same as far as both go"
        )


def check_undisturbed(folder: str | Path, job: str | Path | Job) -> None:
    """Check that every version of a run has the weights, bit for bit, that it would have had if nothing had happened.

    Trains the same job in this process for as many rounds, under a loop of its own: from an async test, call it by
    `asyncio.to_thread`. For exact mode, with one of the codecs that make the same of the same in every run; a job with
    `merge=True` comes out the same only but for the last bits.
    """
    ours = _records(folder)
    with tempfile.TemporaryDirectory(prefix="zsfl-undisturbed-") as runs:
        again = asyncio.run(train_on(_cluster_like(Path(folder), job, runs), ours[-1].round + 1))
        _check_equal(ours, _records(again), f"{folder} and a run in which nothing happened")


async def train_on(cluster: LocalCluster, rounds: int | None = None, kills: int = 0) -> Path:
    """Run a cluster for so many rounds (None: what the job has left), and for more until so many nodes were killed; the
    folder of the run.
    """
    async with cluster:
        async for _ in cluster.train(rounds):
            pass
        while len(cluster.killed) < kills and cluster.result is not None and not cluster.result.early:
            async for _ in cluster.train(1):
                pass
    if cluster.result is None:
        raise AssertionError("training ended without a result")
    return Path(cluster.result.folder)


def _records(folder: str | Path) -> list[Record]:
    from zsfl.aggregator.commit import read_record
    from zsfl.aggregator.run_folder import LEDGER, whole_lines

    path = Path(folder) / LEDGER
    records = [read_record(line, f"line {n} of {path}").record for n, line in enumerate(whole_lines(path), 1)]
    if not records:
        raise AssertionError(f"{folder} has no versions to compare: is it the folder of a run?")
    return records


def _check_equal(ours: list[Record], theirs: list[Record], both: str) -> None:
    for mine, other in zip(ours, theirs, strict=False):
        if mine.weights != other.weights:
            steps = "the same steps" if set(mine.counted) == set(other.counted) else "other steps"
            raise AssertionError(f"{both} differ from version {mine.version} of {len(ours)} on, which counts {steps}")


def _cluster_like(folder: Path, job: str | Path | Job, runs: str) -> LocalCluster:
    """Of the same size and settings as the one that this run was made on, in this process."""
    from zsfl.cluster.local import LocalCluster

    try:
        settings: dict[str, Any] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        told: dict[str, Any] = {name: settings["node"][name] or None for name in ("mode", "codec", "threads")}
        shards, mode = int(settings["job"]["shards"]), str(settings["job"]["mode"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{folder / 'settings.json'} does not say how the run was started: {error}") from error
    if not mode.startswith("Exact("):
        raise ConfigError(f"{folder} is a run in mode {mode}: only in exact mode do two runs make the same weights")
    return LocalCluster(job, clients=shards, split_servers=1, in_process=True, runs=runs, **told)
