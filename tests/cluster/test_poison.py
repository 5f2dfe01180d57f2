"""What bad clients can do to a run, and what keeps them from it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from helpers.exact import OPTIMIZERS, Case, Ran, assert_close, assert_equal, in_process
from helpers.ledger import ledger
from numpy.typing import NDArray
from torch import Tensor, nn

import zsfl
from zsfl.aggregator.audit import replay_versions
from zsfl.client.local import ClientWeights, LocalParts, StepInHand
from zsfl.ids import parse_cid
from zsfl.reports import AnyReport, Note
from zsfl.testing import check_history

Votes = NDArray[np.float64]
EVEN = Case(sizes=(17, 12, 26, 19, 14), batches="proportional", steps=2, rounds=2)


def by_median(votes: Votes) -> Votes:
    return np.median(votes, axis=0)


def by_trimming(votes: Votes) -> Votes:
    return np.sort(votes, axis=0)[1:-1].mean(axis=0)


def by_krum(votes: Votes, m: int = 1) -> Votes:
    n = len(votes)
    distances = ((votes[:, None] - votes[None]) ** 2).sum(-1)
    scores = [sorted(distances[i][np.arange(n) != i])[: n - 3] for i in range(n)]
    return votes[np.argsort([sum(score) for score in scores], kind="stable")[:m]].mean(axis=0)


def bounded(norm: float) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad * min(1.0, norm / float(grad.norm()))


def ordinary(
    case: Case, rule: Callable[[Votes], Votes] | None, bound: Callable[[Tensor], Tensor] = lambda grad: grad
) -> dict[str, Tensor]:
    """Plain training in which each client's gradient is made by itself; None: their mean by samples."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(case.seed)
        parts = case.parts()
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    factory, options = OPTIMIZERS[case.optimizer]
    stepper: Any = factory(model.parameters(), **options)
    parameters = list(model.parameters())
    data = [case.samples(shard) for shard in range(case.clients)]
    # In the order in which the steps are counted: every step of a window is one batch of one client.
    steps = reference.merged_batches(
        data, seed=case.seed, rounds=case.rounds, batch_size=case.batch_size, shuffle=True, proportional=True
    )
    while window := [batch for batch in (next(steps, None) for _ in range(case.steps)) if batch is not None]:
        votes: list[Tensor] = []
        sizes: list[int] = []
        for shard in range(case.clients):
            total, n = torch.zeros(()), 0
            for batches in window:
                x, y = batches[shard]
                grads = torch.autograd.grad(case.loss(model(x), y) * len(y), parameters)
                total = total + bound(torch.cat([grad.reshape(-1) for grad in grads]) / len(y)) * len(y)
                n += len(y)
            votes.append(total / n)
            sizes.append(n)
        stacked = torch.stack(votes).numpy()
        result = np.average(stacked, axis=0, weights=sizes) if rule is None else rule(stacked)
        at = 0
        for parameter in parameters:
            parameter.grad = torch.tensor(result[at : at + parameter.numel()]).view(parameter.shape)
            at += parameter.numel()
        stepper.step()
    return model.state_dict()


RULES: dict[str, tuple[Any, Callable[[Votes], Votes]]] = {
    "median": (zsfl.Median(f=2), by_median),
    "trimmed": (zsfl.TrimmedMean(), by_trimming),
    "krum": (zsfl.Krum(), by_krum),
    "multi-krum": (zsfl.Krum(m=2), lambda votes: by_krum(votes, 2)),
}


def assert_proven(ran: Ran, case: Case) -> None:
    """Nothing is lost, and every version can be made again, bit for bit."""
    check_history(ran.folder)
    made = len(ledger(ran.folder))
    assert list(replay_versions(ran.folder, case.job(), 1, made)) == list(range(1, made + 1))


@pytest.mark.parametrize(("tail", "steps"), [(True, 2), (False, 1)], ids=["u-shaped", "label-sharing"])
@pytest.mark.parametrize("rule", RULES)
async def test_every_rule_equals_ordinary_training_with_it(rule: str, tail: bool, steps: int, tmp_path: Path) -> None:
    average, by = RULES[rule]
    case = replace(EVEN, average=average, tail=tail, steps=steps)
    ran = await in_process(case, tmp_path, servers=2, keep_mib=64)
    assert_close(ran.weights, ordinary(case, by))
    assert_proven(ran, case)
    chosen = {len(record["chosen"]) for record in ledger(ran.folder)}
    assert chosen == {"krum": {1}, "multi-krum": {2}}.get(rule, {0})


