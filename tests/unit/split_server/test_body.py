"""What a split server keeps between a forward and its backward."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.exact import Case

from zsfl.ids import RunId, Version, step_cid
from zsfl.learning.part import Part
from zsfl.spill.store import SpillStore
from zsfl.split_server.body import BodyWorker
from zsfl.tensors.codec import Codec
from zsfl.wire.messages import Forward


def test_graphs_of_settled_versions_are_forgotten_also_when_a_run_goes_back(tmp_path: Path) -> None:
    job = Case().job()
    part = Part(job.build().body, "body", torch.device("cpu"))
    weights = part.load({f"body.{name}": tensor for name, tensor in job.build().body.state_dict().items()})
    worker = BodyWorker(job, part, SpillStore(tmp_path), node="s", slots=16)
    x = torch.zeros(2, 8, dtype=torch.float64)
    spec, _ = Codec.parse("raw").pack("input", x)

    def forward(version: int, shard: int) -> int:
        cid = step_cid(RunId("abcdef"), shard, Version(version))
        worker.forward_all(weights, [(Forward(cid=cid, version=Version(version), seed=1, input=spec), x)])
        return worker.cached

    assert [forward(7, 0), forward(7, 1), forward(8, 0), forward(9, 0), forward(10, 0)] == [1, 2, 3, 4, 5]
    assert [forward(11, 0), forward(3, 0), forward(4, 0), forward(4, 1)] == [4, 4, 4, 5]
