"""What the body of a job costs on this machine, and what the codecs make of its activations. In this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from zsfl.errors import ConfigError, ZsflError
from zsfl.learning.batches import Batches
from zsfl.learning.cuts import Cuts
from zsfl.learning.job import Job
from zsfl.learning.part import Forward, Part, loss_sum
from zsfl.tensors.codec import Codec, Cost

CODECS = ("raw", "raw+lz4", "fp16", "fp16+lz4", "bf16", "bf16+shuffle+lz4", "int8", "int8+lz4")
"""Tried beside the job's own."""
WARM_UP = 3
LEAST_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyCost:
    """Of one cut, at the initial weights and the job's batch size."""

    cut: str
    """Empty where the job has one."""
    samples: int
    activations: torch.Tensor
    """What the head sends to the body."""
    parameters: int
    """Of the body."""
    forward_s: float
    """Median, with the way of the activations to the device."""
    backward_s: float
    """Median; without a tail, with the loss."""

    @property
    def steps_per_s(self) -> float:
        """What the device could do if it did nothing else."""
        return 1 / (self.forward_s + self.backward_s)


def body_costs(job: Job, device: torch.device, seconds: float) -> Iterator[BodyCost]:
    """Each cut in turn, for about so many seconds each; ConfigError when the job's data or model fails."""
    cuts = job.build_cuts()
    x, y = first_batch(job)
    for cut in cuts.all:
        yield _body_cost(job, cuts, cut, x, y, device, seconds)


def codec_costs(job: Job, activations: torch.Tensor) -> Iterator[tuple[Codec, Cost]]:
    """What each codec does to these very activations, the job's own first."""
    for name in dict.fromkeys((str(Codec.parse(job.codec)), *CODECS)):
        codec = Codec.parse(name)
        yield codec, codec.cost(activations)


def first_batch(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """The first samples of shard 0."""
    try:
        train = Batches(job.data(0, job.shards)[0])
        x, y = train[torch.arange(min(job.batch_size, len(train)))]
    except ZsflError:
        raise
    except Exception as error:
        raise ConfigError(
            f"data(0, {job.shards}) of job {job.name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if not len(x):
        raise ConfigError(f"shard 0 of job {job.name!r} has no training samples to measure with")
    return x, y


def _body_cost(
    job: Job, cuts: Cuts, cut: str, x: torch.Tensor, y: torch.Tensor, device: torch.device, seconds: float
) -> BodyCost:
    model, state = cuts.model(cut), cuts.first.state_dict()
    head = Part(model.head, "head", device, batch_norm=job.batch_norm, names=cuts.names(cut))
    body = Part(model.body, "body", device, batch_norm=job.batch_norm, names=cuts.names(cut))
    activations = head.forward(head.load(state), x, seed=job.seed, train=True, need_input_grad=False).output.detach()
    given = activations.cpu()  # as it comes from a client
    weights = body.load(state)
    labels = y.to(device)

    def forward() -> Forward:
        return body.forward(weights, given, seed=job.seed, train=True)

    def backward(done: Forward) -> object:
        if model.u_shaped:
            return body.backward(weights, done, torch.ones_like(done.output))
        n = float(len(labels)) if job.loss_weight is None else float(job.loss_weight(labels))
        return body.backward(weights, done.ending_in(loss_sum(job.loss, done.output, labels, n)))

    times = _times(forward, backward, device, seconds)
    return BodyCost(
        cut=cut,
        samples=len(x),
        activations=activations,
        parameters=sum(parameter.numel() for parameter in model.body.parameters()),
        forward_s=statistics.median(forward_s for forward_s, _ in times),
        backward_s=statistics.median(backward_s for _, backward_s in times),
    )


def _times(
    forward: Callable[[], Forward], backward: Callable[[Forward], object], device: torch.device, seconds: float
) -> list[tuple[float, float]]:
    """Seconds of forward and backward of many steps, once the first few have warmed everything up."""
    times: list[tuple[float, float]] = []
    until_s = float("inf")
    while len(times) < WARM_UP + LEAST_STEPS or time.perf_counter() < until_s:
        begun_s = _now_s(device)
        done = forward()
        between_s = _now_s(device)
        backward(done)
        times.append((between_s - begun_s, _now_s(device) - between_s))
        if len(times) == WARM_UP:
            until_s = time.perf_counter() + seconds
    return times[WARM_UP:]


def _now_s(device: torch.device) -> float:
    """The time once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
