"""The body's computation. Synchronous; runs in the compute thread.

The graphs of forwards that wait for their backward are an optimisation: any may be forgotten at any moment, and
then the client sends its input again, to this server or another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from zsfl.errors import InputNeeded, RemoteProtocolError
from zsfl.ids import Cid, Version, parse_cid
from zsfl.learning.job import Job
from zsfl.learning.part import Backward, Forward, Part, PartWeights, loss_sum
from zsfl.learning.skew import shifted_loss
from zsfl.spill.layout import SpillMeta
from zsfl.spill.store import SpillStore
from zsfl.split_server.meeting import Group, group_of
from zsfl.wire import messages
from zsfl.wire.messages import SpillOffer

FORWARDS_PER_SLOT = 4
"""Graphs kept for each admitted request: clients are between forward and backward for about as long as in one."""
KEPT_VERSIONS = 4
"""Graphs are kept of the versions that were asked for last: each of them also keeps its version's weights."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step's body part is spilled."""

    offer: SpillOffer
    grad: torch.Tensor | None
    loss_sum: float | None


class BodyWorker:
    """Runs the body at given weights and spills its contributions."""

    def __init__(self, job: Job, part: Part, spills: SpillStore, *, node: str, slots: int) -> None:
        self._job = job
        self._part = part
        self._spills = spills
        self._node = node
        self._room = slots * FORWARDS_PER_SLOT
        self._graphs: OrderedDict[Cid, tuple[PartWeights, Forward]] = OrderedDict()
        self._merged: OrderedDict[Group, tuple[PartWeights, Forward]] = OrderedDict()
        self._versions: OrderedDict[Version, None] = OrderedDict()
        """Oldest first by when they were last asked for; not by number, since a resumed run may go back."""

    @property
    def cached(self) -> int:
        """Forwards that wait for their backward."""
        return len(self._graphs)

    def infer(self, weights: PartWeights, x: torch.Tensor) -> torch.Tensor:
        """Output in evaluation mode."""
        return self._part.infer(weights, x).detach()

    def forward(self, weights: PartWeights, request: messages.Forward, x: torch.Tensor) -> torch.Tensor:
        """Output in training mode; the graph is kept for the backward while there is room."""
        forward = self._part.forward(weights, x, seed=request.seed, train=True)
        self._graphs[request.cid] = weights, forward
        self._forget_before(request.version)
        while len(self._graphs) > self._room:
            self._graphs.popitem(last=False)
        return forward.output.detach()

    def _forget_before(self, version: Version) -> None:
        """Let go of the graphs of all but the versions that were asked for last, `version` being the newest."""
        self._versions[version] = None
        self._versions.move_to_end(version)
        while len(self._versions) > KEPT_VERSIONS:
            old, _ = self._versions.popitem(last=False)
            for cid in [cid for cid in self._graphs if parse_cid(cid).version == old]:
                del self._graphs[cid]

    def backward(
        self,
        weights: PartWeights | None,
        request: messages.Backward,
        grad: torch.Tensor,
        x: torch.Tensor | None,
    ) -> Done:
        """Gradients of the cached forward, or of one made again from `x`; InputNeeded when there is neither."""
        kept = self._graphs.pop(request.cid, None)
        if x is not None and weights is not None:
            kept = (
                weights,
                self._part.forward(weights, x, seed=request.seed, train=True, need_input_grad=request.want_grad),
            )
        if kept is None:
            raise InputNeeded(f"{self._node} no longer holds the forward of {request.cid}; send its input again")
        return self._spill(request, self._part.backward(*kept, grad), None)

    # --- merged batches ---------------------------------------------------------------------------------

    def forward_merged(
        self, weights: PartWeights, inputs: Mapping[Cid, tuple[messages.Forward, torch.Tensor]]
    ) -> dict[Cid, torch.Tensor]:
        """Output of one pass over all inputs in cid order, under the seed of the first; each step gets its slice."""
        forward = self._merged_pass(weights, [(request.seed, x) for request, x in inputs.values()])
        self._merged[group_of(next(iter(inputs)))] = weights, forward
        while len(self._merged) > KEPT_VERSIONS:
            self._merged.popitem(last=False)
        slices = forward.output.detach().split([len(x) for _, x in inputs.values()])
        return dict(zip(inputs, slices, strict=True))

    def backward_merged(
        self,
        weights: PartWeights | None,
        given: Mapping[Cid, tuple[messages.Backward, torch.Tensor, torch.Tensor | None]],
    ) -> dict[Cid, Done]:
        """One backward through the merged pass; InputNeeded when it is forgotten and not everybody sent its input."""
        kept = self._merged.pop(group_of(next(iter(given))), None)
        inputs = [(request.seed, x) for request, _, x in given.values() if x is not None]
        if kept is None and weights is not None and len(inputs) == len(given):
            kept = weights, self._merged_pass(weights, inputs)
        if kept is None:
            raise InputNeeded(f"{self._node} no longer holds the merged batch; send all its inputs again")
        result = self._part.backward(*kept, torch.cat([grad for _, grad, _ in given.values()]))
        return self._spill_merged([(request, len(grad)) for request, grad, _ in given.values()], result, {})

    def step_merged(
        self, weights: PartWeights, given: Mapping[Cid, tuple[messages.Step, torch.Tensor, torch.Tensor]]
    ) -> dict[Cid, Done]:
        """Label sharing: one pass over all inputs, each step's own loss, one backward."""
        forward = self._merged_pass(weights, [(request.seed, x) for request, x, _ in given.values()])
        slices = forward.output.split([len(x) for _, x, _ in given.values()])
        losses = {
            cid: self._loss(request, output, target)
            for (cid, (request, _, target)), output in zip(given.items(), slices, strict=True)
        }
        result = self._part.backward(weights, forward.ending_in(torch.stack(list(losses.values())).sum()))
        steps = [(request, len(x)) for request, x, _ in given.values()]
        return self._spill_merged(steps, result, {cid: float(loss.detach()) for cid, loss in losses.items()})

    def _merged_pass(self, weights: PartWeights, inputs: Sequence[tuple[int, torch.Tensor]]) -> Forward:
        return self._part.forward(weights, torch.cat([x for _, x in inputs]), seed=inputs[0][0], train=True)

    def _spill_merged(
        self,
        steps: Sequence[tuple[messages.Backward | messages.Step, int]],
        result: Backward,
        losses: Mapping[Cid, float],
    ) -> dict[Cid, Done]:
        """One spill a step, given with its rows: the first has the gradients of all, the others none, so that their
        sum is right.
        """
        sizes = [rows for _, rows in steps]
        grads = [None] * len(sizes) if result.grad_input is None else result.grad_input.split(sizes)
        nothing = Backward(grads={}, buffers={}, grad_input=None)
        return {
            request.cid: self._spill(
                request, replace(nothing if number else result, grad_input=grad), losses.get(request.cid)
            )
            for number, ((request, _), grad) in enumerate(zip(steps, grads, strict=True))
        }

    def _loss(self, request: messages.Step, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = (
            shifted_loss(self._job.loss, torch.tensor(request.shift, dtype=torch.float64))
            if request.shift
            else self._job.loss
        )
        return loss_sum(loss, output, target.to(self._part.device), request.n)

    def step(self, weights: PartWeights, request: messages.Step, x: torch.Tensor, target: torch.Tensor) -> Done:
        """Label sharing: forward, loss and backward in one."""
        forward = self._part.forward(weights, x, seed=request.seed, train=True, need_input_grad=request.want_grad)
        loss = self._loss(request, forward.output, target)
        backward = self._part.backward(weights, forward.ending_in(loss))
        return self._spill(request, backward, float(loss.detach()))

    def _spill(self, request: messages.Backward | messages.Step, result: Backward, loss: float | None) -> Done:
        if parse_cid(request.cid).version != request.version:
            raise RemoteProtocolError(f"step {request.cid} cannot be of version {request.version}")
        meta = SpillMeta(
            cid=request.cid,
            part="body",
            version=request.version,
            n=request.n,
            samples=request.samples,
            loss_sum=loss,
            client=request.provenance,
            node=self._node,
        )
        tensors = {f"grad/{name}": tensor for name, tensor in result.grads.items()}
        tensors |= {f"buffer/{name}": tensor for name, tensor in result.buffers.items()}
        offer = self._spills.put(meta, tensors)
        return Done(offer, result.grad_input if request.want_grad else None, loss)
