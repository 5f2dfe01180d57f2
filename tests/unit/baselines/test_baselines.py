"""Every baseline against its textbook equation, written out by hand: float64, two clients, three steps and more."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import order
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zsfl
from zsfl import baselines

LR, MU, BATCH, SEED, ROUNDS = 0.3, 0.8, 4, 5, 3
SIZES = (12, 7)
"""Three batches and two, the last one smaller."""
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def model(tail: bool) -> zsfl.SplitModel:
    end = nn.Linear(4, 3)
    body: list[nn.Module] = [nn.Linear(5, 4), nn.Tanh()]
    if tail:
        return zsfl.SplitModel(nn.Linear(3, 5), nn.Sequential(*body), end).double()
    return zsfl.SplitModel(nn.Linear(3, 5), nn.Sequential(*body, end)).double()


def samples(shard: int) -> Batch:
    generator = torch.Generator().manual_seed(shard)
    x = torch.randn(SIZES[shard], 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (SIZES[shard],), generator=generator)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def weighted_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=WEIGHTS)


def job(tail: bool = True, weighted: bool = False, **options: Any) -> zsfl.Job:
    given: dict[str, Any] = {"optimizer": zsfl.sgd(LR, momentum=MU)} | options
    return zsfl.Job(
        name="baseline",
        model=lambda: model(tail),
        loss=weighted_loss if weighted else mean_loss,
        loss_weight=(lambda y: float(WEIGHTS[y].sum())) if weighted else None,
        data=lambda shard, _: (TensorDataset(*samples(shard)), TensorDataset(*samples(1 - shard))),
        batch_size=BATCH,
        shards=2,
        seed=SEED,
        **given,
    )


def first_weights(tail: bool) -> State:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        return {name: tensor.clone() for name, tensor in model(tail).state_dict().items()}


def gradient(w: State, batch: Batch, tail: bool, weighted: bool = False) -> State:
    """Of the mean loss of one batch."""
    w = {name: tensor.detach().requires_grad_() for name, tensor in w.items()}
    hidden = torch.tanh((batch[0] @ w["head.weight"].T + w["head.bias"]) @ w["body.0.weight"].T + w["body.0.bias"])
    end = "tail" if tail else "body.2"
    output = hidden @ w[f"{end}.weight"].T + w[f"{end}.bias"]
    loss = (weighted_loss if weighted else mean_loss)(output, batch[1])
    return dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def descend(w: State, v: State, g: State, only: Callable[[str], bool] = lambda _: True) -> None:
    """One step of gradient descent with momentum, of some of the weights, in place: v = mu v + g, w = w - lr v."""
    for name in g:
        if only(name):
            v[name] = MU * v[name] + g[name] if name in v else g[name]
            w[name] = w[name] - LR * v[name]


def batches(shard: int, round_: int) -> list[Batch]:
    x, y = samples(shard)
    return [(x[rows], y[rows]) for rows in order(SEED, shard, round_, SIZES[shard], True).split(BATCH)]


def mean_of(states: list[State]) -> State:
    return {n: (SIZES[0] * states[0][n] + SIZES[1] * states[1][n]) / sum(SIZES) for n in states[0]}


def is_body(name: str) -> bool:
    return name.startswith("body.")


def is_client(name: str) -> bool:
    return not is_body(name)


# --- each algorithm by hand: weights after ROUNDS rounds -----------------------------------------------------


def centralised(tail: bool) -> State:
    w, v = first_weights(tail), State()
    x, y = (torch.cat(column) for column in zip(samples(0), samples(1), strict=True))
    for round_ in range(ROUNDS):
        for rows in order(SEED, 2, round_, sum(SIZES), True).split(2 * BATCH):
            descend(w, v, gradient(w, (x[rows], y[rows]), tail))
    return w


def merged(tail: bool) -> State:
    """Proportional batches: 19 samples in windows of 8 are 3 windows; 12 = 4+4+4 and 7 = 2+2+3."""
    w, v = first_weights(tail), State()
    cuts = ([4, 4, 4], [2, 2, 3])
    for round_ in range(ROUNDS):
        orders = [order(SEED, shard, round_, SIZES[shard], True).split(cuts[shard]) for shard in range(2)]
        for window in range(3):
            taken = [tuple(column[orders[shard][window]] for column in samples(shard)) for shard in range(2)]
            x, y = (torch.cat(column) for column in zip(*taken, strict=True))
            descend(w, v, gradient(w, (x, y), tail))
    return w


def local(tail: bool) -> State:
    w, v = first_weights(tail), State()
    for round_ in range(ROUNDS):
        for batch in batches(0, round_):
            descend(w, v, gradient(w, batch, tail))
    return w


def fedavg(tail: bool, keep_momentum: bool = False) -> State:
    w, momenta = first_weights(tail), (State(), State())
    for round_ in range(ROUNDS):
        if not keep_momentum:
            momenta = (State(), State())
        own = [dict(w), dict(w)]
        for shard in range(2):
            for batch in batches(shard, round_):
                descend(own[shard], momenta[shard], gradient(own[shard], batch, tail))
        w = mean_of(own)
    return w


def splitfed_v1(tail: bool) -> State:
    return fedavg(tail, keep_momentum=True)


def splitfed_v2(tail: bool) -> State:
    w = first_weights(tail)
    body, at_server, at_clients = dict(w), State(), (State(), State())
    for round_ in range(ROUNDS):
        own = [dict(w), dict(w)]
        turns = [0, 1]
        random.Random(f"{SEED}/{round_}").shuffle(turns)
        for shard in turns:
            for batch in batches(shard, round_):
                g = gradient({**own[shard], **{n: t for n, t in body.items() if is_body(n)}}, batch, tail)
                descend(body, at_server, g, is_body)
                descend(own[shard], at_clients[shard], g, is_client)
        w = {**mean_of(own), **{n: t for n, t in body.items() if is_body(n)}}
    return w


def sl(tail: bool) -> State:
    w, at_server, at_clients = first_weights(tail), State(), (State(), State())
    for round_ in range(ROUNDS):
        for shard in range(2):
            for batch in batches(shard, round_):
                g = gradient(w, batch, tail)
                descend(w, at_server, g, is_body)
                descend(w, at_clients[shard], g, is_client)
    return w


def microsfl(tail: bool, summed: bool = False) -> State:
    w, v = first_weights(tail), State()
    for round_ in range(ROUNDS):
        total = {name: torch.zeros_like(tensor) for name, tensor in w.items()}
        for shard in range(2):
            for batch in batches(shard, round_):
                share = 1.0 if summed else len(batch[1]) / sum(SIZES)
                for name, g in gradient(w, batch, tail).items():
                    total[name] += share * g
        descend(w, v, total)
    return w


def microsfl_coded(tail: bool) -> State:
    return microsfl(tail, summed=True)


BY_HAND = {
    "centralised": centralised,
    "merged": merged,
    "local": local,
    "fedavg": fedavg,
    "sl": sl,
    "splitfed-v1": splitfed_v1,
    "splitfed-v2": splitfed_v2,
    "microsfl": microsfl,
    "microsfl-coded": microsfl_coded,
}


def trained(name: str, told: zsfl.Job, rounds: int = ROUNDS) -> State:
    baseline = baselines.make(name, told)
    for _ in range(rounds):
        baseline.train_round()
    return baseline.state()


@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
@pytest.mark.parametrize("name", baselines.BASELINES)
def test_a_baseline_is_its_textbook_equation(name: str, tail: bool) -> None:
    got, wanted = trained(name, job(tail)), BY_HAND[name](tail)
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-12)


def test_the_published_rule_is_a_full_batch_step_also_of_a_weighted_loss() -> None:
    w, v = first_weights(True), State()
    whole: Any = tuple(torch.cat(column) for column in zip(samples(0), samples(1), strict=True))
    descend(w, v, gradient(w, whole, True, weighted=True))
    for key, tensor in trained("microsfl", job(weighted=True), rounds=1).items():
        torch.testing.assert_close(tensor, w[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_a_round_says_what_it_came_to_and_two_runs_are_equal(name: str) -> None:
    told = job()
    first, again = list(baselines.run(name, told, 2)), list(baselines.run(name, told, 2))
    assert [(done.round, done.accuracy, done.loss, done.train_loss, done.per_client) for done in first] == [
        (done.round, done.accuracy, done.loss, done.train_loss, done.per_client) for done in again
    ]
    assert first[1].steps == 2 * first[0].steps > 0
    assert first[1].seconds > first[0].seconds > 0
    baseline = baselines.make(name, told)
    baseline.train_round()
    rights = []
    for shard in range(2):
        x, y = samples(1 - shard)  # what is held out from one is what the other trains on
        rights.append((baseline.model_of(shard).eval()(x).argmax(1) == y).double())
    assert first[0].per_client == {shard: pytest.approx(right.mean().item()) for shard, right in enumerate(rights)}
    assert first[0].accuracy == pytest.approx(torch.cat(rights).mean().item())


def test_rates_follow_the_schedule_of_each_optimizer() -> None:
    told = job(optimizer=zsfl.sgd(LR, schedule=lambda step: 0.5**step))
    w = first_weights(True)
    for number, batch in enumerate(batches(0, 0)):
        g = gradient(w, batch, True)
        w = {name: tensor - LR * 0.5**number * g[name] for name, tensor in w.items()}
    for key, tensor in trained("local", told, rounds=1).items():
        torch.testing.assert_close(tensor, w[key], rtol=0, atol=1e-12)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(zsfl.ConfigError, match="no baseline 'fedprox': use one of centralised, merged, local"):
        baselines.make("fedprox", job())
