"""Every baseline against its textbook equation, written out by hand: float64, two clients, three steps and more."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import order, train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import zsfl
from zsfl import baselines

LR, MU, BATCH, SEED, ROUNDS = 0.3, 0.8, 4, 5, 3
SIZES = (12, 7)
"""Three batches and two, the last one smaller."""
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take longer than such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    outputs = [[baseline.model_of(shard).eval()(samples(1 - other)[0]) for other in range(2)] for shard in range(2)]
    targets = [samples(1)[1], samples(0)[1]]  # what is held out from one is what the other trains on
    own = {shard: (outputs[shard][shard].argmax(1) == targets[shard]).double().mean().item() for shard in range(2)}
    assert first[0].per_client == pytest.approx(own)
    # Each client's model on the held-out samples of both, weighted by what it was trained on.
    together, y = [torch.cat(row) for row in outputs], torch.cat(targets)
    shares = [size / sum(SIZES) for size in SIZES]
    right = [(output.argmax(1) == y).double().mean().item() for output in together]
    losses = [mean_loss(output, y).item() for output in together]
    assert first[0].accuracy == pytest.approx(sum(share * one for share, one in zip(shares, right, strict=True)))
    assert first[0].loss == pytest.approx(sum(share * one for share, one in zip(shares, losses, strict=True)))


def test_clients_that_stay_alone_are_tested_on_what_is_held_out_from_all() -> None:
    (done,) = baselines.run("local", job(), 1)
    sizes = {shard: SIZES[1 - shard] for shard in range(2)}
    on_their_own = sum(done.per_client[shard] * size for shard, size in sizes.items()) / sum(SIZES)
    assert done.accuracy != pytest.approx(on_their_own)


def test_losses_are_weighed_as_the_job_says() -> None:
    start = model(True)
    start.load_state_dict(first_weights(True))
    baseline = baselines.make("microsfl", job(weighted=True))
    trained_on, held_out = (
        [torch.cat(column) for column in zip(*(samples(shard) for shard in shards), strict=True)]
        for shards in ((0, 1), (1, 0))
    )
    sums = baseline.train_round()
    assert sums.loss_sum / sums.weight == pytest.approx(weighted_loss(start(trained_on[0]), trained_on[1]).item())
    assert sums.weight == pytest.approx(WEIGHTS[trained_on[1]].sum().item())
    end = model(True)
    end.load_state_dict(baseline.state())
    assert baseline.test()[0] == pytest.approx(weighted_loss(end(held_out[0]), held_out[1]).item())


class OneByOne(Dataset[Any]):
    """A dataset that is read sample by sample."""

    def __init__(self, shard: int) -> None:
        self.x, self.y = samples(shard)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Batch:
        return self.x[index], self.y[index]


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_a_dataset_without_tensors_will_do_where_a_batch_takes_nothing_of_a_client(name: str) -> None:
    told = dataclasses.replace(job(batches="equal"), batch_size=1)  # the second client has 7 batches, the first has 12
    wanted = trained(name, told, rounds=1)
    read_one_by_one = dataclasses.replace(told, data=lambda shard, _: (OneByOne(shard), None))
    for key, tensor in trained(name, read_one_by_one, rounds=1).items():
        assert torch.equal(tensor, wanted[key])


@pytest.mark.parametrize(("batches", "steps"), [("proportional", 2), ("equal", 1), ("equal", 2)])
def test_merged_takes_the_batches_of_exact_mode(batches: str, steps: int) -> None:
    wanted = train(
        lambda: model(True).parts(),
        [samples(0), samples(1)],
        mean_loss,
        (torch.optim.SGD, {"lr": LR, "momentum": MU}),
        seed=SEED,
        rounds=ROUNDS,
        batch_size=2,
        shuffle=True,
        proportional=batches == "proportional",
        steps=steps,
    )
    got = trained("merged", dataclasses.replace(job(batches=batches, steps=steps), batch_size=2))
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-12)


def clipped(g: State, groups: tuple[Callable[[str], bool], ...], bound: float) -> State:
    """Gradients of each group scaled down to a common 2-norm of `bound`."""
    scaled = State()
    for group in groups:
        own = {name: tensor for name, tensor in g.items() if group(name)}
        norm = torch.cat([tensor.flatten() for tensor in own.values()]).norm()
        assert norm > bound
        scaled |= {name: tensor * bound / (norm + 1e-6) for name, tensor in own.items()}
    return scaled


@pytest.mark.parametrize(
    ("name", "groups"),
    [("centralised", (lambda _: True,)), ("splitfed-v1", (is_body, is_client)), ("sl", (is_body, is_client))],
)
def test_server_and_client_clip_what_they_hold(name: str, groups: tuple[Callable[[str], bool], ...]) -> None:
    told = job(optimizer=zsfl.sgd(LR, clip_norm=0.01))
    w = first_weights(True)
    alone = dataclasses.replace(told, shards=1)
    for batch in batches(0, 0) if name != "centralised" else centralised_batches():
        g = clipped(gradient(w, batch, True), groups, 0.01)
        w = {key: tensor - LR * g[key] for key, tensor in w.items()}
    for key, tensor in trained(name, alone, rounds=1).items():
        torch.testing.assert_close(tensor, w[key], rtol=0, atol=1e-12)


def centralised_batches() -> list[Batch]:
    """Those of one client alone: its samples in the order of the pool, which is no client's own."""
    x, y = samples(0)
    return [(x[rows], y[rows]) for rows in order(SEED, 1, 0, SIZES[0], True).split(BATCH)]


