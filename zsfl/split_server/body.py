"""The body's computation. Synchronous; runs in the lane.

The graphs of forwards that wait for their backward are an optimisation: any may be forgotten at any moment, and
then the client sends its input again, to this server or another.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from zsfl.errors import BadShape, ConfigError, InputNeeded, RemoteProtocolError, ZsflError
from zsfl.ids import Cid, Version, parse_cid
from zsfl.learning.averaging import StepShare
from zsfl.learning.job import Job
from zsfl.learning.part import Backward, Forward, Part, PartWeights, loss_sum
from zsfl.learning.skew import shifted_loss
from zsfl.spill.layout import SpillMeta
from zsfl.spill.stored import Spills
from zsfl.split_server.meeting import Group, Misfit, group_of
from zsfl.wire import messages
from zsfl.wire.messages import SpillOffer

FORWARDS_PER_SLOT = 4
"""Graphs kept for each admitted request: clients are between forward and backward for about as long as in one."""
KEPT_BYTES = 256 << 20
"""Inputs and outputs of all passes whose graphs are kept; what is in between may be a multiple of it."""
KEPT_VERSIONS = 4
"""Graphs are kept of the versions that were asked for last: each of them also keeps its version's weights."""


TOLERANCE = 1e-3
"""By how much a sample's output may differ, relative to the largest, when it goes through the body with others."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step's body part is spilled."""

    offer: SpillOffer | None
    """None where it is in the spill of another step of the same pass."""
    grad: torch.Tensor | None
    loss_sum: float | None


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """A forward pass that waits for its backward, of one step or of several that came together."""

    weights: PartWeights
    forward: Forward
    input: torch.Tensor
    rows: dict[Cid, slice]

    @property
    def step_bytes(self) -> int:
        """Of input and output of one of its steps."""
        return (self.input.nbytes + self.forward.output.nbytes) // len(self.rows)

    def misfit(self, cid: Cid, grad: torch.Tensor) -> BadShape | None:
        """What is wrong with the gradient of a step. Joined with others it may fit as a whole, and shift theirs."""
        due = (self.rows[cid].stop - self.rows[cid].start, *self.forward.output.shape[1:])
        if tuple(grad.shape) == due:
            return None
        return BadShape(f"the gradient of {cid} has the shape {tuple(grad.shape)}, and its output had {due}")


