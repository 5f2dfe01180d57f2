"""Noise on activations in whole runs: ordinary training with the same noise, and the same again after kills."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reference
from helpers.exact import OPTIMIZERS, Case, assert_close, assert_equal, in_process
from helpers.ledger import ledger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zsfl
from zsfl.learning.privacy import normal
from zsfl.reports import AnyReport, Note
from zsfl.testing import check_history, train_on

KNOWN = zsfl.gaussian_noise(std=0.3, clip=1.2, secret=False)
SECRET = zsfl.private_activations(clip=1.2, epsilon=30.0, delta=1e-3)
NOISY = Case(sizes=(12, 8, 20, 4), batches="proportional", batch_size=6, protect=KNOWN)


def ordinary(case: Case) -> dict[str, Tensor]:
    """Plain training in one process that adds the noise of each step to its activations, by the documented recipe."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(case.seed)
        parts = case.parts()
    head, rest = parts["head"], nn.Sequential(*list(parts.values())[1:])
    parameters = [*head.parameters(), *rest.parameters()]
    factory, options = OPTIMIZERS[case.optimizer]
    stepper: Any = factory([one for one in parameters if one.requires_grad], **options)
    data = [case.samples(shard) for shard in range(case.clients)]
    windows = reference.merged_batches(
        data, seed=case.seed, rounds=case.rounds, batch_size=case.batch_size, shuffle=True, proportional=True
    )
    for version, window in enumerate(windows):
        loss, count = torch.zeros((), dtype=torch.float64), 0
        for shard, (x, y) in enumerate(window):
            seed = hashlib.sha256(f"{case.seed}/{version}/{shard}/0".encode()).digest()[:6]
            hidden = head(x)
            hidden = hidden * (KNOWN.clip or 0) / hidden.norm(dim=1, keepdim=True).clamp_min(KNOWN.clip or 0)
            drawn = normal(b"%d" % int.from_bytes(seed, "little"), hidden.numel()).view(hidden.shape)
            loss = loss + case.loss(rest(hidden + KNOWN.std * drawn), y) * len(y)
            count += len(y)
        stepper.zero_grad()
        (loss / count).backward()
        stepper.step()
    return {f"{name}.{own}": tensor for name, part in parts.items() for own, tensor in part.state_dict().items()}


@pytest.mark.parametrize(
    "case",
    [
        NOISY,
        replace(NOISY, tail=False),
        replace(NOISY, merge=True),
        replace(NOISY, tail=False, merge=True),
        replace(NOISY, frozen_head=True, optimizer="adam"),
    ],
    ids=["u-shaped", "label-sharing", "merged", "merged-label-sharing", "frozen"],
)
async def test_a_run_with_noise_is_ordinary_training_with_it(case: Case, tmp_path: Path) -> None:
    ran = await in_process(case, tmp_path, servers=2)
    assert_close(ran.weights, ordinary(case))
    quiet = await in_process(replace(case, protect=None), tmp_path, run="quiet")
    assert any((tensor - quiet.weights[name]).abs().max() > 1e-3 for name, tensor in ran.weights.items())


@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
async def test_held_out_samples_are_tested_without_noise(tail: bool, tmp_path: Path) -> None:
    case = replace(NOISY, tail=tail, protect=SECRET)
    ran = await in_process(case, tmp_path)
    model = case.model().eval()
    model.load_state_dict(ran.weights)
    job, loss, count = case.job(), 0.0, 0
    for shard in range(case.clients):
        held_out = job.data(shard, case.clients)[1]
        assert held_out is not None
        for x, y in DataLoader(held_out, batch_size=64):
            with torch.no_grad():
                loss += float(case.loss(model(x), y)) * len(y)
            count += len(y)
    assert ran.reports[-1].loss == pytest.approx(loss / count, abs=1e-12)


@pytest.mark.parametrize("mode", ["exact", "elastic", "async"])
async def test_a_run_says_what_is_private_and_each_client_keeps_its_key(mode: Any, tmp_path: Path) -> None:
    said: list[str] = []

    def hear(report: AnyReport) -> None:
        if isinstance(report, Note):
            said.append(report.message)

    case = replace(NOISY, mode=mode, protect=SECRET, dropout=0.2)
    ran = await in_process(case, tmp_path, on_report=hear)
    check_history(ran.folder, may_be_pending=mode != "exact")
    (statement,) = [one for one in said if "differentially private" in one]
    assert "is (30, 0.001)-differentially private, and 2 of them, one a round, are (" in statement
    assert ("fast clients may make more" in statement) == (mode == "async")
    keys = {path.name: path.read_bytes() for path in (tmp_path / "noise").iterdir()}
    assert set(keys) == {f"client-{shard}.key" for shard in range(case.clients)}
    assert len(set(keys.values())) == case.clients


async def test_clients_and_servers_that_are_killed_change_no_bit(tmp_path: Path) -> None:
    case = replace(NOISY, dropout=0.2, rounds=12)
    await in_process(case, tmp_path, run="quiet")
    cluster = zsfl.LocalCluster(
        case.job_file(tmp_path), runs=tmp_path, run="struck", mdns=False, split_servers=2, lost_after_s=4.0, beat_s=0.2
    )
    async with cluster:
        async for report in cluster.train():
            if report.round == 2:
                await cluster.kill("client-2")
                await cluster.start_client("2")
            if report.round == 5:
                await cluster.kill("split-server-0")
    records, others = ledger(tmp_path / "struck"), ledger(tmp_path / "quiet")
    assert [record["weights"] for record in records] == [record["weights"] for record in others]


async def test_a_client_that_is_killed_finds_its_key_again(tmp_path: Path) -> None:
    case = replace(NOISY, protect=SECRET, rounds=6)
    cluster = zsfl.LocalCluster(case.job_file(tmp_path), runs=tmp_path, run="struck", mdns=False, lost_after_s=4.0)
    path, keys = tmp_path / "noise" / "client-2.key", set[bytes]()
    async with cluster:
        async for report in cluster.train():
            keys.add(path.read_bytes())
            if report.round == 2:
                await cluster.kill("client-2")
                await cluster.start_client("2")
    assert len(keys) == 1
    check_history(tmp_path / "struck")


async def test_two_runs_with_known_noise_are_equal_and_with_secret_noise_are_not(tmp_path: Path) -> None:
    one, other = [await in_process(NOISY, tmp_path, run=name) for name in ("one", "other")]
    assert_equal(one.weights, other.weights)
    case = replace(NOISY, protect=SECRET)
    one, other = [await in_process(case, tmp_path, run=name) for name in ("third", "fourth")]
    assert any(not torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


async def test_batch_norm_in_the_head_ends_a_private_run_with_what_to_do(tmp_path: Path) -> None:
    def model() -> zsfl.SplitModel:
        head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        return zsfl.SplitModel(head.double(), nn.Linear(8, 8).double(), nn.Linear(8, 3).double())

    job = replace(NOISY.job(), model=model, protect=SECRET)
    with pytest.raises(zsfl.ConfigError, match="use batch_norm='frozen' or group norm there"):
        await train_on(zsfl.LocalCluster(job, in_process=True, runs=tmp_path))
