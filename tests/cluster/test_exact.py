"""A run in exact mode is ordinary training on the union of all clients' batches, whoever computes what where."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reference
from helpers.exact import (
    OPTIMIZERS,
    Case,
    Ran,
    assert_close,
    assert_equal,
    in_process,
    in_processes,
    ordinary,
    spills_left,
)
from torch import Tensor

import zsfl
from zsfl.split_server import body
from zsfl.split_server.merging import MergePolicy


def untrained(case: Case) -> dict[str, Tensor]:
    return reference.train(
        case.parts,
        [case.samples(0)],
        case.loss,
        OPTIMIZERS[case.optimizer],
        seed=case.seed,
        rounds=0,
        batch_size=1,
        shuffle=False,
    )


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
async def test_equals_training_in_one_process(optimizer: str, tail: bool, servers: int, tmp_path: Path) -> None:
    case = Case(optimizer=optimizer, tail=tail)
    ran = await in_process(case, tmp_path, servers=servers)
    expected, before = ordinary(case), untrained(case)
    assert_close(ran.weights, expected)
    # Every parameter of every part moved, and much further than the tolerance.
    assert all((tensor - before[name]).abs().max() > 1e-3 for name, tensor in expected.items())
    assert [report.samples for report in ran.reports] == [sum(case.sizes)] * case.rounds
    assert spills_left(tmp_path) == []


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batches", ["proportional", "equal"])
@pytest.mark.parametrize(("optimizer", "tail"), [("momentum", True), ("adam", False)])
async def test_windows_of_either_rule_and_of_several_steps(
    optimizer: str, tail: bool, batches: str, steps: int, tmp_path: Path
) -> None:
    case = Case(optimizer=optimizer, tail=tail, batches=batches, steps=steps, sizes=(13, 7, 20, 2), rounds=3)
    ran = await in_process(case, tmp_path, servers=2)
    assert_close(ran.weights, ordinary(case))
    assert [report.samples for report in ran.reports] == [sum(case.sizes)] * case.rounds


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
@pytest.mark.parametrize("batch_norm", ["merged", "frozen"])
async def test_batch_norm_of_the_merged_batch_or_frozen_is_ordinary_training_too(
    batch_norm: str, tail: bool, optimizer: str, tmp_path: Path
) -> None:
    case = Case(norm=True, batch_norm=batch_norm, tail=tail, optimizer=optimizer, rounds=3)
    ran = await in_process(case, tmp_path, servers=3)
    expected = ordinary(case)
    assert_close(ran.weights, expected)  # the running statistics included
    assert expected["body.1.num_batches_tracked"].item() == (12 if batch_norm == "merged" else 0)
    assert spills_left(tmp_path) == []


@pytest.mark.parametrize(
    ("case", "servers", "client_processes"),
    [
        (Case(optimizer="momentum"), 3, None),
        (Case(optimizer="adam", tail=False), 1, None),
        (Case(optimizer="weight-decay"), 2, 2),
    ],
    ids=["u-shaped momentum", "label-sharing adam", "several clients in one process"],
)
async def test_equals_training_in_one_process_across_processes(
    case: Case, servers: int, client_processes: int | None, tmp_path: Path
) -> None:
    ran = await in_processes(case, tmp_path, servers=servers, client_processes=client_processes)
    assert_close(ran.weights, ordinary(case))
    assert_equal(ran.weights, (await in_process(case, tmp_path, run="inside")).weights)
    assert spills_left(tmp_path) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(frozen_head=True),
        Case(frozen_head=True, tail=False),
        Case(weighted=True),
        Case(weighted=True, tail=False, optimizer="adam"),
    ],
    ids=["frozen head", "frozen head, label-sharing", "weighted loss", "weighted loss, label-sharing"],
)
async def test_frozen_heads_and_weighted_losses_are_exact(case: Case, tmp_path: Path) -> None:
    ran = await in_process(case, tmp_path, servers=2)
    assert_close(ran.weights, ordinary(case))


async def test_one_client_is_enough(tmp_path: Path) -> None:
    case = Case(sizes=(13,))
    assert_close((await in_process(case, tmp_path)).weights, ordinary(case))


@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
async def test_runs_are_bit_identical_whoever_serves(tail: bool, tmp_path: Path) -> None:
    case = Case(tail=tail, optimizer="adam", dropout=0.3)
    first = await in_process(case, tmp_path, servers=1)
    again = await in_process(case, tmp_path, servers=1)
    spread = await in_process(case, tmp_path, servers=3, client_processes=2)
    assert_equal(first.weights, again.weights)
    assert_equal(first.weights, spread.weights)
    # The dropout did something: without it the run ends elsewhere.
    plain = ordinary(replace(case, dropout=0.0))
    assert not torch.allclose(first.weights["head.0.weight"], plain["head.0.weight"])


async def test_doubling_the_clients_changes_nothing(tmp_path: Path) -> None:
    case = Case(shuffle=False, optimizer="adam")
    once = await in_process(case, tmp_path)
    twice = await in_process(replace(case, copies=2), tmp_path, servers=2)
    assert_close(once.weights, twice.weights)
    assert [report.train_loss for report in twice.reports] == pytest.approx([r.train_loss for r in once.reports])


async def test_reported_losses_are_those_of_ordinary_training(tmp_path: Path) -> None:
    case = Case(weighted=True, rounds=1, batch_size=32, shuffle=False)
    [report] = (await in_process(case, tmp_path, servers=2)).reports
    x, y = (torch.cat(column) for column in zip(*map(case.samples, range(case.clients)), strict=True))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(case.seed)
        model = torch.nn.Sequential(*case.parts().values())
    assert report.train_loss == pytest.approx(case.loss(model(x), y).item(), abs=1e-12)


async def test_a_server_that_forgot_a_forward_is_sent_the_input_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(sizes=(13, 7, 20, 4) * 3, dropout=0.2)
    roomy = await in_process(case, tmp_path, slots=64, client_processes=1)
    monkeypatch.setattr(body, "FORWARDS_PER_SLOT", 0)
    tight = await in_process(case, tmp_path, slots=1, client_processes=1)
    assert_equal(tight.weights, roomy.weights)
    assert sum(peer.get("recomputed", 0) for report in tight.reports for peer in report.peers.values()) > 0


@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
async def test_servers_that_come_and_go_change_nothing(tail: bool, tmp_path: Path) -> None:
    case = Case(tail=tail, rounds=6, optimizer="adam", dropout=0.2)
    quiet = await in_process(case, tmp_path)
    async with zsfl.LocalCluster(case.job(), in_process=True, split_servers=2, runs=tmp_path) as cluster:

        async def train_while(*disturbances: Coroutine[Any, Any, object]) -> list[zsfl.RoundReport]:
            """Two rounds, disturbed in the middle."""
            rounds = cluster.train(2)
            reports = [await anext(rounds)]
            await asyncio.gather(*disturbances)
            return reports + [report async for report in rounds]

        await train_while(cluster.kill("split-server-0"), cluster.start_split_server("late"))
        await train_while(cluster.stop("split-server-1"))
        reports = await train_while()
    assert cluster.result is not None
    assert_equal(Ran(Path(cluster.result.folder), reports).weights, quiet.weights)
    assert {server for report in reports for served in report.serving.values() for server in served} == {"late"}
    left = [path for path in spills_left(tmp_path) if "split-server-0" not in path.parts]  # nobody can ask the dead
    assert left == []


async def test_batch_norm_statistics_are_pooled_over_clients(tmp_path: Path) -> None:
    case = Case(norm=True, rounds=2, sizes=(10, 15, 5), optimizer="sgd")
    # A learning rate of zero would hide nothing here: the statistics depend on each window's weights.
    ran = await in_process(case, tmp_path, servers=2)
    expected = pooled_reference(case)
    assert int(ran.weights["body.1.num_batches_tracked"]) == 2 * 3
    assert_close(ran.weights, expected)


def pooled_reference(case: Case) -> dict[str, Tensor]:
    """One process that runs each client's batch by itself, adds up the gradients, and pools the statistics.

    The merged batch has the mean and the unbiased variance of all values together.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(case.seed)
        model = torch.nn.Sequential()
        for name, part in case.parts().items():
            model.add_module(name, part)
    factory, options = OPTIMIZERS[case.optimizer]
    optimizer = factory(model.parameters(), **options)
    norm = model.get_submodule("body.1")
    assert isinstance(norm, torch.nn.BatchNorm1d)
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    mean, variance = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    data = [case.samples(shard) for shard in range(case.clients)]
    windows = 0
    for window in reference.merged_batches(
        data, seed=case.seed, rounds=case.rounds, batch_size=case.batch_size, shuffle=case.shuffle
    ):
        optimizer.zero_grad()
        seen.clear()
        total = sum(len(y) for _, y in window)
        for x, y in window:
            (case.loss(model(x), y) * (len(y) / total)).backward()
        optimizer.step()
        merged = torch.cat(seen)
        mean = 0.9 * mean + 0.1 * merged.mean(0)
        variance = 0.9 * variance + 0.1 * merged.var(0)
        windows += 1
    pooled = {"running_mean": mean, "running_var": variance, "num_batches_tracked": torch.tensor(windows)}
    return model.state_dict() | {f"body.1.{name}": tensor for name, tensor in pooled.items()}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
async def test_steps_that_go_through_the_body_together_give_the_same(
    optimizer: str, tail: bool, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MergePolicy, "pays", lambda _self, _kind, count: count > 1)  # whatever this machine measures
    case = Case(optimizer=optimizer, tail=tail, steps=steps, merge=True, copies=3, sizes=(13, 7, 20), rounds=3)
    ran = await in_process(case, tmp_path, servers=2)
    assert_close(ran.weights, ordinary(case))
    assert [report.samples for report in ran.reports] == [case.copies * sum(case.sizes)] * case.rounds
    merged = sum(peer.get("merged", 0.0) for report in ran.reports for peer in report.peers.values())
    assert merged > case.clients * case.rounds  # else this shows little
    assert spills_left(tmp_path) == []
