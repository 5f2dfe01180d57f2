"""The data of one client, as its steps take it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zsfl.learning.batches import Batches, BySpeed, round_order, stream_rows
from zsfl.learning.job import Job
from zsfl.learning.skew import class_counts
from zsfl.wire.fields import ShardInfo

OTHER_ORDERS = 1 << 32
"""Farther than any round: orders of samples from there on are those of further steps at one version."""
EVALUATION_BATCH = 512
"""Held-out samples in one request."""


class ShardData:
    """The samples of one shard. They never leave this process."""

    def __init__(self, job: Job, shard: int) -> None:
        train, test = job.data(shard, job.shards)
        self._job = job
        self.shard = shard
        self.train = Batches(train)
        self.test = None if test is None or len(test) == 0 else Batches(test)  # type: ignore[arg-type]
        needs_classes = job.adjust_logits is not None or (isinstance(job.batches, BySpeed) and job.batches.mix > 0)
        self.classes = class_counts(self.train) if needs_classes else ()
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    @property
    def info(self) -> ShardInfo:
        """How many samples there are."""
        tested = 0 if self.test is None else len(self.test)
        return ShardInfo(shard=self.shard, train_samples=len(self.train), test_samples=tested, classes=self.classes)

    def batch(self, round_: int, number: int, windows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """One of the batches into which a round of so many windows divides this shard; None when that one is empty."""
        start, size = self._job.batch_place(len(self.train), windows, number)
        if not size:
            return None
        if self._order[0] != round_:
            job = self._job
            self._order = round_, round_order(job.seed, self.shard, round_, len(self.train), job.shuffle)
        return self.train[self._order[1][start : start + size]]

    def free_batch(self, place: int, k: int, windows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Async: the batch of the k-th step at a place that counts on over all rounds; None when it is empty.

        Rounds of so many windows follow one another; so at any moment the batch is known by its step's name alone,
        whoever made what before. A second step at the same place is of another order.
        """
        round_, number = divmod(place, windows)
        return self.batch(round_ + k * OTHER_ORDERS, (number + k) % windows, windows)

    def stream(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """So many samples of the endless stream of this shard; None for no samples."""
        if not count:
            return None
        job = self._job
        return self.train[stream_rows(job.seed, self.shard, start, count, len(self.train), job.shuffle)]

    def test_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All held-out samples in order, each batch read when it is asked for."""
        if self.test is not None:
            for rows in torch.arange(len(self.test)).split(EVALUATION_BATCH):
                yield self.test[rows]
