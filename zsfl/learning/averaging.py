"""From contributions to one gradient: the monoid (S, n), and what batch norm needs beside it.

Everything is summed in cid order and divided once, so not even the last bit of the result depends on the
order of arrival or on how many servers took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from zsfl.errors import RunFailed
from zsfl.ids import Cid, Version

_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """The gradient of one step for the parameters that one node holds."""

    cid: Cid
    part: Literal["body", "client"]
    """`client` is head and tail."""
    version: Version
    """Of the weights that the step used."""
    n: float
    """What the gradient is divided by: the step's sample count, or weight sum when the loss is weighted."""
    loss_sum: float | None
    """Sum of the per-sample losses (mean loss times n); None on a node that never sees the loss."""
    samples: int
    grads: dict[str, Tensor]
    """By full name (`body.0.weight`): the SUM of per-sample gradients; a missing one is zero."""
    buffers: dict[str, Tensor]
    """By full name: the buffers as this step left them, starting from those of `version`."""
    node: str
    """Name of the node that computed it, for messages."""


def average(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Gradient by full name: sum of S over sum of n of the contributions with the same part, divided once.

    `RunFailed` when a part's n sum to nothing.
    """
    totals: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    part_of: dict[str, str] = {}
    for contribution in _ordered(contributions):
        weights[contribution.part] = weights.get(contribution.part, 0.0) + contribution.n
        for name, grad in contribution.grads.items():
            if name in totals:
                totals[name] += grad
            else:
                totals[name] = grad.to(_wide(grad.dtype), copy=True)
                part_of[name] = contribution.part
    if not all(weight > 0 for weight in weights.values()):
        raise RunFailed(f"the weights n of a window sum to {weights}: check the job's loss_weight")
    for name, total in totals.items():
        total /= weights[part_of[name]]
    return totals


@dataclass(frozen=True, slots=True)
class NormRule:
    """How one batch norm keeps its running statistics."""

    momentum: float | None
    """Share of a new batch in the running statistics; None for the cumulative mean over all batches."""
    flat: bool
    """Whether a channel has one value per sample (`BatchNorm1d`, taken to see [B, C])."""


def norm_rules(model: nn.Module) -> dict[str, NormRule]:
    """By full name, every batch norm of `model` that keeps running statistics."""
    return {
        name: NormRule(module.momentum, isinstance(module, nn.BatchNorm1d))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def pool_buffers(
    base: Mapping[str, Tensor], contributions: Sequence[Contribution], norms: Mapping[str, NormRule]
) -> dict[str, Tensor]:
    """The buffers of the next version: those of `base` that contributions carry, pooled over these.

    The running statistics of `norms` become what one batch norm over the merged batch would store, see
    `_pool_norm`. Of all other buffers, floating ones become the mean weighted by samples, integer ones the
    highest.
    """
    ordered = _ordered(contributions)
    pooled: dict[str, Tensor] = {}
    for module, rule in norms.items():
        pooled.update(_pool_norm(module, rule, base, ordered))
    for name, before in base.items():
        carriers = [c for c in ordered if name in c.buffers]
        if not carriers or name.rpartition(".")[0] in norms:
            continue
        values = torch.stack([c.buffers[name] for c in carriers])
        if before.is_floating_point():
            pooled[name] = _mean(values.double(), [c.samples for c in carriers]).to(before.dtype)
        else:
            pooled[name] = values.amax(0)
    return pooled


def _pool_norm(
    module: str, rule: NormRule, base: Mapping[str, Tensor], ordered: Sequence[Contribution]
) -> dict[str, Tensor]:
    """Running statistics of one batch norm as if it had seen the merged batch.

    From base statistics (M, V), client i with n_i samples stored r_i = (1-m) M + m mu_i and
    v_i = (1-m) V + m u_i, where mu_i and u_i are the mean and the unbiased variance of its batch. With
    N = sum n_i, the merged batch has the mean mu = sum n_i mu_i / N and the unbiased variance
    [sum (n_i-1) u_i + sum n_i (mu_i - mu)^2] / (N-1), so

        r = sum n_i r_i / N
        v = (1-m) V + [sum (n_i-1) (v_i - (1-m) V) + sum n_i (r_i - r)^2 / m] / (N-1)

    which is exact where a channel has one value per sample. Where it has many, P (2d: height times width),
    each 1 is a 1/P, not known here and taken as 0: an error of the order of 1/P of the variance.
    `BatchNorm1d` over sequences [B, C, L] is treated as [B, C]: small batches store too small a variance.
    """
    mean_name, var_name, count_name = (f"{module}.{kind}" for kind in _NORM_BUFFERS)
    # A batch norm that did not run in training mode has stored nothing new.
    carriers = [c for c in ordered if count_name in c.buffers and bool(c.buffers[count_name] != base[count_name])]
    if not carriers:
        return {}
    pooled = {count_name: base[count_name] + 1}
    momentum = 1.0 / pooled[count_name].item() if rule.momentum is None else rule.momentum
    if momentum == 0:
        return pooled
    samples = [c.samples for c in carriers]
    means = torch.stack([c.buffers[mean_name] for c in carriers]).double()
    variances = torch.stack([c.buffers[var_name] for c in carriers]).double()
    mean = _mean(means, samples)
    kept = (1 - momentum) * base[var_name].double()
    # BatchNorm1d refuses a batch of one value per channel: a single sample had more.
    lost = 1.0 if rule.flat and min(samples) > 1 else 0.0
    within = sum((n - lost) * (v - kept) for n, v in zip(samples, variances, strict=True))
    between = sum(n * (r - mean) ** 2 for n, r in zip(samples, means, strict=True)) / momentum
    pooled[mean_name] = mean.to(base[mean_name].dtype)
    pooled[var_name] = (kept + (within + between) / (sum(samples) - lost)).to(base[var_name].dtype)
    return pooled


def _mean(values: Tensor, weights: Sequence[int]) -> Tensor:
    """Mean over the first axis, summed in its order."""
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0])) / sum(weights)


def _ordered(contributions: Sequence[Contribution]) -> list[Contribution]:
    return sorted(contributions, key=lambda contribution: (contribution.cid, contribution.part))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum in: half precision would lose the small ones of many addends."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
