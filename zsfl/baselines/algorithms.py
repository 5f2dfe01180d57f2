"""One class for each algorithm, as its paper states it."""

from __future__ import annotations

import random

import torch
from torch import nn

from zsfl.baselines.common import Baseline, Stepper, Trained, average, client_parts, union
from zsfl.learning.batches import round_order
from zsfl.learning.job import Job
from zsfl.learning.model import SplitModel
from zsfl.learning.plan import Plan


class _OneModel(Baseline):
    """There is one model, and one optimizer."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.model = job.build()
        self.stepper = Stepper(job, self.model.parameters())

    def model_of(self, shard: int) -> SplitModel:
        return self.model


class Centralised(_OneModel):
    """One process with the data of all clients, shuffled together, in batches as large as one of each client."""

    def _train(self, round_: int, trained: Trained) -> None:
        job = self.job
        owners = torch.cat([torch.full((client.samples,), client.shard) for client in self.clients])
        rows = torch.cat([torch.arange(client.samples) for client in self.clients])
        order = round_order(job.seed, job.shards, round_, len(rows), job.shuffle)
        for chosen in order.split(job.batch_size * job.shards):
            picks = ((client, rows[chosen[owners[chosen] == client.shard]]) for client in self.clients)
            self.step(self.model, union(picks), trained, self.stepper)


class Merged(_OneModel):
    """One process on the very batches of exact mode: the union of the batches of all clients, window after window."""

    def _train(self, round_: int, trained: Trained) -> None:
        job, samples = self.job, {client.shard: client.samples for client in self.clients}
        plan = Plan.of(job, samples)
        orders = {
            shard: round_order(job.seed, shard, round_, count, job.shuffle).split(job.batch_sizes(count, plan.windows))
            for shard, count in samples.items()
        }
        for window in range(plan.windows):
            taken = range(window * job.steps, (window + 1) * job.steps)
            picks = ((client, orders[client.shard][k]) for client in self.clients for k in taken)
            self.step(self.model, union(picks), trained, self.stepper)


class MicroSFL(_OneModel):
    """MicroSFL as published (doi 10.22967/HCIS.2026.16.013): one step a round, on the gradient over all samples."""

    def _train(self, round_: int, trained: Trained) -> None:
        for client in self.clients:
            for batch in client.batches(round_):
                loss, weight = self.loss(self.model, batch)
                (loss * weight).backward()
                trained.add(loss, weight)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= trained.weight
        self.stepper.step()


class MicroSFLCoded(_OneModel):
    """MicroSFL as its code does it: the batches' mean gradients are summed, not averaged, and make one step a round."""

    def _train(self, round_: int, trained: Trained) -> None:
        for client in self.clients:
            self.epoch(client, self.model, round_, trained)
        self.stepper.step()


class _ModelEach(Baseline):
    """Every client has a whole model: its own parts, and a body that is its own or a copy for it at the server."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.models = [job.build() for _ in self.clients]
        self.steppers = [self._steppers(model) for model in self.models]

    def _steppers(self, model: SplitModel) -> list[Stepper]:
        return [Stepper(self.job, model.parameters())]

    def model_of(self, shard: int) -> SplitModel:
        return self.models[0]  # after an average all are equal

    def _train_each(self, round_: int, trained: Trained) -> None:
        """Every client goes once over its data, alone."""
        for client, model, steppers in zip(self.clients, self.models, self.steppers, strict=True):
            self.epoch(client, model, round_, trained, *steppers)

    def _average_models(self) -> None:
        mean = average([model.state_dict() for model in self.models], [client.samples for client in self.clients])
        for model in self.models:
            model.load_state_dict(mean)


class Local(_ModelEach):
    """Every client trains alone on its own data."""

    def _train(self, round_: int, trained: Trained) -> None:
        self._train_each(round_, trained)

    def model_of(self, shard: int) -> SplitModel:
        return self.models[shard]


class FedAvg(_ModelEach):
    """McMahan et al. 2017: every client trains the whole model for an epoch, the models are averaged by samples.

    Clients keep no state between rounds, so their optimizers begin anew.
    """

    def _train(self, round_: int, trained: Trained) -> None:
        for stepper in (one for steppers in self.steppers for one in steppers):
            stepper.forget()
        self._train_each(round_, trained)
        self._average_models()


class SplitFedV1(_ModelEach):
    """Thapa et al. 2022, V1: clients train in parallel, each with a copy of the body; all parts are averaged an epoch.

    In arithmetic it is FedAvg whose optimizers persist, and clip gradients of client and server apart.
    """

    def _steppers(self, model: SplitModel) -> list[Stepper]:
        return [Stepper(self.job, model.body.parameters()), Stepper(self.job, client_parts(model))]

    def _train(self, round_: int, trained: Trained) -> None:
        self._train_each(round_, trained)
        self._average_models()


class _OneBody(Baseline):
    """Clients have their own head and tail; there is one body, with one optimizer."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.models = [job.build() for _ in self.clients]
        body: nn.Module = self.models[0].body
        for model in self.models:
            model.body = body
        self.server = Stepper(job, body.parameters())
        self.steppers = [Stepper(job, client_parts(model)) for model in self.models]

    def model_of(self, shard: int) -> SplitModel:
        return self.models[-1]  # once clients are averaged all are equal; where they take turns it is the newest

    def _train_client(self, shard: int, round_: int, trained: Trained) -> None:
        self.epoch(self.clients[shard], self.models[shard], round_, trained, self.server, self.steppers[shard])


class SplitFedV2(_OneBody):
    """Thapa et al. 2022, V2: clients in random order, one body; heads and tails are averaged."""

    def _train(self, round_: int, trained: Trained) -> None:
        order = list(range(len(self.clients)))
        random.Random(f"{self.job.seed}/{round_}").shuffle(order)
        for shard in order:
            self._train_client(shard, round_, trained)
        states = [
            {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("body.")}
            for model in self.models
        ]
        mean = average(states, [client.samples for client in self.clients])
        for model in self.models:
            model.load_state_dict(mean, strict=False)


class SL(_OneBody):
    """Gupta and Raskar 2018, split learning: one client after another; head and tail are handed on to the next."""

    def _train(self, round_: int, trained: Trained) -> None:
        for shard, model in enumerate(self.models):
            model.load_state_dict(self.models[shard - 1].state_dict())  # before the first comes the last of before
            self._train_client(shard, round_, trained)
