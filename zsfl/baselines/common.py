"""What all baselines share: clients with their data, one mini-batch step, averages, the held-out test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
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
    """In 0..1, over all held-out samples of all shards; None where there are none, or the job has no metric.

    Where clients keep models of their own, the mean over these models, weighted by training samples; so is `loss`.
    """
    per_client: dict[int, float]
    """By shard, its model on its own held-out samples."""
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
    """The job's optimizer over some parameters, with its schedule by its own steps; clips them by themselves."""

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

    def forget(self) -> None:
        """Drop momenta and moments; the schedule goes on."""
        if self._optimizer is not None:
            self._optimizer.state.clear()


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
        """This shard's model after a round; the same object for all shards where they share one."""

    def state(self) -> State:
        """Weights and buffers of the (first client's) model."""
        return self.model_of(0).state_dict()

    def epoch(self, client: Client, model: SplitModel, round_: int, trained: Trained, *steppers: Stepper) -> None:
        """One client goes once over its data, see `step`."""
        for batch in client.batches(round_):
            self.step(model, batch, trained, *steppers)

    def step(self, model: SplitModel, batch: Batch, trained: Trained, *steppers: Stepper) -> None:
        """One mini-batch step of what `steppers` hold; without any, its gradient adds to what is there."""
        loss, weight = self.loss(model, batch)
        loss.backward()
        for stepper in steppers:
            stepper.step()
        trained.add(loss, weight)

    def loss(self, model: SplitModel, batch: Batch) -> tuple[Tensor, float]:
        """Mean training loss of a batch, and its weight."""
        x, y = batch
        self._set_training(model)
        return self.job.loss(model(x), y), self._weight(y)

    def _set_training(self, model: SplitModel) -> None:
        model.train()
        if self.job.batch_norm == "frozen":
            for norm in tracked_norms(model).values():
                norm.eval()

    def test(self) -> tuple[float | None, float | None, dict[int, float]]:
        """Loss and accuracy over all held-out samples, and accuracy by shard."""
        held_out = {client.shard: client.test for client in self.clients if client.test is not None}
        if not held_out:
            return None, None, {}
        samples = {shard: len(data) for shard, data in held_out.items()}
        behind = Counter[SplitModel]()
        for client in self.clients:
            behind[self.model_of(client.shard)] += client.samples
        loss = accuracy = 0.0
        per_client = dict[int, float]()
        for model, count in behind.items():
            scores = {shard: self._score(model, data) for shard, data in held_out.items()}
            right, weight, loss_sum = (sum(column) for column in zip(*scores.values(), strict=True))
            share = count / behind.total()
            loss, accuracy = loss + share * loss_sum / weight, accuracy + share * right / sum(samples.values())
            own = (shard for shard in held_out if self.model_of(shard) is model)
            per_client |= {shard: scores[shard][0] / samples[shard] for shard in own}
        return (loss, None, {}) if self.job.metric is None else (loss, accuracy, per_client)

    @torch.no_grad()
    def _score(self, model: SplitModel, data: Batches) -> tuple[float, float, float]:
        """Right samples, weight, and loss summed over it."""
        model.eval()
        right = total = loss_sum = 0.0
        for rows in torch.arange(len(data)).split(TEST_BATCH):
            x, y = data[rows]
            output = model(x)
            weight = self._weight(y)
            total, loss_sum = total + weight, loss_sum + weight * float(self.job.loss(output, y))
            right += 0.0 if self.job.metric is None else float(self.job.metric(output, y))
        return right, total, loss_sum

    def _weight(self, y: Tensor) -> float:
        return float(len(y)) if self.job.loss_weight is None else float(self.job.loss_weight(y))


def union(picks: Iterable[tuple[Client, Tensor]]) -> Batch:
    """One batch of these rows of these clients, of some maybe none."""
    picked = [client.train[rows] for client, rows in picks if len(rows)]
    x, y = (torch.cat(column) for column in zip(*picked, strict=True))
    return x, y


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