@pytest.mark.parametrize("rule", ["mean", "median"])
async def test_long_gradients_are_clipped_and_the_ledger_says_whose(rule: str, tmp_path: Path) -> None:
    norm = 0.4
    case = replace(EVEN, norm_bound=norm)
    by = None
    if rule != "mean":
        average, by = RULES[rule]
        case = replace(case, average=average)
    ran = await in_process(case, tmp_path, keep_mib=64)
    assert_close(ran.weights, ordinary(case, by, bounded(norm)))
    assert_proven(ran, case)
    clipped = [(cid, one) for record in ledger(ran.folder) for cid, one in record["clipped"].items()]
    counted = [cid for record in ledger(ran.folder) for cid in record["counted"]]
    assert 0 < len(clipped) < len(counted)  # else the test would not tell one from the other
    assert all(one["by"] == pytest.approx(norm / one["norm"]) for _, one in clipped)
    assert all(one["client"] == f"client-{parse_cid(cid).shard}" for cid, one in clipped)


async def test_a_bound_that_nobody_reaches_changes_no_bit(tmp_path: Path) -> None:
    plain = await in_process(EVEN, tmp_path, run="plain")
    bound = await in_process(replace(EVEN, norm_bound=1e9), tmp_path, run="bound")
    assert_equal(bound.weights, plain.weights)


async def test_elastic_with_nobody_late_is_exact_under_a_rule_too(tmp_path: Path) -> None:
    case = replace(EVEN, average=zsfl.TrimmedMean(), norm_bound=0.4)
    exact = await in_process(case, tmp_path, run="exact")
    elastic = replace(case, mode=zsfl.Elastic(quorum=1.0, grace=100.0))
    assert_equal((await in_process(elastic, tmp_path, run="elastic")).weights, exact.weights)


@pytest.mark.parametrize("mode", [zsfl.Elastic(quorum=0.5, grace=0.0, deadline_s=0.5), zsfl.Async(samples=30)])
async def test_what_is_late_is_bounded_as_well(mode: Any, tmp_path: Path) -> None:
    case = replace(EVEN, steps=1, mode=mode, norm_bound=zsfl.NormBound(0.4, "refuse"), rounds=4)
    ran = await in_process(case, tmp_path, keep_mib=64)
    check_history(ran.folder, may_be_pending=True)
    records = ledger(ran.folder)
    refused = [why for record in records for why in record["dropped"].values() if why.startswith("refused")]
    assert refused
    assert all("its gradient has a norm of" in why and "(client-" in why for why in refused)
    assert list(replay_versions(ran.folder, case.job(), 1, len(records)))[-1] == len(records)


# --- a bad client ---------------------------------------------------------------------------------------

BAD = 3
BAD_NAME = f"client-{BAD}"


def digits(**fields: Any) -> zsfl.Job:
    def model() -> zsfl.SplitModel:
        return zsfl.SplitModel(
            head=nn.Sequential(nn.Linear(64, 48), nn.ReLU()),
            body=nn.Sequential(nn.Linear(48, 48), nn.ReLU()),
            tail=nn.Linear(48, 10),
        )

    stated: dict[str, Any] = {
        "name": "poisoned",
        "model": model,
        "loss": F.cross_entropy,
        "data": zsfl.shards(zsfl.digits),
        "optimizer": zsfl.adam(lr=0.01),
        "batch_size": 24,
        "rounds": 12,
        "shards": 10,
    }
    return zsfl.Job(**(stated | fields))


