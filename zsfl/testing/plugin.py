"""The pytest fixtures, there in every project that has zsfl installed. Costs nothing until a test asks for one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from zsfl.testing import train_on

if TYPE_CHECKING:
    from zsfl.cluster.chaos import Chaos
    from zsfl.cluster.local import LocalCluster
    from zsfl.learning.job import Job

SETTINGS: dict[str, Any] = {"mdns": False, "beat_s": 0.2, "lost_after_s": 1.0, "request_s": 10.0, "patience_s": 30.0}
"""Where the test says nothing else: found by address, soon missed, and a test that hangs ends with words of its own."""


class MakeCluster(Protocol):
    """What `zsfl_cluster` is."""

    def __call__(self, job: str | Path | Job, **options: Any) -> LocalCluster:
        """A cluster for `async with`; `options` are those of `zsfl.LocalCluster`."""
        ...


class Run(Protocol):
    """What `zsfl_run` is."""

    def __call__(
        self, job: str | Path | Job, *, rounds: int | None = None, chaos: Chaos | None = None, **options: Any
    ) -> Path:
        """Train; the folder of the run."""
        ...


@pytest.fixture
def zsfl_cluster(tmp_path: Path) -> MakeCluster:
    """Makes local clusters that leave their runs under `tmp_path`, without mDNS and with short deadlines."""

    def make(job: str | Path | Job, **options: Any) -> LocalCluster:
        from zsfl.cluster.local import LocalCluster

        return LocalCluster(job, **{**SETTINGS, "runs": tmp_path / "runs", **options})

    return make


@pytest.fixture
def zsfl_run(zsfl_cluster: MakeCluster) -> Run:
    """Trains a job on such a cluster, until `rounds` are done and `chaos` has killed all that it is to kill.

    For tests that are no coroutines; those that are take `zsfl_cluster`.
    """

    def run(job: str | Path | Job, *, rounds: int | None = None, chaos: Chaos | None = None, **options: Any) -> Path:
        kills = 0 if chaos is None else chaos.kills
        return asyncio.run(train_on(zsfl_cluster(job, chaos=chaos, **options), rounds, kills))

    return run
