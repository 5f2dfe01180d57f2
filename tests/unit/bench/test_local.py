"""What `zsfl bench JOB` finds out about a job on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from helpers.jobs import write_job

import zsfl
from zsfl.bench.local import CODECS, body_costs, codec_costs
from zsfl.cli import main
from zsfl.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def job(tmp_path: Path) -> zsfl.Job:
    return zsfl.load_job(write_job(tmp_path))


def without_a_tail() -> zsfl.SplitModel:
    return zsfl.SplitModel(head=nn.Linear(6, 8).double(), body=nn.Linear(8, 3).double())


@pytest.mark.parametrize("model", [None, without_a_tail], ids=["u-shaped", "label sharing"])
def test_the_body_is_measured_at_the_job_s_batch_size(job: zsfl.Job, model: Any) -> None:
    asked = job if model is None else replace(job, model=model)
    (cost,) = body_costs(asked, CPU, 0.01)
    assert cost.cut == ""
    assert cost.samples == len(cost.activations) == job.batch_size
    assert cost.activations.shape[1:] == asked.build().head(torch.zeros(1, 6).double()).shape[1:]
    assert cost.parameters == sum(parameter.numel() for parameter in asked.build().body.parameters())
    assert cost.steps_per_s == pytest.approx(1 / (cost.forward_s + cost.backward_s))


def test_each_cut_is_measured(job: zsfl.Job) -> None:
    def cuts() -> dict[str, zsfl.SplitModel]:
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        return {"small": zsfl.split(net, after="0", tail="4"), "large": zsfl.split(net, after="2", tail="4")}

    asked = replace(job, model=cuts, cut=lambda shard: "small" if shard else "large")
    found = {cost.cut: tuple(cost.activations.shape) for cost in body_costs(asked, CPU, 0.01)}
    assert found == {"small": (job.batch_size, 8), "large": (job.batch_size, 5)}


def test_every_codec_is_tried_on_the_activations_the_job_s_own_first(job: zsfl.Job) -> None:
    found = list(codec_costs(replace(job, codec="bf16+lz4"), torch.randn(16, 100)))
    assert [str(codec) for codec, _ in found] == ["bf16+lz4", *CODECS]
    assert {str(codec): cost.ratio for codec, cost in found}["fp16"] == 0.5


def test_data_that_fails_is_said(job: zsfl.Job) -> None:
    def broken(shard: int, shards: int) -> Any:
        raise OSError("no disk")

    with pytest.raises(ConfigError, match=r"data\(0, \d+\) of job .* failed: OSError: no disk"):
        next(body_costs(replace(job, data=broken), CPU, 0.01))


def test_the_command_prints_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, threads = write_job(tmp_path), torch.get_num_threads()
    try:
        assert main(["bench", str(path), "--seconds", "0.01", "--device", "cpu", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    page = capsys.readouterr().out
    assert f"job {zsfl.load_job(path).name} on cpu, 1 torch thread: {zsfl.load_job(path).batch_size} samples" in page
    assert [line.split()[0] for line in page.splitlines() if line.startswith("  ")][:3] == [
        "body",
        "forward",
        "backward",
    ]
    assert "the job's own" in page
    assert all(f"\n  {name} " in page for name in CODECS)
