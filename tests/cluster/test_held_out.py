"""Held-out tests: of chosen versions, by every client, while training goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exact import Case, in_process
from helpers.gated import VERSIONS, gated_job
from helpers.ledger import versions
from helpers.waiting import eventually
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import TensorDataset

import zsfl
from zsfl import reports
from zsfl.client.shard import EVALUATION_BATCH

CASE = Case(rounds=3, tested=6)


def results_in(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in lines if line["event"] == "tested"]


def held_out(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Samples by shard."""
    datasets = [case.job().data(shard, case.clients)[1] for shard in range(case.clients)]
    return [dataset.tensors for dataset in datasets if isinstance(dataset, TensorDataset)]  # type: ignore[misc]


def right(case: Case, weights: dict[str, Tensor]) -> list[Tensor]:
    """By shard, for each held-out sample whether these weights get it right."""
    model = case.model()
    model.load_state_dict(weights)
    return [(model.eval()(x).argmax(1) == y).double() for x, y in held_out(case)]


class Watch:
    """The tests that were reported."""

    def __init__(self) -> None:
        self.tested: list[reports.Tested] = []

    def on(self, report: reports.AnyReport) -> None:
        """For `LocalCluster(on_report=...)`."""
        if isinstance(report, reports.Tested):
            self.tested.append(report)


async def train(cluster: zsfl.LocalCluster, rounds: int) -> list[zsfl.RoundReport]:
    return [report async for report in cluster.train(rounds)]


async def test_a_test_that_takes_long_stops_neither_training_nor_does_a_tester_that_vanishes(tmp_path: Path) -> None:
    path, gate = gated_job(tmp_path, "zsfl.Elastic(quorum=0.5)", tests=True)
    watch, folder = Watch(), tmp_path / "gated"
    settings = {"split_servers": 1, "mdns": False, "lost_after_s": 5.0}
    async with zsfl.LocalCluster(path, runs=tmp_path, on_report=watch.on, **settings) as cluster:  # type: ignore[arg-type]
        gate.close()
        rounds = asyncio.create_task(train(cluster, 3))
        await gate.is_reached()
        # The first round's test cannot end, and all three rounds go by.
        await eventually(lambda: versions(folder) == 3 * VERSIONS)
        assert not watch.tested
        gate.open()
        assert [report.round for report in await rounds] == [1, 2, 3]
        assert [(one.version, one.round) for one in watch.tested] == [(4, 1), (8, 2), (12, 3)]
        assert all(len(one.clients) == 4 for one in watch.tested)
        gate.close()
        rounds = asyncio.create_task(train(cluster, 1))
        await gate.is_reached()
        await cluster.kill("client-0")
        assert len(await rounds) == 1
        assert set(watch.tested[-1].clients) == {"client-1", "client-2", "client-3"}


async def test_a_tester_that_says_nothing_is_done_without(tmp_path: Path) -> None:
    path, gate = gated_job(tmp_path, "zsfl.Elastic(quorum=0.5)", tests=True)
    watch = Watch()
    settings = {"split_servers": 1, "mdns": False, "patience_s": 5.0, "lost_after_s": 60.0}
    async with zsfl.LocalCluster(path, runs=tmp_path, on_report=watch.on, **settings) as cluster:  # type: ignore[arg-type]
        gate.close()
        await train(cluster, 1)
        assert set(watch.tested[-1].clients) == {"client-1", "client-2", "client-3"}
        gate.open()