def poison(patch: pytest.MonkeyPatch, by: float) -> None:
    """All gradients of one client, and what it tells split servers of them, are multiplied by something."""
    turn, finish = LocalParts.turn, LocalParts.finish

    def poisoned_turn(self: LocalParts, weights: ClientWeights, step: StepInHand, output: Tensor) -> None:
        turn(self, weights, step, output)
        if parse_cid(step.cid).shard == BAD and step.grad is not None:
            step.grad = step.grad * by

    def poisoned_finish(self: LocalParts, weights: ClientWeights, step: StepInHand, grad: Tensor | None) -> None:
        finish(self, weights, step, grad)
        if parse_cid(step.cid).shard == BAD:
            tail = {name: grad * by for name, grad in step.grads.items() if name.startswith("tail.")}
            step.grads |= tail  # the head's come of the poisoned one at the cut

    patch.setattr(LocalParts, "turn", poisoned_turn)
    patch.setattr(LocalParts, "finish", poisoned_finish)


class Told:
    """What the nodes of a run said, and where it is left."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def hear(self, report: AnyReport) -> None:
        if isinstance(report, Note) and report.level == "warning":
            self.warnings.append(report.message)

    async def train(self, job: zsfl.Job, runs: Path, run: str) -> Path:
        cluster = zsfl.LocalCluster(job, in_process=True, split_servers=2, runs=runs, run=run, on_report=self.hear)
        async with cluster:
            self.accuracy = [report.accuracy async for report in cluster.train()][-1] or 0.0
        assert cluster.result is not None
        return Path(cluster.result.folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Accuracy where nobody is bad."""
    told = Told()
    asyncio.run(told.train(digits(), tmp_path_factory.mktemp("clean"), "clean"))
    assert told.accuracy > 0.95
    return told.accuracy


@pytest.mark.parametrize(
    ("by", "fields", "points", "refuses"),
    [
        (math.nan, {"norm_bound": 5.0}, 1.0, True),
        (math.nan, {"average": zsfl.Median()}, 1.0, True),
        (-100.0, {"norm_bound": zsfl.NormBound(10.0, "refuse")}, 1.0, True),
        (-100.0, {"average": zsfl.TrimmedMean()}, 1.0, False),
        # A clipped one still pulls as hard as an honest client may; Krum leaves the samples of honest ones out as well.
        (-100.0, {"norm_bound": 1.0}, 2.5, False),
        (-100.0, {"average": zsfl.Krum(f=1, m=7)}, 2.5, False),
    ],
    ids=["nan-bound", "nan-median", "long-refused", "long-trimmed", "long-clipped", "long-krum"],
)
@pytest.mark.timeout(300)  # the first one trains the clean run as well
async def test_one_bad_client_of_ten_does_no_harm(
    clean: float,
    by: float,
    fields: dict[str, Any],
    points: float,
    refuses: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(monkeypatch, by)
    told = Told()
    folder = await told.train(digits(**fields), tmp_path, "run")
    assert told.accuracy > clean - points / 100
    check_history(folder)
    records = ledger(folder)
    refused = {cid: why for record in records for cid, why in record["dropped"].items()}
    assert {parse_cid(cid).shard for cid in refused} == ({BAD} if refuses else set[int]())
    assert all(f"({BAD_NAME})" in why for why in refused.values())
    named = [said for said in told.warnings if "refused again and again" in said]
    assert len(named) == refuses
    assert all(f"the steps of {BAD_NAME} (shard {BAD})" in said for said in named)
    if isinstance(fields.get("average"), zsfl.Krum):
        assert not any(BAD in record["chosen"] for record in records)


async def test_without_defences_the_run_ends_and_names_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, math.nan)
    with pytest.raises(zsfl.RunFailed, match=rf"contribution .*-s0000{BAD}-.* of .*{BAD_NAME} is not finite in"):
        await Told().train(digits(), tmp_path, "run")


async def test_with_too_few_clients_nothing_counts_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, math.nan)
    told = Told()
    await told.train(digits(average=zsfl.Median(), shards=4, rounds=1), tmp_path, "enough")
    assert not any("nothing counts" in said for said in told.warnings)
    told = Told()
    folder = await told.train(digits(average=zsfl.Median(f=2), shards=5, rounds=1), tmp_path, "short")
    (said,) = [said for said in told.warnings if "nothing counts" in said]
    assert "Median(f=2) needs the steps of 5 clients, and those of 4 could be used" in said
    check_history(folder)
    records = ledger(folder)
    assert not any(record["counted"] for record in records)
    assert len({record["weights"] for record in records}) == 1
