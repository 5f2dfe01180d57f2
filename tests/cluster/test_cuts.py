"""Clients that keep more or less of one network to themselves train it together as if nobody had cut it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from helpers.exact import CLASSES, FEATURES, OPTIMIZERS, Case, assert_close, assert_equal, spills_left
from safetensors.torch import load_file
from torch import nn

import zsfl

CUTS = {"phone": "one", "laptop": "two"}


def layers() -> dict[str, nn.Module]:
    """By name; between the places to cut there are layers with and without weights."""
    made: dict[str, nn.Module] = {
        "one": nn.Linear(FEATURES, 8),
        "bend": nn.Tanh(),
        "two": nn.Linear(8, 8),
        "bend2": nn.Tanh(),
        "three": nn.Linear(8, 8),
        "bend3": nn.Tanh(),
        "end": nn.Linear(8, CLASSES),
    }
    return {name: layer.double() for name, layer in made.items()}


def model(tail: str | None) -> dict[str, zsfl.SplitModel]:
    network = nn.Sequential(OrderedDict(layers()))
    return {cut: zsfl.split(network, after=after, tail=tail) for cut, after in CUTS.items()}


def cut(shard: int) -> str:
    return "laptop" if shard == 1 else "phone"


def job_of(case: Case) -> zsfl.Job:
    return replace(case.job(), model=partial(model, "end" if case.tail else None), cut=cut)


def job_file(case: Case, folder: Path) -> Path:
    path = case.job_file(folder).rename(folder / "plain.py")
    job = folder / "exact.py"
    job.write_text(
        f"{path.read_text().rpartition('job = ')[0]}from cluster.test_cuts import job_of\njob = job_of({case!r})\n"
    )
    return job


def expected(case: Case) -> dict[str, torch.Tensor]:
    return reference.train(
        layers,
        [case.samples(shard) for shard in range(case.clients)],
        F.cross_entropy,
        OPTIMIZERS[case.optimizer],
        seed=case.seed,
        rounds=case.rounds,
        batch_size=case.batch_size,
        shuffle=case.shuffle,
    )


@pytest.mark.parametrize(("optimizer", "tail"), [("adam", True), ("weight-decay", False)])
async def test_a_run_equals_training_of_the_network_in_one_piece(optimizer: str, tail: bool, tmp_path: Path) -> None:
    case = Case(optimizer=optimizer, tail=tail)
    async with zsfl.LocalCluster(job_of(case), in_process=True, split_servers=2, runs=tmp_path) as cluster:
        reports = [report async for report in cluster.train()]
    assert_close(load_file(tmp_path / "exact" / "model.safetensors"), expected(case))
    assert spills_left(tmp_path) == []
    assert [report.samples for report in reports] == case.rounds * [sum(case.sizes)]


async def test_processes_that_hold_shards_of_several_cuts_give_the_same_bits(tmp_path: Path) -> None:
    case = Case(optimizer="momentum")
    settings: dict[str, Any] = {"mdns": False, "split_servers": 2, "client_processes": 2, "runs": tmp_path}
    async with zsfl.LocalCluster(job_file(case, tmp_path), **settings) as cluster:
        told = [report.accuracy async for report in cluster.train()]
    weights = load_file(tmp_path / "exact" / "model.safetensors")
    assert_close(weights, expected(case))
    in_one = zsfl.LocalCluster(job_of(case), in_process=True, runs=tmp_path, run="one")
    async with in_one as cluster:
        assert [report.accuracy async for report in cluster.train()] == told
    assert_equal(load_file(tmp_path / "one" / "model.safetensors"), weights)


@pytest.mark.parametrize("mode", ["elastic", "async"])
async def test_cuts_go_together_with_other_modes_and_local_steps(mode: Any, tmp_path: Path) -> None:
    local = {"steps": 2, "local_lr": 0.1} if mode == "elastic" else {}
    job = replace(job_of(Case(optimizer="sgd", batches="proportional")), mode=mode, **local)
    async with zsfl.LocalCluster(job, in_process=True, runs=tmp_path) as cluster:
        reports = [report async for report in cluster.train(20)]
    assert reports[-1].train_loss < reports[0].train_loss