class Counting(torch.utils.data.TensorDataset):
    """Held-out samples that note how many versions there were when the last of them was read."""

    def __init__(self, folder: Path, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.folder = folder
        self.seen: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == len(self) - 1:
            self.seen.append(versions(self.folder))
        return super().__getitem__(index)


async def test_exact_mode_trains_between_the_batches_of_a_test(tmp_path: Path) -> None:
    job = CASE.job()
    x, y = held_out(CASE)[0]
    many = Counting(tmp_path / "exact", x.repeat(EVALUATION_BATCH, 1), y.repeat(EVALUATION_BATCH))

    def data(shard: int, shards: int) -> tuple[Any, Any]:
        train, test = job.data(shard, shards)
        return train, test if shard else many

    async with zsfl.LocalCluster(replace(job, data=data), in_process=True, runs=tmp_path, run="exact") as cluster:
        await train(cluster, 2)
    windows = 4
    assert many.seen[0] > windows  # when the first round's test ended, the second round had made versions


async def test_tests_are_per_client_and_pooled(tmp_path: Path) -> None:
    case = replace(CASE, rounds=1)
    ran = await in_process(case, tmp_path)
    [tested] = results_in(ran.folder)
    rights = right(case, ran.weights)
    model = case.model()
    model.load_state_dict(ran.weights)
    losses = [torch.nn.functional.cross_entropy(model.eval()(x), y, reduction="sum") for x, y in held_out(case)]
    assert list(tested["clients"].values()) == pytest.approx([one.mean().item() for one in rights])
    assert tested["accuracy"] == pytest.approx(torch.cat(rights).mean().item()) == ran.reports[0].accuracy
    assert tested["loss"] == pytest.approx(sum(losses).item() / (case.tested * case.clients))  # type: ignore[union-attr]


async def test_clients_count_by_their_held_out_samples(tmp_path: Path) -> None:
    job = CASE.job()
    sizes = (1, 6, 3, 0)

    def data(shard: int, shards: int) -> tuple[Any, Any]:
        train, test = job.data(shard, shards)
        return train, TensorDataset(*(column[: sizes[shard]] for column in test.tensors)) if sizes[shard] else None  # type: ignore[union-attr]

    async with zsfl.LocalCluster(replace(job, data=data), in_process=True, runs=tmp_path) as cluster:
        [report] = await train(cluster, 1)
    [tested] = results_in(tmp_path / "exact")
    accuracies = tested["clients"].values()
    assert len(accuracies) == 3
    mean = sum(size * one for size, one in zip(sizes, accuracies, strict=False)) / sum(sizes)
    assert report.accuracy == tested["accuracy"] == pytest.approx(mean)


async def test_chosen_versions_are_tested_besides_the_rounds(tmp_path: Path) -> None:
    job = replace(CASE.job(), evaluate_every=3)
    async with zsfl.LocalCluster(job, in_process=True, runs=tmp_path) as cluster:
        told = await train(cluster, 3)
    tested = results_in(tmp_path / "exact")
    assert [(one["version"], one["ends_round"]) for one in tested] == [
        (3, False), (4, True), (6, False), (8, True), (9, False), (12, True)
    ]  # fmt: skip
    assert [one["accuracy"] for one in tested if one["ends_round"]] == [report.accuracy for report in told]
    assert tested == sorted(tested, key=lambda one: one["seconds"])


async def test_without_a_better_test_training_ends_early(tmp_path: Path) -> None:
    still = replace(CASE.job(), stop_after=3, optimizer=zsfl.sgd(lr=1e-300))
    async with zsfl.LocalCluster(still, in_process=True, runs=tmp_path) as cluster:
        told = await train(cluster, 50)
    result = cluster.result
    assert result is not None
    assert result.early
    assert result.rounds == len(told)
    assert len(told) == 1 + 3  # in exact mode always: training waits for what it depends on
    assert (result.best_accuracy, result.best_version) == (told[0].accuracy, told[0].version)


async def test_the_best_version_is_kept(tmp_path: Path) -> None:
    job = replace(CASE.job(), optimizer=zsfl.sgd(lr=0.5, schedule=lambda version: 1.0 if version < 8 else 40.0))
    async with zsfl.LocalCluster(job, in_process=True, runs=tmp_path) as cluster:
        told = await train(cluster, 6)
    result = cluster.result
    assert result is not None
    assert not result.early
    best = max(told, key=lambda report: report.accuracy or 0.0)
    assert best is not told[-1]
    assert (result.best_accuracy, result.best_version) == (best.accuracy, best.version)
    rights = right(CASE, load_file(tmp_path / "exact" / "best.safetensors"))
    assert torch.cat(rights).mean().item() == pytest.approx(best.accuracy)
    last = right(CASE, load_file(tmp_path / "exact" / "model.safetensors"))
    assert torch.cat(last).mean().item() == pytest.approx(told[-1].accuracy)


async def test_a_round_whose_test_was_not_over_is_tested_after_a_resume(tmp_path: Path) -> None:
    whole = await in_process(CASE, tmp_path, run="whole")
    begun = await in_process(CASE, tmp_path, run="cut", rounds=2)
    metrics = begun.folder / "metrics.jsonl"
    # As a crash leaves it between the second round and the end of its test.
    lines = [line for line in metrics.read_bytes().splitlines(keepends=True) if json.loads(line).get("round", 0) < 2]
    metrics.write_bytes(b"".join(lines))
    shutil.rmtree(tmp_path / "spills", ignore_errors=True)
    resumed = await in_process(CASE, tmp_path, run="cut", resume=True)
    assert [report.round for report in resumed.reports] == [2, 3]
    assert [r.accuracy for r in resumed.reports] == [r.accuracy for r in whole.reports[1:]]
    assert [r.train_loss for r in resumed.reports] == [r.train_loss for r in whole.reports[1:]]
