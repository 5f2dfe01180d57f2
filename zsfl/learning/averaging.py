"""From contributions to one gradient: the monoid (S, n).

Everything is summed in cid order and divided once, so not even the last bit of the result depends on the
order of arrival or on how many servers took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor

from zsfl.errors import RunFailed
from zsfl.ids import SHOWN, Cid, Version
from zsfl.learning.flat import FlatTensors


class StepShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the steps whose body gradients a merged contribution sums up."""

    cid: Annotated[Cid, msgspec.Meta(max_length=64)]
    n: Annotated[float, msgspec.Meta(ge=0, le=1e300)]
    samples: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    client: Annotated[str, msgspec.Meta(max_length=200, pattern=rf"^[{SHOWN}]*\Z")]
    """Name of the client that made it."""


MOST_LOSS = 1e290
"""Of a batch, summed over its samples: of as many as a run can have the sum is a number still."""


def is_loss(loss_sum: float) -> bool:
    """Whether the summed loss of a batch can be counted."""
    return abs(loss_sum) <= MOST_LOSS


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
    grads: Mapping[str, Tensor]
    """By full name (`body.0.weight`): the SUM of per-sample gradients; a missing one is zero."""
    buffers: Mapping[str, Tensor]
    """By full name: the buffers as this step left them, starting from those of `version`."""
    node: str
    """Name of the node that computed it, for messages."""
    client: str = ""
    """Name of the client whose step it is; of a merged one, see `members`."""
    scale: float = 1.0
    """By what its gradient is multiplied, n being left as it is: who contributes beyond its share moves less."""
    damping: float = 1.0
    """The same for being late."""
    clip: float = 1.0
    """The same for a gradient that is longer than the job lets it be."""
    members: tuple[StepShare, ...] = ()
    """Of a merged contribution, the steps that it sums up, its own cid first; n, samples and grads are of all."""

    @property
    def factor(self) -> float:
        """By what its gradient is multiplied, all in all."""
        return self.scale * self.damping * self.clip

    @property
    def whose(self) -> str:
        """Who computed it, and for whom, for messages."""
        clients = sorted({step.client for step in self.members} or {self.client})
        return self.node if clients in ([""], [self.node]) else f"{self.node} for {', '.join(clients)}"


def average(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Gradient by full name: sum of S over sum of n of the contributions with the same part, divided once.

    A contribution of scale c and damping w counts as (c w S, n), a clipped one as (c w k S, n). Where the sum of c w n
    is more than that of n, it is what is divided by: no version moves further than a mean gradient does. `RunFailed`
    when a part's n sum to nothing.
    """
    in_order = ordered(contributions)
    weights: dict[str, float] = {}
    scaled: dict[str, float] = {}
    for contribution in in_order:
        part, weighed = contribution.part, contribution.scale * contribution.damping
        weights[part] = weights.get(part, 0.0) + contribution.n
        scaled[part] = scaled.get(part, 0.0) + weighed * contribution.n
    if not all(weight > 0 for weight in weights.values()):
        raise RunFailed(f"the weights n of a window sum to {weights}: check the job's loss_weight")
    by_part = _flat_sums(in_order)
    if by_part is None:
        by_part = _sums(in_order)
    for part, totals in by_part.items():
        for total in totals.values():
            total /= max(weights[part], scaled[part])
    return {name: total for totals in by_part.values() for name, total in totals.items()}


def _sums(in_order: Sequence[Contribution]) -> dict[str, dict[str, Tensor]]:
    """Gradients summed, by part and name; a name belongs to the part that first has it."""
    totals: dict[str, Tensor] = {}
    part_of: dict[str, str] = {}
    for contribution in in_order:
        factor = contribution.factor
        for name, grad in contribution.grads.items():
            if name in totals:
                totals[name].add_(grad, alpha=factor)
            else:
                totals[name] = grad.to(wide(grad.dtype), copy=True)
                part_of[name] = contribution.part
                if factor != 1:
                    totals[name] *= factor
    parts = dict.fromkeys(part_of.values())
    return {part: {name: total for name, total in totals.items() if part_of[name] == part} for part in parts}


def _flat_sums(in_order: Sequence[Contribution]) -> dict[str, dict[str, Tensor]] | None:
    """The same in one addition for each contribution; None where those of a part have not all the same tensors."""
    sums: dict[str, FlatTensors] = {}
    for contribution in in_order:
        part, factor, grads = contribution.part, contribution.factor, contribution.grads
        if not isinstance(grads, FlatTensors):
            if grads:
                return None
        elif part in sums:
            if sums[part].layout is not grads.layout:
                return None
            sums[part].numbers().add_(grads.numbers(), alpha=factor)
        else:
            total = grads.numbers().to(wide(grads.layout.dtype), copy=True)
            if factor != 1:
                total *= factor
            sums[part] = FlatTensors(grads.layout, total)
    names = [name for total in sums.values() for name in total]
    return None if len(set(names)) < len(names) else {part: dict(total) for part, total in sums.items()}


def ordered(contributions: Sequence[Contribution]) -> list[Contribution]:
    """In cid order, the body's part of a step first."""
    return sorted(contributions, key=lambda contribution: (contribution.cid, contribution.part))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum in: half precision would lose the small ones of many addends."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
