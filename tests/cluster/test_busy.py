"""A node that computes for long is as much there as one that idles; one with enough to do says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.nodes import Nodes

import zsfl
from zsfl.cluster.orders import order
from zsfl.errors import Busy
from zsfl.ids import Address, Role
from zsfl.reports import AnyReport, Note
from zsfl.settings import NodeSettings
from zsfl.wire.messages import Train

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


async def test_an_aggregator_with_enough_orders_says_so(tmp_path: Path) -> None:
    job = tmp_path / "busy.py"
    job.write_text(_JOB)
    nodes = Nodes(zsfl.load_job(job), tmp_path / "runs")
    try:
        aggregator = Address(await nodes.start("aggregator", Role.AGGREGATOR, hold=True))
        for _ in range(16):  # none of which it begins with, as nobody is there
            await order(aggregator, Train(rounds=1), NodeSettings())
        with pytest.raises(Busy, match="16 orders wait already; give this one when one of them is done"):
            await order(aggregator, Train(rounds=1), NodeSettings())
    finally:
        await nodes.close()
