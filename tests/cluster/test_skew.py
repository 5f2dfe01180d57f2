"""What a job does against skew reaches the gradients: logit adjustment, and batch sizes that follow speed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from helpers.exact import CLASSES, OPTIMIZERS, Case, assert_close
from helpers.gated import gated_job
from helpers.ledger import ledger
from helpers.rounds import Rounds
from safetensors.torch import load_file
from torch import Tensor

import zsfl
from zsfl.ids import parse_cid

CASE = Case(optimizer="momentum", rounds=2)


def shifts(case: Case) -> list[Tensor]:
    """By shard, log of its class shares by those of all, half a sample of each class of the whole mix added."""
    counts = [torch.bincount(case.samples(shard)[1], minlength=CLASSES).double() for shard in range(case.clients)]
    everybody = torch.stack(counts).sum(0)
    mix = everybody / everybody.sum()
    added = 0.5 * CLASSES
    return [((own + added * mix) / (own.sum() + added) / mix).log() for own in counts]


def adjusted(case: Case) -> dict[str, Tensor]:
    """Plain training in which each shard's logits are shifted before the loss."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(case.seed)
        model = torch.nn.Sequential()
        for name, part in case.parts().items():
            model.add_module(name, part)
    factory, options = OPTIMIZERS[case.optimizer]
    optimizer: Any = factory(model.parameters(), **options)
    shift_of = dict(enumerate(shifts(case)))
    data = [case.samples(shard) for shard in range(case.clients)]
    windows = reference.merged_batches(
        data, seed=case.seed, rounds=case.rounds, batch_size=case.batch_size, shuffle=case.shuffle, proportional=True
    )
    for window in windows:
        assert len(window) == case.clients  # so that a batch's place tells its shard
        optimizer.zero_grad()
        total = sum(len(y) for _, y in window)
        for shard, (x, y) in enumerate(window):
            (F.cross_entropy(model(x) + shift_of[shard], y, reduction="sum") / total).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
async def test_logits_are_shifted_by_what_a_client_has(tail: bool, tmp_path: Path) -> None:
    case = replace(CASE, tail=tail, batches="proportional")
    job = replace(case.job(), adjust_logits="client")
    async with zsfl.LocalCluster(job, in_process=True, split_servers=2, runs=tmp_path) as cluster:
        async for _ in cluster.train():
            pass
    assert_close(load_file(tmp_path / "exact" / "model.safetensors"), adjusted(case))


async def test_with_everybody_there_participants_are_adjusted_by_nothing(tmp_path: Path) -> None:
    case = replace(CASE, batches="proportional")
    for run, choice in (("with", "participants"), ("without", None)):
        job = replace(case.job(), adjust_logits=choice)
        async with zsfl.LocalCluster(job, in_process=True, runs=tmp_path, run=run) as cluster:
            async for _ in cluster.train():
                pass
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("with", "without")]
    assert_close(*weights, tolerance=0.0)


def smallest(folder: Path) -> tuple[int, int] | None:
    """The shard that was measured to be the slowest, and the one of which the fewest samples were read."""
    try:
        place = json.loads(next((folder / "checkpoint").glob("*/place.json")).read_text())
    except (StopIteration, FileNotFoundError):  # it is being replaced
        return None
    speeds, read = place["memory"]["pace"]["speeds"], place["memory"]["pace"]["positions"]
    return int(min(speeds, key=speeds.__getitem__)), int(min(read, key=read.__getitem__))


async def test_a_client_that_is_slow_to_read_takes_smaller_batches(tmp_path: Path) -> None:
    """All samples of the first client take 10 ms to read; the others' take nothing."""
    path, _ = gated_job(tmp_path, '"exact"', read_s=0.01)
    by_speed = "import dataclasses\njob = dataclasses.replace(job, batches=zsfl.by_speed(least=2, mix=0))\n"
    path.write_text(f"{path.read_text()}\n{by_speed}")
    folder = tmp_path / "gated"
    async with zsfl.LocalCluster(path, split_servers=1, runs=tmp_path, mdns=False) as cluster:
        rounds = Rounds(cluster)
        reports = await rounds.until(lambda report: report.round >= 6 and smallest(folder) == (0, 0))
    assert all(report.samples == 4 * 40 for report in reports)  # the merged batch stays as large
    # Of the rounds that were reported: in the one after them everybody leaves, one before the other.
    whole = [record for record in ledger(folder) if record["version"] <= reports[-1].version]
    steps = Counter(parse_cid(cid).shard for record in whole for cid in record["counted"])
    assert set(steps.values()) == {reports[-1].version}
