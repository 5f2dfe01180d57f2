"""Noise on what crosses the cut, and what it proves.

A release is one batch's activations as a client sends them in training. Each sample's is scaled down to an L2 norm of
at most C, and Gaussian noise of standard deviation s is added to every number. Whatever the sample was, another one
would have moved its activations by 2C at most (replacement, each sample by itself: nobody has to be trusted with a
sum), so one release is (epsilon, delta)-differentially private, by Balle & Wang 2018 (Theorem 8), where with mu = 2C/s

    delta >= Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)

and T releases of the same sample are together what one of mu sqrt(T) is (Dong, Roth & Su 2022, Corollary 3.3: exact,
and so below what zero-concentrated or Renyi differential privacy give), be it that later ones depend on earlier ones.

It covers the inputs of the samples that a client trains on, as far as activations tell of them. It does not cover

- labels, which a loss needs, nor how many samples there are;
- the gradient of a head that is trained: it goes to the aggregator as it is, and so do, for all clients together, the
  weights that are made of it. With a frozen head everything else that a client sends in training is made of the noised
  activations and the labels, and so is covered;
- held-out samples, whose activations are sent as they are.

A head in which samples depend on one another, or that keeps statistics of them in buffers which are sent, is refused by
the client in its first step.

Numbers are rounded as floating point does: Mironov 2012 shows what an attacker could read from the last bits of noise
that is made so. The tails are cut off at 8.5 s, which adds less than 1e-16 to delta for each number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zsfl.errors import ConfigError
from zsfl.learning.batches import BySpeed, is_number
from zsfl.learning.modes import Async

if TYPE_CHECKING:
    from zsfl.learning.cuts import Cuts
    from zsfl.learning.job import Job

_BLOCK = 1 << 17
"""Numbers that are drawn at once."""
_FAR = 25.0
"""Standard deviations from where on the normal tail is taken from its series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """What a client does to its activations in training; made by `gaussian_noise` or `private_activations`."""

    std: float
    """Of the noise that is added to every number."""
    clip: float | None = None
    """Each sample's activations are scaled down to this L2 norm where they are longer."""
    epsilon: float | None = None
    delta: float | None = None
    """What one release is proven to be; None where nothing is."""
    secret: bool = True
    """Whether the noise follows a key that the client alone has, instead of the job's seed, which all nodes know."""

    @property
    def mu(self) -> float:
        """How far a sample may move its release, in standard deviations of the noise; infinity without a bound."""
        return math.inf if self.clip is None or self.epsilon is None else 2 * self.clip / self.std

    def apply(self, activations: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        """Activations [B, ...], each sample's clipped, plus so many numbers of `noise`; gradients pass through.

        A sample's that are not all finite count as zeros: noise hides no NaN, and which sample makes one is for whoever
        sent the weights to choose.
        """
        if self.clip is not None:
            finite = (
                activations.detach().isfinite().flatten(1).all(dim=1)
                if activations.ndim > 1
                else (activations.detach().isfinite())
            )
            activations = activations.masked_fill(~finite.view(-1, *[1] * (activations.ndim - 1)), 0.0)
            norms = activations.flatten(1).norm(dim=1) if activations.ndim > 1 else activations.abs()
            factors = norms.new_tensor(self.clip) / norms.clamp_min(self.clip)  # exactly 1 for short ones
            activations = activations * factors.view(-1, *[1] * (activations.ndim - 1))
        drawn = noise(activations.numel()).mul_(self.std).view(activations.shape)
        return activations + drawn.to(activations.device, activations.dtype)

    def statement(self, job: Job, cuts: Cuts, rounds: int) -> str:
        """What is proven of so many rounds, and what is not covered, for people."""
        if not self.secret:
            return f"noise of standard deviation {self.std:g} that all nodes know is added to the activations"
        if self.clip is None or self.epsilon is None or self.delta is None:
            return (
                f"noise of standard deviation {self.std:g} is added to the activations: nothing is proven of it, since "
                "nothing bounds how far a sample moves them; zsfl.private_activations states (epsilon, delta)"
            )
        whole = epsilon_of(self.mu * math.sqrt(rounds), self.delta)
        often = isinstance(job.how, Async) or isinstance(job.batches, BySpeed)
        open_ = ["labels", "held-out samples"]
        if any(parameter.requires_grad for cut in cuts.all for parameter in cuts.model(cut).head.parameters()):
            open_.insert(0, "the gradients of the head, which is trained")
        more = "; fast clients may make more" if often else ""
        return (
            f"each release of a sample's activations, clipped to a norm of {self.clip:g} with noise of standard "
            f"deviation {self.std:.4g}, is ({self.epsilon:g}, {self.delta:g})-differentially private, and {rounds} of "
            f"them, one a round, are ({whole:.4g}, {self.delta:g}){more}. Not covered: {', '.join(open_)}"
        )


def gaussian_noise(*, std: float, clip: float | None = None, secret: bool = True) -> Protection:
    """Noise of a standard deviation on every number of the activations, in training only; nothing is proven of it.

    Without `secret` the noise is the same in each run, and known to whoever has the job: an experiment, no protection.
    """
    _check_positive("std", std)
    if clip is not None:
        _check_positive("clip", clip)
    _check_secret(secret)
    return Protection(std=std, clip=clip, secret=secret)


def private_activations(*, clip: float, epsilon: float, delta: float, secret: bool = True) -> Protection:
    """Activations clipped to an L2 norm a sample, with as much noise as makes one release (epsilon, delta)-private.

    The module says what that covers and what not. `secret` as for `gaussian_noise`.
    """
    _check_positive("clip", clip)
    _check_positive("epsilon", epsilon)
    if not (is_number(delta) and 0 < delta < 1):
        raise ConfigError(f"delta is {delta!r}: use a probability above 0 and below 1, such as 1e-5")
    _check_secret(secret)
    return Protection(
        std=2 * clip * noise_multiplier(epsilon, delta), clip=clip, epsilon=epsilon, delta=delta, secret=secret
    )


def delta_of(mu: float, epsilon: float) -> float:
    """The least delta for which a Gaussian mechanism of sensitivity mu, in standard deviations, is so private."""
    if not mu:
        return 0.0
    near, far = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return max(0.0, math.exp(_log_normal(near)) - math.exp(epsilon + _log_normal(far)))


def noise_multiplier(epsilon: float, delta: float) -> float:
    """The least standard deviation, by the sensitivity, with which one release is (epsilon, delta)-private."""
    low, high = _bracket(lambda mu: delta_of(mu, epsilon) > delta)
    return 1 / _bisect(lambda mu: delta_of(mu, epsilon) > delta, low, high)[0]


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon for which a Gaussian mechanism of sensitivity mu is (epsilon, delta)-private."""
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    low, high = _bracket(lambda epsilon: delta_of(mu, epsilon) <= delta)
    return _bisect(lambda epsilon: delta_of(mu, epsilon) <= delta, low, high)[1]


def normal(key: bytes, count: int) -> Tensor:
    """So many normal numbers in float64, random to whoever has not the key: SHAKE256, then Box-Muller."""
    found = np.empty(count + count % 2)
    for block, start in enumerate(range(0, len(found), _BLOCK)):
        size = min(_BLOCK, len(found) - start)
        stream = hashlib.shake_256(key + block.to_bytes(8, "little")).digest(8 * size)
        uniform = (np.frombuffer(stream, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2 * np.log1p(-uniform[: size // 2]))
        angle = 2 * np.pi * uniform[size // 2 :]
        found[start : start + size // 2] = radius * np.cos(angle)
        found[start + size // 2 : start + size] = radius * np.sin(angle)
    return torch.from_numpy(found[:count])


def _log_normal(x: float) -> float:
    """Logarithm of the standard normal distribution at x, as far out as anybody asks."""
    if x > -_FAR:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / x**2 + 3 / x**4 - 15 / x**6)


def _bracket(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Where it does not hold and where it does, one twice the other."""
    low, high = 1.0, 2.0
    while holds(low):
        low, high = low / 2, low
    while not holds(high):
        low, high = high, high * 2
    return low, high


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The same, as near to one another as numbers are."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def _check_positive(name: str, value: float) -> None:
    if not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"{name} is {value!r}: use a number above 0")


def _check_secret(value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"secret is {value!r}: use True or False")
