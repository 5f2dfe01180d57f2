"""Batch norm and dropout in a convolutional body: each choice of statistics is its own plain torch training.

Two clients and their bodies on a server, without sockets: what they spill is read back, averaged and pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zsfl
from zsfl.client.local import LocalParts, StepInHand
from zsfl.errors import InputNeeded, ZsflError
from zsfl.ids import Cid, RunId, Version, step_cid
from zsfl.learning.averaging import Contribution, average
from zsfl.learning.norms import norm_rules, pool_buffers
from zsfl.learning.part import Part, PartWeights
from zsfl.spill.layout import SpillMeta, decode
from zsfl.spill.store import SpillStore
from zsfl.split_server.body import BodyWorker, Done
from zsfl.split_server.meeting import Misfit
from zsfl.tensors.codec import Codec
from zsfl.wire import messages

Choice = Literal["per-client", "merged", "frozen"]
State = dict[str, Tensor]
Window = list[tuple[Tensor, Tensor]]
Steps = dict[Cid, StepInHand]
CPU = torch.device("cpu")
LR, WINDOWS, SIZES = 0.3, 3, (5, 1)
KINDS = ("grad/", "buffer/")
NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def parts(*, tail: bool, dropout: float = 0.0) -> dict[str, nn.Module]:
    torch.manual_seed(4)
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(9, 3, 5, 5) * 2 + 1)  # running statistics that are none of a client's batch
    body = [nn.Conv2d(2, 3, 3), norm, nn.Tanh(), nn.Dropout(dropout), nn.Flatten()]
    end = nn.Linear(48, 4)
    model: dict[str, nn.Module] = {"head": nn.Conv2d(1, 2, 3, padding=1), "body": nn.Sequential(*body)}
    model |= {"tail": end} if tail else {"body": nn.Sequential(*body, end)}
    return {name: part.double() for name, part in model.items()}


def windows() -> Iterator[Window]:
    generator = torch.Generator().manual_seed(8)
    for _ in range(WINDOWS):
        yield [
            (
                torch.randn(size, 1, 6, 6, generator=generator, dtype=torch.float64) * (1 + client) + client,
                torch.randint(4, (size,), generator=generator),
            )
            for client, size in enumerate(SIZES)
        ]


# --- in plain torch -----------------------------------------------------------------------------------------


def ordinary(choice: Choice, *, tail: bool) -> State:
    model = nn.Sequential()
    for name, part in parts(tail=tail).items():
        model.add_module(name, part)
    norm = model.get_submodule("body.1")
    if choice == "frozen":
        norm.eval()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for window in windows():
        optimizer.zero_grad()
        if choice == "per-client":
            each_on_its_own(model, norm, window)
        else:
            x, y = (torch.cat(column) for column in zip(*window, strict=True))
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def each_on_its_own(model: nn.Module, norm: nn.Module, window: Window) -> None:
    """Gradients of batches that know nothing of one another; running statistics of all that went into the norm."""
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    went_in: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: went_in.append(args[0].detach()))
    for x, y in window:
        (F.cross_entropy(model(x), y, reduction="sum") / sum(SIZES)).backward()
    hook.remove()
    norm.load_state_dict(before)
    with torch.no_grad():
        norm(torch.cat(went_in))


# --- split --------------------------------------------------------------------------------------------------


def job_with(choice: Choice, *, tail: bool, dropout: float = 0.0) -> zsfl.Job:
    return zsfl.Job(
        name="norms",
        model=lambda: zsfl.SplitModel(*parts(tail=tail, dropout=dropout).values()),
        loss=F.cross_entropy,
        data=lambda *_: pytest.fail("nobody asks for data"),
        optimizer=zsfl.sgd(LR),
        batch_norm=choice,
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """The requests of steps, as clients would send them."""

    steps: Steps
    merged: int

    def forward(self) -> dict[Cid, tuple[messages.Forward, Tensor]]:
        return {
            cid: (self._request(messages.Forward, step, input=step.activations), step.activations)
            for cid, step in self.steps.items()
        }

    def backward(self, inputs_of: set[Cid]) -> dict[Cid, tuple[messages.Backward, Tensor, Tensor | None]]:
        made: dict[Cid, tuple[messages.Backward, Tensor, Tensor | None]] = {}
        for cid, step in self.steps.items():
            assert step.grad is not None
            request = self._request(messages.Backward, step, grad=step.grad, input=None)
            made[cid] = request, step.grad, step.activations if cid in inputs_of else None
        return made

    def step(self) -> dict[Cid, tuple[messages.Step, Tensor, Tensor]]:
        return {
            cid: (
                self._request(messages.Step, step, input=step.activations, target=step.target),
                step.activations,
                step.target,
            )
            for cid, step in self.steps.items()
        }

    def _request(self, kind: Callable[..., Any], step: StepInHand, **tensors: Tensor | None) -> Any:
        fields: dict[str, Any] = {
            name: None if tensor is None else Codec.parse("raw").pack(name, tensor)[0]
            for name, tensor in tensors.items()
        }
        if kind is not messages.Forward:
            fields |= {"n": step.n, "samples": step.samples, "want_grad": True, "provenance": "client"}
        return kind(cid=step.cid, version=step.version, seed=step.seed + 1, merged=self.merged, **fields)


def done(outcome: Done | ZsflError) -> Done:
    if isinstance(outcome, ZsflError):
        raise outcome
    return outcome


class Server:
    """A body on a server of its own."""

    def __init__(self, job: zsfl.Job, folder: Path, name: str) -> None:
        self._merges = job.batch_norm == "merged"
        self.part = Part(job.build().body, "body", CPU, batch_norm=job.batch_norm)
        self._spills = SpillStore(folder / name)
        self._worker = BodyWorker(job, self.part, self._spills, node=name, slots=2)

    def asked(self, steps: Steps) -> Asked:
        return Asked(steps, len(steps) if self._merges else 0)

    def forward(self, weights: PartWeights, steps: Steps) -> dict[Cid, Tensor]:
        requests = self.asked(steps).forward()
        if self._merges:
            return self._worker.forward_merged(weights, requests)
        return {cid: self._worker.forward_all(weights, [given])[0] for cid, given in requests.items()}

    def backward(self, weights: PartWeights, steps: Steps, inputs_of: set[Cid]) -> dict[Cid, Done]:
        requests = self.asked(steps).backward(inputs_of)
        if self._merges:
            return self._worker.backward_merged(weights if len(inputs_of) == len(steps) else None, requests)
        return {cid: done(self._worker.backward_all(weights, [given])[0]) for cid, given in requests.items()}

    def step(self, weights: PartWeights, steps: Steps) -> dict[Cid, Done]:
        requests = self.asked(steps).step()
        if self._merges:
            return self._worker.step_merged(weights, requests)
        return {cid: self._worker.step_all(weights, [given])[0] for cid, given in requests.items()}

    def spilled(self, cid: Cid) -> tuple[SpillMeta, State]:
        data = self._spills.read((cid, "body"))
        assert data is not None
        return decode(data)

    def contribution(self, cid: Cid) -> Contribution:
        meta, tensors = self.spilled(cid)
        named = {kind: {n[len(kind) :]: t for n, t in tensors.items() if n.startswith(kind)} for kind in KINDS}
        return Contribution(
            cid=cid,
            part="body",
            version=meta.version,
            n=meta.n,
            loss_sum=meta.loss_sum,
            samples=meta.samples,
            grads=named["grad/"],
            buffers=named["buffer/"],
            node=meta.node,
        )


def begin(job: zsfl.Job, state: State, window: Window, version: int) -> tuple[LocalParts, Any, Steps]:
    local = LocalParts(job, job.build(), CPU)
    weights = local.load(state)
    cids = [step_cid(RunId("abcdef"), shard, Version(version)) for shard in range(len(window))]
    steps = {cid: local.begin(weights, cid, Version(version), *batch) for cid, batch in zip(cids, window, strict=True)}
    return local, weights, steps


def split_window(job: zsfl.Job, server: Server, state: State, window: Window, version: int) -> list[Contribution]:
    """What both clients and the server contribute."""
    local, weights, steps = begin(job, state, window, version)
    body = server.part.load(state)
    if local.u_shaped:
        for cid, output in server.forward(body, steps).items():
            local.turn(weights, steps[cid], output)
        done = server.backward(body, steps, inputs_of=set())
    else:
        done = server.step(body, steps)
    made = [server.contribution(cid) for cid in steps]
    for cid, step in steps.items():
        step.loss_sum = done[cid].loss_sum or step.loss_sum
        local.finish(weights, step, done[cid].grad)
        made.append(
            Contribution(
                cid=cid,
                part="client",
                version=step.version,
                n=step.n,
                loss_sum=step.loss_sum,
                samples=step.samples,
                grads=step.grads,
                buffers=step.buffers,
                node="client",
            )
        )
    return made


@pytest.mark.parametrize("tail", [True, False], ids=["u-shaped", "label-sharing"])
@pytest.mark.parametrize("choice", ["per-client", "merged", "frozen"])
def test_three_steps_equal_plain_torch(choice: Choice, tail: bool, tmp_path: Path) -> None:
    job = job_with(choice, tail=tail)
    model = job.build()
    server = Server(job, tmp_path, "server")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for version, window in enumerate(windows()):
        contributions = split_window(job, server, state, window, version)
        step = {name: state[name] - LR * grad for name, grad in average(contributions).items()}
        pooled = pool_buffers(state, contributions, norm_rules(model))
        assert pooled.keys() == (set() if choice == "frozen" else {f"body.1.{name}" for name in NORM_BUFFERS})
        state |= step | pooled
    expected = ordinary(choice, tail=tail)
    torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)
    others = [ordinary(other, tail=tail) for other in ("per-client", "merged", "frozen") if other != choice]
    assert all((state["body.0.weight"] - other["body.0.weight"]).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize("choice", ["per-client", "merged"])
def test_a_backward_on_another_server_is_bit_identical_with_dropout_and_batch_norm(
    choice: Choice, tmp_path: Path
) -> None:
    job = job_with(choice, tail=True, dropout=0.5)
    state = job.build().state_dict()
    first, second = (Server(job, tmp_path, name) for name in ("first", "second"))
    local, weights, steps = begin(job, state, next(windows()), 0)
    for cid, output in first.forward(first.part.load(state), steps).items():
        local.turn(weights, steps[cid], output)
    one = first.backward(first.part.load(state), steps, inputs_of=set())
    torch.rand(5)
    again = second.backward(second.part.load(state), steps, inputs_of=set(steps))
    for cid in steps:
        (meta, tensors), (again_meta, again_tensors) = first.spilled(cid), second.spilled(cid)
        assert (meta.n, meta.samples, meta.cid) == (again_meta.n, again_meta.samples, again_meta.cid)
        assert tensors.keys() == again_tensors.keys()
        assert all(torch.equal(tensor, again_tensors[name]) for name, tensor in tensors.items())
        mine, theirs = one[cid].grad, again[cid].grad
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)
        assert mine.count_nonzero()


def test_a_forgotten_merged_batch_needs_all_its_inputs(tmp_path: Path) -> None:
    job = job_with("merged", tail=True)
    state = job.build().state_dict()
    server = Server(job, tmp_path, "server")
    body = server.part.load(state)
    local, weights, steps = begin(job, state, next(windows()), 0)
    for cid, output in server.forward(body, steps).items():
        local.turn(weights, steps[cid], output)
    server.backward(body, steps, inputs_of=set())
    first, second = (server.spilled(cid) for cid in steps)
    assert {name for name in first[1] if name.startswith("grad/")} == {f"grad/{n}" for n in server.part.trainable}
    assert second[1] == {}  # a missing gradient is a zero one
    assert [meta.n for meta, _ in (first, second)] == list(SIZES)
    for inputs_of in (set[Cid](), {next(iter(steps))}):
        with pytest.raises(InputNeeded, match="send all its inputs again"):
            server.backward(body, steps, inputs_of)
    server.backward(body, steps, inputs_of=set(steps))
    assert all(torch.equal(tensor, first[1][name]) for name, tensor in server.spilled(next(iter(steps)))[1].items())


@pytest.mark.parametrize("what", ["input", "rows of the gradient", "target", "label"])
def test_a_step_that_does_not_fit_the_merged_batch_is_named(what: str, tmp_path: Path) -> None:
    job = job_with("merged", tail=what not in ("target", "label"))
    server = Server(job, tmp_path, "server")
    state = {name: tensor.clone() for name, tensor in job.build().state_dict().items()}
    three = [*next(windows()), next(windows())[0]]
    local, weights, steps = begin(job, state, three, 0)
    body, wrong = server.part.load(state), steps[next(iter(steps))]
    if what in ("target", "label"):
        wrong.target = wrong.target[:-1] if what == "target" else wrong.target + 4  # of 4 classes
        with pytest.raises(Misfit) as told:
            server.step(body, steps)
    elif what == "input":
        wrong.activations = wrong.activations[:, :1]
        with pytest.raises(Misfit) as told:
            server.forward(body, steps)
    else:
        for cid, output in server.forward(body, steps).items():
            local.turn(weights, steps[cid], output)
        assert wrong.grad is not None
        wrong.grad, right = wrong.grad[:-1], wrong.grad
        with pytest.raises(Misfit) as told:
            server.backward(body, steps, inputs_of=set())
        wrong.grad = right
        assert server.backward(body, steps, inputs_of=set()).keys() == steps.keys()
    assert told.value.cids == {wrong.cid}
