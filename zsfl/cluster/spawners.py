"""Which spawner starts the nodes of a local cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zsfl.cluster.processes import ProcessSpawner
from zsfl.cluster.spawner import Spawner
from zsfl.errors import ConfigError

if TYPE_CHECKING:
    from zsfl.learning.job import Job


def spawner_for(job: str | Path | Job, logs: Path, *, in_process: bool) -> Spawner:
    """Of processes, which import the job's file themselves, or of tasks in this one."""
    if in_process:
        from zsfl.cluster.in_process import InProcessSpawner

        return InProcessSpawner(loaded(job))
    if not isinstance(job, str | Path):
        raise ConfigError(
            "a job of real processes is a file, which each of them imports; give its path, or in_process=True"
        )
    return ProcessSpawner(Path(job), logs)


def loaded(job: str | Path | Job) -> Job:
    """The job itself; ConfigError when its file cannot be loaded."""
    if isinstance(job, str | Path):
        from zsfl.learning.job import load_job

        return load_job(Path(job))
    return job
