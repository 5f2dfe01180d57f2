"""A node that computes for long is as much there as one that idles."""

from __future__ import annotations

from pathlib import Path

import zsfl
from zsfl.reports import AnyReport, Note

_JOB = """
import time
import torch
import torch.nn as nn
import torch.nn.functional as F
import zsfl


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(2.0)
        return x


def model():
    return zsfl.SplitModel(head=nn.Linear(4, 4), body=nn.Sequential(nn.Linear(4, 4), Slow()), tail=nn.Linear(4, 2))


def data(shard, shards):
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(shard))
    return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), None


job = zsfl.Job(
    name="busy", model=model, loss=F.cross_entropy, data=data, optimizer=zsfl.sgd(lr=0.1), batch_size=4,
    rounds=1, shards=2,
)
"""


async def test_who_computes_for_longer_than_silence_may_last_is_not_given_up(tmp_path: Path) -> None:
    job = tmp_path / "busy.py"
    job.write_text(_JOB)
    said: list[str] = []

    def on(report: AnyReport) -> None:
        if isinstance(report, Note):
            said.append(report.message)

    # In one process, so that where it is held up whoever listens is, too, and accuses nobody.
    cluster = zsfl.LocalCluster(
        job, in_process=True, split_servers=1, runs=tmp_path, on_report=on, beat_s=0.1, lost_after_s=1.0
    )
    async with cluster:
        (report,) = [report async for report in cluster.train()]
    assert report.steps == 2
    assert not [message for message in said if "is gone" in message]
