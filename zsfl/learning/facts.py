"""What nodes that run one job must agree on, in words that they can compare."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from zsfl.learning.weighting import MOST_WEIGHT

if TYPE_CHECKING:
    from zsfl.learning.cuts import Cuts
    from zsfl.learning.job import Job

LONGEST_FACT = 120
KEPT_OF_FACT = 80


def facts_of(job: Job, cuts: Cuts) -> dict[str, str]:
    """Short strings by name; `rounds` may differ."""
    facts = {
        "name": job.name,
        "mode": repr(job.how),
        "batches": repr(job.batches),
        "steps": str(job.steps),
        "local_lr": str(job.local_lr),
        "batch_norm": job.batch_norm,
        "merge": str(job.merge),
        "autocast": str(job.autocast),
        "adjust_logits": str(job.adjust_logits),
        "shards": str(job.shards),
        "batch_size": str(job.batch_size),
        "seed": str(job.seed),
        "shuffle": str(job.shuffle),
        "codec": job.codec,
        "optimizer": repr(job.optimizer),
        "loss": _name(job.loss),
        "loss_weight": _name(job.loss_weight),
        "parameters": _shape_digest(cuts.first),
        "cuts": cuts.fact,
    }
    # Only where they are stated, so that a run of before can be resumed.
    facts |= {} if job.average == "mean" else {"average": repr(job.average)}
    facts |= {} if job.bound is None else {"norm_bound": repr(job.bound)}
    facts |= {} if job.most_weight == MOST_WEIGHT else {"most_weight": repr(job.most_weight)}
    facts |= {} if job.protect is None else {"protect": repr(job.protect)}
    return {name: _shortened(fact) for name, fact in facts.items()}


def _shortened(fact: str) -> str:
    """A long fact as its beginning, for people, and a digest that still tells it from any other."""
    if len(fact) <= LONGEST_FACT:
        return fact
    return f"{fact[:KEPT_OF_FACT]}... ({hashlib.sha256(fact.encode()).hexdigest()[:16]})"


def _name(function: object) -> str:
    """A name for a callable that is the same in every process (a `repr` may hold an address)."""
    if isinstance(function, functools.partial):
        inner = cast("functools.partial[Any]", function)
        options = ", ".join(
            f"{key}={value!r}" for key, value in sorted(inner.keywords.items()) if isinstance(value, int | float | str)
        )
        return f"{_name(inner.func)}({options})"
    if isinstance(function, nn.Module) or function is None:
        return repr(function)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _shape_digest(model: nn.Module) -> str:
    """Digest over names, shapes, dtypes and trainability of everything in the state of `model`."""
    lines = [
        f"{name} {list(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
        for name, tensor in sorted(model.state_dict(keep_vars=True).items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
