"""What a client computes itself: head, tail and loss. Synchronous; runs in the lane."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from zsfl.client.noise import Noise
from zsfl.errors import ConfigError
from zsfl.ids import Cid, Version, parse_cid
from zsfl.learning.job import Job
from zsfl.learning.model import SplitModel
from zsfl.learning.modes import Async
from zsfl.learning.part import Backward, Forward, Part, PartWeights, loss_sum
from zsfl.learning.skew import shifted_loss


@dataclass(frozen=True, slots=True)
class ClientWeights:
    """One version of head and tail."""

    head: PartWeights
    tail: PartWeights | None


@dataclass(slots=True, kw_only=True)
class StepInHand:
    """A step between its start and the commit that counts it: enough to drive it again on any server."""

    cid: Cid
    version: Version
    seed: int
    n: float
    samples: int
    target: torch.Tensor
    head: Forward
    activations: torch.Tensor
    """Output of the head, detached: the input of the body."""
    grads: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    buffers: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    loss_sum: float = 0.0
    shift: torch.Tensor | None = None
    """Added to the logits before the loss, one for each class."""
    again: bool = False
    """Whether it may have been made before, by this client or by one that ran in its place."""
    grad: torch.Tensor | None = None
    """Gradient of the loss sum by the body's output (U-shape only)."""


def step_seed(job: Job, cid: Cid) -> int:
    """Seed of everything random in one step, the same on whichever server runs it and in every run; below 2**52.

    So it is when a window is asked for anew, and its steps have other names.
    """
    step = parse_cid(cid)
    k = step.k if isinstance(job.how, Async) else step.k % job.steps
    text = f"{job.seed}/{step.version}/{step.shard}/{k}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")


def _drawn_like(weights: PartWeights, seed: int) -> PartWeights:
    """Parameters of these shapes at random, of a size with which outputs stay as large as inputs."""
    drawing = torch.Generator().manual_seed(seed)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        scale = max(1, tensor[0].numel() if tensor.ndim else 1) ** -0.5
        return (torch.randn(tensor.shape, generator=drawing, dtype=torch.float64) * scale).to(tensor)

    return replace(weights, params={name: drawn(tensor.detach()) for name, tensor in weights.params.items()})


