"""Steps that go through the body together: when that is done, and that it gives what they give alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.exact import Case
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import zsfl
from zsfl.errors import InputNeeded
from zsfl.ids import Cid, RunId, Version, step_cid
from zsfl.learning.part import Part, PartWeights
from zsfl.spill.layout import SpillMeta, decode
from zsfl.spill.store import SpillStore
from zsfl.split_server.body import BodyWorker, Done
from zsfl.split_server.merging import PROBE_EVERY, MergePolicy
from zsfl.tensors.codec import Codec
from zsfl.wire.messages import Backward, Forward, Step

VERSION = Version(3)
SIZES = (4, 1, 6)


def cid(shard: int) -> Cid:
    return step_cid(RunId("abcdef"), shard, VERSION)


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.integers(2, 64))
def test_the_cheaper_way_is_taken_and_the_other_tried_now_and_then(merged: float, single: float, count: int) -> None:
    assume(not math.isclose(merged, single, rel_tol=1e-9))
    policy = MergePolicy()
    assert not policy.pays("Forward", 1)
    assert policy.pays("Forward", count)  # nothing is known yet
    policy.measured("Forward", True, count, merged * count)
    assert not policy.pays("Forward", count)
    policy.measured("Forward", False, 1, single)
    taken = [policy.pays("Forward", count) for _ in range(4 * PROBE_EVERY)]
    assert taken.count(merged < single) == 4 * (PROBE_EVERY - 1)


def test_what_changes_is_noticed_and_kinds_are_told_apart() -> None:
    policy = MergePolicy()
    for kind in ("Forward", "Backward"):
        policy.measured(kind, True, 64, 64e-6)
        policy.measured(kind, False, 64, 64e-5)
    for _ in range(30):
        policy.measured("Backward", True, 64, 1.0)
    assert policy.pays("Forward", 8)
    assert not policy.pays("Backward", 8)


class Bench:
    """A body on a server of its own, with three steps of one version."""

    def __init__(self, folder: Path, case: Case, body: nn.Module | None = None, slots: int = 16) -> None:
        job = case.job()
        self.case = case
        module = job.build().body if body is None else body
        self.part = Part(module, "body", torch.device("cpu"))
        self.weights: PartWeights = self.part.load({f"body.{name}": one for name, one in module.state_dict().items()})
        self.spills = SpillStore(folder)
        self.worker = BodyWorker(job, self.part, self.spills, node="server", slots=slots)
        draw = torch.Generator().manual_seed(1)
        self.x = [torch.randn(size, 8, generator=draw, dtype=torch.float64) for size in SIZES]
        self.grad = [torch.randn(size, 8, generator=draw, dtype=torch.float64) for size in SIZES]

    def forward(self, *shards: int) -> list[Tensor]:
        asked = [
            (Forward(cid=cid(shard), version=VERSION, seed=1, input=Codec().pack("x", self.x[shard])[0]), self.x[shard])
            for shard in shards
        ]
        return self.worker.forward_all(self.weights, asked)

    def backward(self, *shards: int, with_input: bool = False) -> list[Done]:
        given_: list[tuple[Backward, Tensor, Tensor | None]] = []
        for shard in shards:
            request = Backward(
                cid=cid(shard),
                version=VERSION,
                seed=1,
                n=float(SIZES[shard]),
                samples=SIZES[shard],
                grad=Codec().pack("grad", self.grad[shard])[0],
                input=None,
                want_grad=True,
                provenance=f"client-{shard}",
            )
            given_.append((request, self.grad[shard], self.x[shard] if with_input else None))
        done = self.worker.backward_all(self.weights if with_input else None, given_)
        for one in done:
            if not isinstance(one, Done):
                raise one
        return [one for one in done if isinstance(one, Done)]

    def spilled(self, done: Done) -> tuple[SpillMeta, dict[str, Tensor]]:
        assert done.offer is not None
        data = self.spills.read((done.offer.cid, done.offer.kind))
        assert data is not None
        return decode(data)


@pytest.fixture
def alone(tmp_path: Path) -> Bench:
    """What every step gives by itself."""
    return Bench(tmp_path / "alone", Case(merge=True))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The server that merges."""
    return Bench(tmp_path / "together", Case(merge=True))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def both(one: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor]:
    assert one is not None
    assert other is not None
    return one, other


def expected(alone: Bench, *shards: int) -> tuple[dict[str, Tensor], list[Done]]:
    """The sums of the gradients of these steps, each made by itself."""
    sums: dict[str, Tensor] = {}
    done: list[Done] = []
    for shard in shards:
        alone.forward(shard)
        (one,) = alone.backward(shard)
        done.append(one)
        for name, tensor in alone.spilled(one)[1].items():
            sums[name] = sums[name] + tensor if name in sums else tensor
    return sums, done