class BodyWorker:
    """Runs the body at given weights and spills its contributions."""

    def __init__(self, job: Job, part: Part, spills: Spills, *, node: str, slots: int) -> None:
        self._job = job
        self._part = part
        self._spills = spills
        self._node = node
        self._room = slots * FORWARDS_PER_SLOT
        self._graphs: OrderedDict[Cid, _Pass] = OrderedDict()
        self._kept_bytes = 0
        self._merged: OrderedDict[Group, _Pass] = OrderedDict()
        self._versions: OrderedDict[Version, None] = OrderedDict()
        """Oldest first by when they were last asked for; not by number, since a resumed run may go back."""
        self._may_merge = job.merges and not part.couples
        self._was_run = False
        self._independent: bool | None = None
        """Whether a sample's output was seen not to depend on what it goes through the body with."""

    @property
    def merges(self) -> bool:
        """Whether steps may go through the body together: none of them may be able to tell."""
        return self._may_merge and self._was_run and not self._part.draws and self._independent is not False

    @property
    def cached(self) -> int:
        """Forwards that wait for their backward, those of merged batches as one."""
        return len(self._graphs) + len(self._merged)

    def went_with(self, cid: Cid) -> Collection[Cid]:
        """The steps that went forward together with this one, and itself, while its graph is kept for its backward."""
        made = self._graphs.get(cid)
        return () if made is None else made.rows.keys()

    def infer(self, weights: PartWeights, x: torch.Tensor) -> torch.Tensor:
        """Output in evaluation mode."""
        return self._part.infer(weights, x).detach()

    def forward_all(
        self, weights: PartWeights, asked: Sequence[tuple[messages.Forward, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Outputs in training mode, of one pass; its graph is kept for the backward while there is room."""
        requests = [request for request, _ in asked]
        made = self._pass(
            weights, [(one.cid, x) for one, x in asked], requests[0].seed, any(one.want_grad for one in requests)
        )
        if not self._is_independent(made, requests[-1]):
            return [output for one in asked for output in self.forward_all(weights, [one])]
        for request in requests:
            self._forget(request.cid)
            self._graphs[request.cid] = made
            self._kept_bytes += made.step_bytes
        self._forget_before(requests[0].version)
        while len(self._graphs) > self._room or (self._kept_bytes > KEPT_BYTES and len(self._graphs) > len(requests)):
            self._forget(next(iter(self._graphs)))
        output = made.forward.output.detach()
        self._was_run = True
        return [output[rows] for rows in made.rows.values()]

    def _pass(
        self, weights: PartWeights, inputs: Sequence[tuple[Cid, torch.Tensor]], seed: int, need_grad: bool
    ) -> _Pass:
        x = inputs[0][1] if len(inputs) == 1 else torch.cat([x for _, x in inputs])
        rows: dict[Cid, slice] = {}
        start = 0
        for cid, one in inputs:
            rows[cid] = slice(start, start + len(one))
            start += len(one)
        forward = self._part.forward(weights, x, seed=seed, train=True, need_input_grad=need_grad)
        return _Pass(weights, forward, x, rows)

    def _is_independent(self, made: _Pass, request: messages.Forward | messages.Step) -> bool:
        """Whether this step's output is what it would be by itself: layers can couple samples that nobody knows of.

        Looked at once, at the first pass of several.
        """
        if len(made.rows) == 1:
            return True
        if self._independent is None:
            rows = made.rows[request.cid]
            alone = self._part.forward(made.weights, made.input[rows], seed=request.seed, train=True).output.detach()
            worst = float(alone.abs().max()) if alone.numel() else 0.0
            together = made.forward.output.detach()[rows]
            self._independent = torch.allclose(alone, together, rtol=TOLERANCE, atol=TOLERANCE * worst, equal_nan=True)
        return self._independent

    def _forget_before(self, version: Version) -> None:
        """Let go of the graphs of all but the versions that were asked for last, `version` being the newest."""
        self._versions[version] = None
        self._versions.move_to_end(version)
        while len(self._versions) > KEPT_VERSIONS:
            old, _ = self._versions.popitem(last=False)
            for cid in [cid for cid in self._graphs if parse_cid(cid).version == old]:
                self._forget(cid)

    def _forget(self, cid: Cid) -> _Pass | None:
        """Keep the graph of this step no more; what was kept."""
        if made := self._graphs.pop(cid, None):
            self._kept_bytes -= made.step_bytes
        return made

    def backward_all(
        self,
        weights: PartWeights | None,
        given: Sequence[tuple[messages.Backward, torch.Tensor, torch.Tensor | None]],
    ) -> list[Done | ZsflError]:
        """Gradients of the cached forwards, or of one made again from its input; InputNeeded when there is neither.

        Those that went forward together go backward together if all of them are here. The others are taken through
        the body once more, in as few passes as can be.
        """
        request, grad, x = given[0]
        if x is not None and weights is not None:
            self._forget(request.cid)
            made = self._pass(weights, [(request.cid, x)], request.seed, request.want_grad)
            return list(self._spill_all([request], self._part.backward(weights, made.forward, grad), [None]))
        results: dict[Cid, Done | ZsflError] = {}
        grads = {request.cid: (request, grad) for request, grad, _ in given}
        passes: dict[int, _Pass] = {}
        for cid in grads:
            made = self._forget(cid)
            if made is None:
                said = f"{self._node} no longer holds the forward of {cid}; send its input again"
                results[cid] = InputNeeded(said)
            else:
                passes[id(made)] = made
        again: list[tuple[Cid, torch.Tensor]] = []
        for made in passes.values():
            results |= {cid: wrong for cid in made.rows if cid in grads and (wrong := made.misfit(cid, grads[cid][1]))}
            here = [cid for cid in made.rows if cid in grads and cid not in results]
            if len(here) == len(made.rows):
                results |= self._backward_pass(made, [grads[cid] for cid in made.rows])
            else:
                again += [(cid, made.input[made.rows[cid]]) for cid in here]
        if again:
            used = next(iter(passes.values())).weights
            requests = [grads[cid][0] for cid, _ in again]
            made = self._pass(used, again, requests[0].seed, any(one.want_grad for one in requests))
            results |= self._backward_pass(made, [grads[cid] for cid, _ in again])
        return [results[cid] for cid in grads]

    def _backward_pass(
        self, made: _Pass, given: Sequence[tuple[messages.Backward, torch.Tensor]]
    ) -> dict[Cid, Done | ZsflError]:
        """The backward of one pass, with the gradients of all its steps in order."""
        grad = given[0][1] if len(given) == 1 else torch.cat([grad for _, grad in given])
        result = self._part.backward(made.weights, made.forward, grad)
        requests = [request for request, _ in given]
        done = self._spill_all(requests, result, [None] * len(given), list(made.rows.values()))
        return {request.cid: one for request, one in zip(requests, done, strict=True)}

    def step_all(
        self, weights: PartWeights, given: Sequence[tuple[messages.Step, torch.Tensor, torch.Tensor]]
    ) -> list[Done]:
        """Label sharing: forward, loss and backward in one, of one step or several."""
        requests = [request for request, _, _ in given]
        made = self._pass(
            weights, [(one.cid, x) for one, x, _ in given], requests[0].seed, any(one.want_grad for one in requests)
        )
        self._was_run = True
        if not self._is_independent(made, requests[-1]):
            return [done for one in given for done in self.step_all(weights, [one])]
        losses = [
            self._loss(request, made.forward.output[rows], target)
            for (request, _, target), rows in zip(given, made.rows.values(), strict=True)
        ]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        result = self._part.backward(weights, made.forward.ending_in(loss))
        return self._spill_all(requests, result, [float(one.detach()) for one in losses], list(made.rows.values()))

    # --- merged batches ---------------------------------------------------------------------------------

    def forward_merged(
        self, weights: PartWeights, inputs: Mapping[Cid, tuple[messages.Forward, torch.Tensor]]
    ) -> dict[Cid, torch.Tensor]:
        """Output of one pass over all inputs in cid order, under the seed of the first; each step gets its slice."""
        made = self._merged_pass(weights, {cid: (request.seed, x) for cid, (request, x) in inputs.items()})
        self._merged[group_of(next(iter(inputs)))] = made
        while len(self._merged) > KEPT_VERSIONS:
            self._merged.popitem(last=False)
        output = made.forward.output.detach()
        return {cid: output[rows] for cid, rows in made.rows.items()}

    def backward_merged(
        self,
        weights: PartWeights | None,
        given: Mapping[Cid, tuple[messages.Backward, torch.Tensor, torch.Tensor | None]],
    ) -> dict[Cid, Done]:
        """One backward through the merged pass; InputNeeded when it is forgotten and not everybody sent its input."""
        made = self._merged.get(group_of(next(iter(given))))
        if made is not None and made.rows.keys() != given.keys():
            made = None
        inputs = {cid: (request.seed, x) for cid, (request, _, x) in given.items() if x is not None}
        if made is None and weights is not None and len(inputs) == len(given):
            made = self._merged_pass(weights, inputs)
        if made is None:
            raise InputNeeded(f"{self._node} no longer holds the merged batch; send all its inputs again")
        if wrong := {cid: found for cid, (_, grad, _) in given.items() if (found := made.misfit(cid, grad))}:
            raise Misfit(wrong.keys(), "; ".join(map(str, wrong.values())))
        self._merged.pop(group_of(next(iter(given))), None)
        result = self._part.backward(made.weights, made.forward, torch.cat([grad for _, grad, _ in given.values()]))
        return self._spill_merged([(request, len(grad)) for request, grad, _ in given.values()], result, {})

    def step_merged(
        self, weights: PartWeights, given: Mapping[Cid, tuple[messages.Step, torch.Tensor, torch.Tensor]]
    ) -> dict[Cid, Done]:
        """Label sharing: one pass over all inputs, each step's own loss, one backward."""
        made = self._merged_pass(weights, {cid: (request.seed, x) for cid, (request, x, _) in given.items()})
        losses: dict[Cid, torch.Tensor] = {}
        for cid, (request, _, target) in given.items():
            try:
                losses[cid] = self._loss(request, made.forward.output[made.rows[cid]], target)
            except (ConfigError, RuntimeError, TypeError, ValueError, IndexError) as error:
                raise Misfit([cid], f"the loss of {cid} fails: {type(error).__name__}: {error}") from error
        result = self._part.backward(weights, made.forward.ending_in(torch.stack(list(losses.values())).sum()))
        steps = [(request, len(x)) for request, x, _ in given.values()]
        return self._spill_merged(steps, result, {cid: float(loss.detach()) for cid, loss in losses.items()})

    def _merged_pass(self, weights: PartWeights, inputs: Mapping[Cid, tuple[int, torch.Tensor]]) -> _Pass:
        """Under the seed of the first; Misfit names those that are shaped unlike most."""
        shapes = {cid: (x.dtype, *x.shape[1:]) for cid, (_, x) in inputs.items()}
        usual, _ = Counter(shapes.values()).most_common(1)[0]
        if wrong := [cid for cid, shape in shapes.items() if shape != usual]:
            shape = tuple(inputs[wrong[0]][1].shape)
            raise Misfit(wrong, f"the input of {wrong[0]} has the shape {shape}, which those of most steps have not")
        seed = next(iter(inputs.values()))[0]
        return self._pass(weights, [(cid, x) for cid, (_, x) in inputs.items()], seed, need_grad=True)

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
        whose = f"shard {parse_cid(request.cid).shard}"
        return loss_sum(loss, output, target.to(self._part.device), request.n, whose)

    def _spill_all(
        self,
        requests: Sequence[messages.Backward | messages.Step],
        result: Backward,
        losses: Sequence[float | None],
        rows: Sequence[slice] = (),
    ) -> list[Done]:
        """Spill what one pass gave, as one contribution of all its steps."""
        known = [loss for loss in losses if loss is not None]
        offer = self._put(requests, result, sum(known) if known else None)
        done: list[Done] = []
        for number, (request, loss) in enumerate(zip(requests, losses, strict=True)):
            grad = result.grad_input if request.want_grad else None
            if grad is not None and len(requests) > 1:
                grad = grad[rows[number]]
            done.append(Done(None if number else offer, grad, loss))
        return done

    def _spill(self, request: messages.Backward | messages.Step, result: Backward, loss: float | None) -> Done:
        return self._spill_all([request], result, [loss])[0]

    def _put(
        self, requests: Sequence[messages.Backward | messages.Step], result: Backward, loss: float | None
    ) -> SpillOffer:
        first = requests[0]
        for request in requests:
            if parse_cid(request.cid).version != request.version:
                raise RemoteProtocolError(f"step {request.cid} cannot be of version {request.version}")
        shares = tuple(StepShare(cid=one.cid, n=one.n, samples=one.samples, client=one.provenance) for one in requests)
        meta = SpillMeta(
            cid=first.cid,
            part="body",
            version=first.version,
            n=sum(one.n for one in requests),
            samples=sum(one.samples for one in requests),
            loss_sum=loss,
            client=first.provenance,
            node=self._node,
            members=shares if len(shares) > 1 else (),
        )
        tensors = {f"grad/{name}": tensor for name, tensor in result.grads.items()}
        tensors |= {f"buffer/{name}": tensor for name, tensor in result.buffers.items()}
        return self._spills.put(meta, tensors)
