"""The algorithms people know, in one process and without any network: references to measure zsfl against.

They run any job from the same file, under the same seed, initial weights and division of the data:

    for done in zsfl.baselines.run("splitfed-v1", job, rounds=10):
        print(done.round, done.accuracy)

What belongs to modes is left out (`mode`, `local_lr`, `adjust_logits`). Only `merged` looks at `batches` and `steps`:
elsewhere every client takes `batch_size` samples at a time, as in the papers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch

from zsfl.baselines.algorithms import (
    SL,
    Centralised,
    FedAvg,
    Local,
    Merged,
    MicroSFL,
    MicroSFLCoded,
    SplitFedV1,
    SplitFedV2,
)
from zsfl.baselines.common import Baseline, BaselineRound
from zsfl.errors import ConfigError
from zsfl.learning.job import Job

BASELINES: Mapping[str, type[Baseline]] = {
    "centralised": Centralised,
    "merged": Merged,
    "local": Local,
    "fedavg": FedAvg,
    "sl": SL,
    "splitfed-v1": SplitFedV1,
    "splitfed-v2": SplitFedV2,
    "microsfl": MicroSFL,
    "microsfl-coded": MicroSFLCoded,
}
"""By name; the first line of each class says what it does."""


def make(name: str, job: Job) -> Baseline:
    """One of `BASELINES`, ready for its first round."""
    if name not in BASELINES:
        raise ConfigError(f"there is no baseline {name!r}: use one of {', '.join(BASELINES)}")
    return BASELINES[name](job)


def run(name: str, job: Job, rounds: int | None = None) -> Iterator[BaselineRound]:
    """Train so many rounds (None: as many as the job says), yielding each one's result."""
    baseline = make(name, job)
    seconds, steps = 0.0, 0
    for number in range(1, (job.rounds if rounds is None else rounds) + 1):
        begun_s = time.perf_counter()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(job.seed + number)
            trained = baseline.train_round()
        seconds += time.perf_counter() - begun_s
        steps += trained.steps
        loss, accuracy, per_client = baseline.test()
        yield BaselineRound(
            round=number,
            train_loss=trained.loss_sum / trained.weight if trained.weight else 0.0,
            loss=loss,
            accuracy=accuracy,
            per_client=per_client,
            seconds=seconds,
            steps=steps,
        )