def test_a_pass_of_several_gives_what_they_give_alone_in_one_spill(alone: Bench, bench: Bench) -> None:
    assert not bench.worker.merges  # not before it is known that the body draws no random numbers
    bench.forward(0)
    assert bench.worker.merges
    for shard, output in zip((0, 1, 2), bench.forward(0, 1, 2), strict=True):
        close(output, alone.forward(shard)[0])
    done = bench.backward(2, 0, 1)
    sums, singles = expected(alone, 0, 1, 2)
    meta, tensors = bench.spilled(next(one for one in done if one.offer))
    assert [one.offer is not None for one in done].count(True) == 1
    assert {share.cid: (share.n, share.samples, share.client) for share in meta.members} == {
        cid(shard): (SIZES[shard], SIZES[shard], f"client-{shard}") for shard in (0, 1, 2)
    }
    assert (meta.n, meta.samples) == (sum(SIZES), sum(SIZES))
    for name, tensor in tensors.items():
        close(tensor, sums[name])
    for shard, one in zip((2, 0, 1), done, strict=True):
        close(*both(one.grad, singles[shard].grad))


def test_who_comes_without_the_others_of_its_pass_is_computed_again(alone: Bench, bench: Bench) -> None:
    bench.forward(0, 1, 2)
    done = bench.backward(2, 0)
    sums, _ = expected(alone, 0, 2)
    meta, tensors = bench.spilled(done[0] if done[0].offer else done[1])
    assert {share.cid for share in meta.members} == {cid(0), cid(2)}
    for name, tensor in tensors.items():
        close(tensor, sums[name])
    (last,) = bench.backward(1)
    meta, tensors = bench.spilled(last)
    assert (meta.cid, meta.members) == (cid(1), ())
    for name, tensor in tensors.items():
        close(tensor, expected(alone, 1)[0][name])
    assert bench.worker.cached == 0


def test_one_that_is_forgotten_is_told_so_and_the_others_are_served(bench: Bench) -> None:
    bench.forward(0)
    with pytest.raises(InputNeeded, match="send its input again"):
        bench.backward(1)
    assert len(bench.backward(0)) == 1
    (again,) = bench.backward(1, with_input=True)
    assert bench.spilled(again)[0].members == ()


def test_graphs_go_when_they_are_too_long_together(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsfl.split_server.body.KEPT_BYTES", 8 * 8 * 2 * 7)  # seven samples, in and out
    bench.forward(0)
    bench.forward(2)
    assert bench.worker.cached == 1
    with pytest.raises(InputNeeded):
        bench.backward(0)
    bench.backward(2)


@pytest.mark.parametrize("tail", [True, False])
def test_a_body_that_draws_or_couples_is_never_merged(tmp_path: Path, tail: bool) -> None:
    for name, case in {"draws": Case(merge=True, dropout=0.5), "couples": Case(merge=True, norm=True)}.items():
        bench = Bench(tmp_path / name, case)
        bench.forward(0)
        assert not bench.worker.merges
    assert not Bench(tmp_path / "exact", Case()).worker.merges


class Centred(nn.Module):
    """A layer that couples the samples of a pass, which nothing but its output tells."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_body_whose_outputs_depend_on_the_company_is_found_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Case(merge=True), nn.Sequential(nn.Linear(8, 8), Centred()).double())
    bench.forward(0)
    assert bench.worker.merges
    together = bench.forward(0, 1, 2)
    assert not bench.worker.merges
    for shard, output in enumerate(together):  # and nobody was given what it found out by
        close(output, bench.forward(shard)[0])
    assert [len(bench.spilled(bench.backward(shard)[0])[0].members) for shard in range(3)] == [0, 0, 0]


def test_labels_that_travel_are_merged_too(tmp_path: Path) -> None:
    case = Case(tail=False, merge=True)
    together, single = Bench(tmp_path / "together", case), Bench(tmp_path / "single", case)
    target = [torch.arange(size) % 3 for size in SIZES]

    def steps(bench: Bench, *shards: int) -> list[Done]:
        asked = [
            (
                Step(
                    cid=cid(shard),
                    version=VERSION,
                    seed=1,
                    n=float(SIZES[shard]),
                    samples=SIZES[shard],
                    input=Codec().pack("x", bench.x[shard])[0],
                    target=Codec().pack("y", target[shard])[0],
                    want_grad=True,
                    provenance="client",
                ),
                bench.x[shard],
                target[shard],
            )
            for shard in shards
        ]
        return bench.worker.step_all(bench.weights, asked)

    ones = [steps(single, shard)[0] for shard in (0, 1, 2)]
    done = steps(together, 0, 1, 2)
    meta, tensors = together.spilled(done[0])
    assert meta.loss_sum == pytest.approx(sum(one.loss_sum or 0.0 for one in ones), rel=1e-12)
    for one, other in zip(done, ones, strict=True):
        assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-12)
        close(*both(one.grad, other.grad))
    for name, tensor in tensors.items():
        close(tensor, sum((single.spilled(one)[1][name] for one in ones), torch.zeros_like(tensor)))


@pytest.mark.parametrize("mode", ["elastic", "async"])
def test_merging_is_for_exact_mode(mode: str) -> None:
    with pytest.raises(zsfl.ConfigError, match="merge=True needs mode='exact'"):
        Case(merge=True, mode=mode).job()
    assert not Case(merge=True, batch_norm="merged", norm=True).job().merges
    assert not Case().job().merges