class LocalParts:
    """Head and tail of one cut on this client's device."""

    def __init__(
        self,
        job: Job,
        model: SplitModel,
        device: torch.device,
        names: Mapping[str, str] | None = None,
        noise: Noise | None = None,
    ) -> None:
        """`names` as for a `Part`; `noise` is for activations in training. ConfigError where it would prove nothing."""
        self._job = job
        self._noise = noise
        part = partial(Part, device=device, batch_norm=job.batch_norm, autocast=job.autocast, names=names)
        self._head = part(model.head, "head")
        self._tail = None if model.tail is None else part(model.tail, "tail")
        self.want_grad = bool(self._head.trainable)
        self._proves = job.protect is not None and job.protect.epsilon is not None
        if self._proves and self._head.couples:
            raise ConfigError(
                "protect states what is private of each sample, and batch norm in the head tells of the others of its "
                "batch: use batch_norm='frozen' or group norm there"
            )
        self._rows_checked = False
        self.step_bytes = 0
        """Of the activations of the last step that was begun."""

    @property
    def u_shaped(self) -> bool:
        """Whether this client computes the loss itself."""
        return self._tail is not None

    def warnings(self) -> list[str]:
        """What makes the run differ from training in one process."""
        return self._head.warnings() + ([] if self._tail is None else self._tail.warnings())

    def load(self, state: Mapping[str, torch.Tensor]) -> ClientWeights:
        """Head and tail of a published version."""
        return ClientWeights(self._head.load(state), None if self._tail is None else self._tail.load(state))

    def begin(
        self,
        weights: ClientWeights,
        cid: Cid,
        version: Version,
        x: torch.Tensor,
        y: torch.Tensor,
        shift: torch.Tensor | None = None,
    ) -> StepInHand:
        """Head forward; `x` may be spoiled by it. ConfigError when it breaks what the job states of its protection."""
        seed = step_seed(self._job, cid)
        if self._proves and not self._rows_checked and len(x) > 1:
            self._check_rows(weights, x, seed)
        head = self._head.forward(weights.head, x, seed=seed, train=True, need_input_grad=False, spare=True)
        if self._proves:
            self._check_buffers(weights, head)
        if self._noise is not None:
            head = replace(head, output=self._noise.on(head.output, cid, seed, len(y)))
        self.step_bytes = head.output.nbytes
        return StepInHand(
            cid=cid,
            version=version,
            seed=seed,
            n=self._weight(y),
            samples=len(y),
            target=y,
            head=head,
            activations=head.output.detach(),
            shift=shift,
        )

    def _check_rows(self, weights: ClientWeights, x: torch.Tensor, seed: int) -> None:
        """Another last sample must leave the outputs of the others what they are; looked at in the first step.

        The weights that came may hide that they do not, by zeros, or by numbers that are too large; those that are
        drawn here are for nobody to choose.
        """
        if any(self._couples(head, x, seed) for head in (weights.head, *map(_drawn_like, [weights.head] * 2, (1, 2)))):
            raise ConfigError(
                "protect states what is private of each sample, and in the head of this job the output of a sample "
                "depends on the others of its batch: use layers there that take each sample by itself"
            )
        self._rows_checked = True

    def _couples(self, head: PartWeights, x: torch.Tensor, seed: int) -> bool:
        with torch.no_grad():
            one, other = (
                self._head.forward(head, given, seed=seed, train=True, need_input_grad=False, spare=True).output
                for given in (x.clone(), torch.cat([x[:-1], x[:1]]))
            )
        return not torch.allclose(one[:-1], other[:-1], rtol=1e-4, atol=1e-6, equal_nan=True)

    def _check_buffers(self, weights: ClientWeights, head: Forward) -> None:
        """Buffers travel as they are, without noise."""
        for name, before in weights.head.buffers.items():
            after = head.buffers.get(full := self._head.full_name(name))
            if after is not None and not torch.equal(before, after):
                raise ConfigError(
                    f"protect states what is private of each sample, and a training pass writes to {full}, which is "
                    "sent without noise: keep such statistics out of the head, or in a buffer that is not persistent"
                )

    def _weight(self, y: torch.Tensor) -> float:
        """What a batch weighs; ConfigError when the job's function gives what is no weight."""
        n = float(len(y)) if self._job.loss_weight is None else float(self._job.loss_weight(y))
        if not 0 <= n < math.inf:
            raise ConfigError(f"loss_weight gives {n} for a batch: it must be a number of 0 or more")
        if why := self._job.objection_to(n, len(y)):
            raise ConfigError(
                f"a batch cannot be used: {why}. State a larger most_weight in the job, or scale its weights"
            )
        return n

    def turn(self, weights: ClientWeights, step: StepInHand, output: torch.Tensor) -> None:
        """U-shape: tail forward, loss, and backward to the cut."""
        if self._tail is None or weights.tail is None:
            raise TypeError("a job without a tail has no turn")
        forward = self._tail.forward(weights.tail, output, seed=step.seed + 2, train=True)
        loss_of = self._job.loss if step.shift is None else shifted_loss(self._job.loss, step.shift)
        whose = f"shard {parse_cid(step.cid).shard}"
        loss = loss_sum(loss_of, forward.output, step.target.to(self._tail.device), step.n, whose)
        backward = self._tail.backward(weights.tail, forward.ending_in(loss))
        step.loss_sum = float(loss.detach())
        step.grad = backward.grad_input
        step.grads.update(backward.grads)
        step.buffers.update(backward.buffers)

    def finish(self, weights: ClientWeights, step: StepInHand, grad: torch.Tensor | None) -> None:
        """Head backward with the gradient the server sent, None for a frozen head."""
        if grad is None:
            backward = Backward(grads={}, buffers=dict(step.head.buffers), grad_input=None)
        else:
            backward = self._head.backward(weights.head, step.head, grad)
        step.grads.update(backward.grads)
        step.buffers.update(backward.buffers)

    def moved(self, weights: ClientWeights, step: StepInHand, lr: float) -> ClientWeights:
        """Head and tail after a plain gradient step of this client alone, at this rate."""
        rate = lr / step.n if step.n else 0.0
        tail = None if self._tail is None or weights.tail is None else self._tail.moved(weights.tail, step.grads, rate)
        return ClientWeights(self._head.moved(weights.head, step.grads, rate), tail)

    def head_infer(self, weights: ClientWeights, x: torch.Tensor) -> torch.Tensor:
        """Head forward in evaluation mode."""
        return self._head.infer(weights.head, x)

    def score(
        self, weights: ClientWeights, output: torch.Tensor, y: torch.Tensor, shard: int
    ) -> tuple[float, float | None, float]:
        """Loss sum, correct samples (None without a metric) and weight of a held-out batch of a shard."""
        if self._tail is not None and weights.tail is not None:
            output = self._tail.infer(weights.tail, output)
        y = y.to(output.device)
        n = self._weight(y)
        with torch.no_grad():
            loss = float(loss_sum(self._job.loss, output, y, n, f"what shard {shard} holds out"))
            correct = None if self._job.metric is None else float(self._job.metric(output, y))
        return loss, correct, n
