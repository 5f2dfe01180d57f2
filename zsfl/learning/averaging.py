"""From contributions to one gradient: the monoid (S, n).

Everything is summed in cid order and divided once, so not even the last bit of the result depends on the
order of arrival or on how many servers took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor

from zsfl.errors import RunFailed
from zsfl.ids import Cid, Version


class StepShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the steps whose body gradients a merged contribution sums up."""

    cid: Annotated[Cid, msgspec.Meta(max_length=64)]
    n: Annotated[float, msgspec.Meta(ge=0)]
    samples: Annotated[int, msgspec.Meta(ge=0)]
    client: str
    """Name of the client that made it."""


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
    scale: float = 1.0
    """By what its gradient is multiplied, n being left as it is: who contributes beyond its share moves less."""
    damping: float = 1.0
    """The same for being late."""
    members: tuple[StepShare, ...] = ()
    """Of a merged contribution, the steps that it sums up, its own cid first; n, samples and grads are of all."""


def average(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Gradient by full name: sum of S over sum of n of the contributions with the same part, divided once.

    A contribution of scale c and damping w counts as (c w S, n). Where the sum of c w n is more than that of n, it is
    what is divided by: no version moves further than a mean gradient does. `RunFailed` when a part's n sum to nothing.
    """
    totals: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    scaled: dict[str, float] = {}
    part_of: dict[str, str] = {}
    for contribution in ordered(contributions):
        part, factor = contribution.part, contribution.scale * contribution.damping
        weights[part] = weights.get(part, 0.0) + contribution.n
        scaled[part] = scaled.get(part, 0.0) + factor * contribution.n
        for name, grad in contribution.grads.items():
            if name in totals:
                totals[name].add_(grad, alpha=factor)
            else:
                totals[name] = grad.to(_wide(grad.dtype), copy=True)
                part_of[name] = part
                if factor != 1:
                    totals[name] *= factor
    if not all(weight > 0 for weight in weights.values()):
        raise RunFailed(f"the weights n of a window sum to {weights}: check the job's loss_weight")
    for name, total in totals.items():
        total /= max(weights[part_of[name]], scaled[part_of[name]])
    return totals


def ordered(contributions: Sequence[Contribution]) -> list[Contribution]:
    """In cid order, the body's part of a step first."""
    return sorted(contributions, key=lambda contribution: (contribution.cid, contribution.part))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum in: half precision would lose the small ones of many addends."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