def normed(dropout: float = 0.0) -> zsfl.SplitModel:
    body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(dropout))
    return zsfl.SplitModel(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), body, nn.Linear(4, 3)).double()


@pytest.mark.parametrize("name", ["fedavg", "splitfed-v1", "splitfed-v2", "sl"])
def test_running_statistics_are_averaged_by_samples_and_counts_of_batches_never(name: str) -> None:
    told = dataclasses.replace(job(optimizer=zsfl.sgd(LR)), model=normed)
    models = [told.build(), told.build()]
    if name in ("splitfed-v2", "sl"):
        models[1].body = models[0].body
    if name == "sl":
        models[1] = models[0]
    turns = [0, 1]
    if name == "splitfed-v2":
        random.Random(f"{SEED}/0").shuffle(turns)
    for shard in turns:
        for x, y in batches(shard, 0):
            weights = list(models[shard].parameters())
            for weight, g in zip(weights, torch.autograd.grad(mean_loss(models[shard](x), y), weights), strict=True):
                weight.data -= LR * g
    got = trained(name, told, rounds=1)
    for key, tensor in mean_of([model.state_dict() for model in models]).items():
        if key.endswith("num_batches_tracked"):
            shared = name == "sl" or (name == "splitfed-v2" and is_body(key))
            assert got[key].item() == (3 + 2 if shared else max(3, 2))
        else:
            torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["centralised", "splitfed-v2"])
def test_frozen_statistics_stay_and_dropout_is_the_same_again(name: str) -> None:
    told = dataclasses.replace(job(batch_norm="frozen"), model=lambda: normed(dropout=0.5))
    first, again = ([done.loss for done in baselines.run(name, told, 2)] for _ in range(2))
    other = [done.loss for done in baselines.run(name, dataclasses.replace(told, model=normed), 2)]
    assert first == again != other
    start = told.build().state_dict()
    for key, tensor in trained(name, told, rounds=1).items():
        if "running" in key or "tracked" in key:
            torch.testing.assert_close(tensor, start[key], rtol=0, atol=1e-12)


def test_a_round_of_fedavg_forgets_momenta_and_goes_on_with_the_schedule() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 1.0

    told = dataclasses.replace(job(optimizer=zsfl.sgd(LR, schedule=schedule)), shards=1)
    asked.clear()
    trained("fedavg", told, rounds=2)
    assert asked == list(range(6))


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
