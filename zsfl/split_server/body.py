"""The body's computation. Synchronous; runs in the compute thread.

The graphs of forwards that wait for their backward are an optimisation: any may be forgotten at any moment, and
then the client sends its input again, to this server or another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from zsfl.errors import InputNeeded, RemoteProtocolError
from zsfl.ids import Cid, Version, parse_cid
from zsfl.learning.job import Job
from zsfl.learning.part import Backward, Forward, Part, PartWeights, loss_sum
from zsfl.spill.layout import SpillMeta
from zsfl.spill.store import SpillStore
from zsfl.wire import messages
from zsfl.wire.messages import SpillOffer

FORWARDS_PER_SLOT = 4
"""Graphs kept for each admitted request: clients are between forward and backward for about as long as in one."""
KEPT_VERSIONS = 2
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
            for cid in [cid for cid in self._graphs if parse_cid(cid)[1] == old]:
                del self._graphs[cid]

    def backward(
        self,
        weights: Callable[[], PartWeights],
        request: messages.Backward,
        grad: torch.Tensor,
        x: torch.Tensor | None,
    ) -> Done:
        """Gradients of the cached forward, or of one made again from `x`; InputNeeded when there is neither."""
        kept = self._graphs.pop(request.cid, None)
        if x is not None:
            used = weights()
            kept = (
                used,
                self._part.forward(used, x, seed=request.seed, train=True, need_input_grad=request.want_grad),
            )
        if kept is None:
            raise InputNeeded(f"{self._node} no longer holds the forward of {request.cid}; send its input again")
        return self._spill(request, self._part.backward(*kept, grad), None)

    def step(self, weights: PartWeights, request: messages.Step, x: torch.Tensor, target: torch.Tensor) -> Done:
        """Label sharing: forward, loss and backward in one."""
        forward = self._part.forward(weights, x, seed=request.seed, train=True, need_input_grad=request.want_grad)
        loss = loss_sum(self._job.loss, forward.output, target.to(self._part.device), request.n)
        backward = self._part.backward(weights, forward.ending_in(loss))
        return self._spill(request, backward, float(loss.detach()))

    def _spill(self, request: messages.Backward | messages.Step, result: Backward, loss: float | None) -> Done:
        _, version, _ = parse_cid(request.cid)
        if version != request.version:
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
