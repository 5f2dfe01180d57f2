"""Job files for tests: small, exact, quick."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

EXACT = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import zsfl


def model():
    body = nn.Sequential(nn.Linear({body}, 8), nn.Tanh())
    return zsfl.SplitModel(head=nn.Linear(6, 8).double(), body=body.double(), tail=nn.Linear(8, 3).double())


def data(shard, shards):
    draw = torch.Generator().manual_seed(shard)
    x = torch.randn(40 + shard, 6, generator=draw, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    return torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(x[:8], y[:8])


job = zsfl.Job(
    name="{name}", model=model, loss=F.cross_entropy, data=data, optimizer=zsfl.sgd(lr={lr}, momentum=0.9),
    batch_size=10, rounds={rounds}, shards={shards},
)
"""
UNHURRIED = """
import dataclasses, functools, time


@functools.wraps(job.loss)
def unhurried(*args, _loss=job.loss):
    time.sleep(0.05)
    return _loss(*args)


job = dataclasses.replace(job, loss=unhurried)
"""
"""Added to jobs, so that they leave the processor to others."""


def write_job(
    folder: Path, *, name: str = "tiny", rounds: int = 3, shards: int = 2, lr: float = 0.1, body: int = 8
) -> Path:
    """A float64 job that travels raw, with shards of unequal size; a `body` other than 8 does not fit."""
    path = folder / f"{name}.py"
    text = EXACT.format(name=name, rounds=rounds, shards=shards, lr=lr, body=body)
    path.write_text(text, encoding="utf-8")
    return path


def unhurried(job: Path) -> Path:
    """The same job, for runs that go on while a test looks at them."""
    with job.open("a") as file:
        file.write(UNHURRIED)
    return job


def patch_nodes(job: Path, code: str, **names: Path) -> None:
    """What the nodes that load this job run with it, where these names are paths; whoever starts them does not."""
    given = "".join(f"{name} = {str(path)!r}\n" for name, path in names.items())
    with job.open("a") as file:
        file.write(f"import os\nif os.getpid() != {os.getpid()}:\n{textwrap.indent(given + code, '    ')}")
