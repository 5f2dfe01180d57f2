"""Batch norm: which statistics a pass uses, and how the running ones of many clients become one.

Batch norm couples the samples of a batch. With the statistics of each client's own batch a run is not training on the
merged batch, but its running statistics still are those of the merged batch's activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from zsfl.learning.averaging import Contribution, ordered

_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
VALUES = "num_values"
"""Beside a batch norm's buffers, a contribution says how many values per channel it saw."""
LEAST_VALUES, MOST_VALUES = 2, 1 << 40


@dataclass(frozen=True, slots=True)
class NormRule:
    """How one batch norm keeps its running statistics."""

    momentum: float | None
    """Share of a new batch in the running statistics; None for the cumulative mean over all batches."""


def norm_rules(model: nn.Module) -> dict[str, NormRule]:
    """By full name, every batch norm of `model` that keeps running statistics."""
    return {name: NormRule(module.momentum) for name, module in tracked_norms(model).items()}


def tracked_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """By name, every batch norm of `model` that keeps running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def pool_buffers(
    base: Mapping[str, Tensor],
    contributions: Sequence[Contribution],
    norms: Mapping[str, NormRule],
    *,
    frozen: bool = False,
) -> dict[str, Tensor]:
    """The buffers of the next version: those of `base` that contributions carry, pooled over these.

    The running statistics of `norms` become what one batch norm over the merged batch would store, see
    `_pool_norm`; with `frozen` they stay as they are. Of all other buffers, floating ones become the mean weighted
    by samples, integer ones the highest.
    """
    in_order = ordered(contributions)
    pooled: dict[str, Tensor] = {}
    for module, rule in () if frozen else norms.items():
        pooled.update(_pool_norm(module, rule, base, in_order))
    for name, before in base.items():
        carriers = [c for c in in_order if name in c.buffers]
        if not carriers or name.rpartition(".")[0] in norms:
            continue
        values = torch.stack([c.buffers[name] for c in carriers])
        if before.is_floating_point():
            pooled[name] = _mean(values.double(), [c.samples for c in carriers]).to(before.dtype)
        else:
            pooled[name] = values.amax(0)
    return pooled


def _pool_norm(
    module: str, rule: NormRule, base: Mapping[str, Tensor], in_order: Sequence[Contribution]
) -> dict[str, Tensor]:
    """Running statistics of one batch norm as if it had seen the merged batch.

    From base statistics (M, V), client i with N_i values per channel stored r_i = (1-m) M + m mu_i and
    v_i = (1-m) V + m u_i, where mu_i and u_i are the mean and the unbiased variance of its values. With
    N = sum N_i, the merged batch has the mean mu = sum N_i mu_i / N and the unbiased variance
    [sum (N_i-1) u_i + sum N_i (mu_i - mu)^2] / (N-1), so

        r = sum N_i r_i / N
        v = (1-m) V + [sum (N_i-1) (v_i - (1-m) V) + sum N_i (r_i - r)^2 / m] / (N-1)
    """
    mean_name, var_name, count_name = (f"{module}.{kind}" for kind in _NORM_BUFFERS)
    carriers = [c for c in in_order if _has_run(module, base, c)]
    if not carriers:
        return {}
    pooled = {count_name: base[count_name] + 1}
    momentum = 1.0 / pooled[count_name].item() if rule.momentum is None else rule.momentum
    if momentum == 0:
        return pooled
    values = [int(c.buffers[f"{module}.{VALUES}"]) for c in carriers]
    means = torch.stack([c.buffers[mean_name] for c in carriers]).double()
    variances = torch.stack([c.buffers[var_name] for c in carriers]).double()
    mean = _mean(means, values)
    kept = (1 - momentum) * base[var_name].double()
    within = sum((n - 1) * (v - kept) for n, v in zip(values, variances, strict=True))
    between = sum(n * (r - mean) ** 2 for n, r in zip(values, means, strict=True)) / momentum
    pooled[mean_name] = mean.to(base[mean_name].dtype)
    pooled[var_name] = (kept + (within + between) / (sum(values) - 1)).to(base[var_name].dtype)
    return pooled


def _has_run(module: str, base: Mapping[str, Tensor], contribution: Contribution) -> bool:
    """Whether a batch norm stored new statistics: one that did not run in training mode has not."""
    count_name = f"{module}.num_batches_tracked"
    return count_name in contribution.buffers and bool(contribution.buffers[count_name] != base[count_name])


def uncounted(base: Mapping[str, Tensor], contribution: Contribution, norms: Mapping[str, NormRule]) -> str | None:
    """A batch norm that ran in this contribution, which does not say how many values it saw; None if there is none."""
    ran = (module for module in norms if _has_run(module, base, contribution))
    return next((module for module in ran if not _counts(contribution.buffers.get(f"{module}.{VALUES}"))), None)


def _counts(values: Tensor | None) -> bool:
    """Whether it is a number of values that have a variance."""
    return values is not None and LEAST_VALUES <= values.item() <= MOST_VALUES


def _mean(values: Tensor, weights: Sequence[int]) -> Tensor:
    """Mean over the first axis, summed in its order."""
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0])) / sum(weights)
