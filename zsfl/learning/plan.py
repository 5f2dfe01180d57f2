"""Which steps a round has: a pure function of the shards' sizes, the same at the aggregator and at every client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_high
from typing import Self

from zsfl.learning.job import Job
from zsfl.learning.modes import Async, Exact
from zsfl.learning.robust import is_trusting

MERGE_ATTEMPTS = 32
"""How often a merged batch may be asked for: it has to be anew when its server or one of its clients is gone."""
REDONE = 8
"""Exact: how often a window may be asked for, where servers merged the gradient of a client that left into others'."""

Sizes = dict[int, list[int]]
"""By shard, the samples of its k-th step at one version; 0 where it sits that one out."""


def steps_of(job: Job) -> int:
    """How many steps a client makes at one version at most, each time that it is asked."""
    return job.how.quota if isinstance(job.how, Async) else job.steps


def attempts_of(job: Job) -> int:
    """How often it is asked at one version at most. No step has a k that is not below this times `steps_of`."""
    return MERGE_ATTEMPTS if job.batch_norm == "merged" else REDONE if isinstance(job.how, Exact) else 1


@dataclass(frozen=True, slots=True)
class Plan:
    """One round: into how many windows it is divided, and what each window expects."""

    job: Job
    windows: int

    @classmethod
    def of(cls, job: Job, samples: Mapping[int, int]) -> Self:
        """The plan of a round in which these shards, with so many training samples each, take part.

        How many a shard has is for its client to say. Where clients are not trusted the middle one decides, so that
        nobody can make a round as long as they like.
        """
        if not is_trusting(job.average, job.bound):
            batches = -(-median_high(samples.values()) // job.batch_size)
        elif job.batches == "equal":
            batches = -(-max(samples.values()) // job.batch_size)
        else:
            batches = -(-sum(samples.values()) // (job.batch_size * len(samples)))
        return cls(job, max(1, -(-batches // job.steps)))

    def sizes(self, samples: Mapping[int, int], window: int) -> Sizes:
        """What this window expects of these shards."""
        numbers = range(window * self.job.steps, (window + 1) * self.job.steps)
        return {
            shard: [self.job.batch_place(count, self.windows, number)[1] for number in numbers]
            for shard, count in sorted(samples.items())
        }
