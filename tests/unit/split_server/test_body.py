"""What a split server keeps between a forward and its backward."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.exact import Case

from zsfl.errors import BadShape
from zsfl.ids import RunId, Version, step_cid
from zsfl.learning.part import Part
from zsfl.spill.store import SpillStore
from zsfl.split_server.body import BodyWorker, Done
from zsfl.tensors.codec import Codec
from zsfl.wire.messages import Backward, Forward


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


def test_gradients_that_fit_only_together_shift_nobody_elses_rows(tmp_path: Path) -> None:
    """One with a row too many and one with a row too few, of one client, and an honest one between them."""
    job = Case(merge=True).job()
    part = Part(job.build().body, "body", torch.device("cpu"))
    weights = part.load({f"body.{name}": tensor for name, tensor in job.build().body.state_dict().items()})
    draw = torch.Generator().manual_seed(1)
    x = [torch.randn(2, 8, dtype=torch.float64, generator=draw) for _ in range(3)]
    cids = [step_cid(RunId("abcdef"), shard, Version(0)) for shard in range(3)]
    spec, _ = Codec.parse("raw").pack("input", x[0])

    def made(folder: str, rows: tuple[int, ...], among: range) -> list[object]:
        worker = BodyWorker(job, part, SpillStore(tmp_path / folder), node="s", slots=16)
        asked = [(Forward(cid=cids[n], version=Version(0), seed=1, input=spec), x[n]) for n in among]
        width = worker.forward_all(weights, asked)[0].shape[1]
        grads = torch.arange(4.0 * width, dtype=torch.float64).view(4, width)
        told = {"version": Version(0), "seed": 1, "n": 2.0, "samples": 2, "input": None, "want_grad": True}
        backwards = [(Backward(cid=cids[n], grad=spec, provenance="c", **told), grads[: rows[n]], None) for n in among]
        return list(worker.backward_all(None, backwards))

    first, honest, last = made("together", (3, 2, 1), range(3))
    assert isinstance(first, BadShape)
    assert isinstance(last, BadShape)
    (alone,) = made("alone", (3, 2, 1), range(1, 2))
    assert isinstance(honest, Done)
    assert isinstance(alone, Done)
    assert honest.grad is not None
    assert alone.grad is not None
    assert torch.allclose(honest.grad, alone.grad, rtol=1e-12)
