"""What all baselines share: clients with their data, one mini-batch step, averages, the held-out test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from zsfl.learning.batches import Batches, round_order
from zsfl.learning.job import Job
from zsfl.learning.model import SplitModel
from zsfl.learning.norms import tracked_norms

TEST_BATCH = 2048
Batch = tuple[Tensor, Tensor]
State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRound:
    """What one round came to."""

    round: int
    """From 1."""
    train_loss: float
    loss: float | None
    accuracy: float | None
    """In 0..1, over all held-out samples of all shards; None where there are none, or the job has no metric."""
    per_client: dict[int, float]
    """By shard, on its own held-out samples."""
    seconds: float
    """Spent on training since the start, tests left out."""
    steps: int
    """Mini-batches since the start."""


@dataclass(slots=True)
class Trained:
    """Sums over the mini-batches of a round."""

    loss_sum: float = 0.0
    weight: float = 0.0
    steps: int = 0

    def add(self, loss: Tensor, weight: float) -> None:
        """One mini-batch of that mean loss."""
        self.loss_sum += float(loss.detach()) * weight
        self.weight += weight
        self.steps += 1


class Client:
    """One shard's data."""

    def __init__(self, job: Job, shard: int) -> None:
        train, test = job.data(shard, job.shards)
        self._job = job
        self.shard = shard
        self.train = Batches(train)
        self.test = None if test is None or not len(cast(Any, test)) else Batches(test)

    @property
    def samples(self) -> int:
        """Training samples."""
        return len(self.train)

    def batches(self, round_: int) -> Iterator[Batch]:
        """The mini-batches of a round (from 0), `batch_size` samples each but for the last."""
        job = self._job
        order = round_order(job.seed, self.shard, round_, self.samples, job.shuffle)
        for rows in order.split(job.batch_size):
            yield self.train[rows]


class Stepper:
    """The job's optimizer over some parameters, with its schedule by its own steps."""

    def __init__(self, job: Job, parameters: Iterable[nn.Parameter]) -> None:
        self._spec = job.optimizer
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._optimizer = job.optimizer.build(self._parameters) if self._parameters else None
        self._lr = self._optimizer.param_groups[0]["lr"] if self._optimizer else 0.0
        self._made = 0

    def step(self) -> None:
        """One step over the gradients there are, which are gone afterwards."""
        if self._optimizer is None:
            return
        self._optimizer.param_groups[0]["lr"] = self._lr * self._spec.factor(self._made)
        self._spec.clip(self._parameters)
        cast(Any, self._optimizer).step()
        self._optimizer.zero_grad(set_to_none=True)
        self._made += 1


class Baseline(ABC):
    """An algorithm in the middle of its training."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.clients = [Client(job, shard) for shard in range(job.shards)]
        self.rounds = 0

    def train_round(self) -> Trained:
        """Train one round, or epoch."""
        trained = Trained()
        self._train(self.rounds, trained)
        self.rounds += 1
        return trained

    @abstractmethod
    def _train(self, round_: int, trained: Trained) -> None: ...

    @abstractmethod
    def model_of(self, shard: int) -> SplitModel:
        """The model with which this shard is tested."""

    def state(self) -> State:
        """Weights and buffers of the (first client's) model."""
        return self.model_of(0).state_dict()

    def loss(self, model: SplitModel, batch: Batch) -> tuple[Tensor, float]:
        """Mean training loss of a batch, and its weight."""
        x, y = batch
        self._set_training(model)
        weight = float(len(y)) if self.job.loss_weight is None else float(self.job.loss_weight(y))
        return self.job.loss(model(x), y), weight

    def _set_training(self, model: SplitModel) -> None:
        model.train()
        if self.job.batch_norm == "frozen":
            for norm in tracked_norms(model).values():
                norm.eval()

    def test(self) -> tuple[float | None, float | None, dict[int, float]]:
        """Loss and accuracy over all held-out samples, and accuracy by shard."""
        loss_sum = weight = correct = 0.0
        samples, per_client = 0, dict[int, float]()
        for client in self.clients:
            if client.test is None:
                continue
            right = 0.0
            for rows in torch.arange(len(client.test)).split(TEST_BATCH):
                part, n, loss = self._score(self.model_of(client.shard), client.test[rows])
                right, weight, loss_sum = right + part, weight + n, loss_sum + loss * n
            samples, correct = samples + len(client.test), correct + right
            per_client[client.shard] = right / len(client.test)
        if not samples:
            return None, None, {}
        has_metric = self.job.metric is not None
        return loss_sum / weight, correct / samples if has_metric else None, per_client if has_metric else {}

    @torch.no_grad()
    def _score(self, model: SplitModel, batch: Batch) -> tuple[float, float, float]:
        x, y = batch
        output = model.eval()(x)
        weight = float(len(y)) if self.job.loss_weight is None else float(self.job.loss_weight(y))
        right = 0.0 if self.job.metric is None else float(self.job.metric(output, y))
        return right, weight, float(self.job.loss(output, y))


def client_parts(model: SplitModel) -> list[nn.Parameter]:
    """Parameters of head and tail."""
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("body.")]


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """The weighted mean of states; of whole numbers, such as batch norm's count of batches, the highest."""
    total = sum(weights)
    return {
        name: sum((w / total * s[name] for s, w in zip(states, weights, strict=True)), torch.zeros_like(first))
        if first.is_floating_point()
        else torch.stack([state[name] for state in states]).amax(0)
        for name, first in states[0].items()
    }
