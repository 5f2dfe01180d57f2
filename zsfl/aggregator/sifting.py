"""Which steps of a window count, and which are refused or clipped, where a job does not trust all of its clients.

Decisions only. What is refused is dropped with the reason, so the ledger says whose it was and why; what is clipped is
recorded with its factor, so that the version can be made again. A job that trusts its clients has nothing looked at:
there a gradient that cannot be used ends the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zsfl.aggregator.commit import Clipped
from zsfl.aggregator.faults import Faults
from zsfl.ids import Cid, Version, parse_cid
from zsfl.learning.averaging import Contribution
from zsfl.learning.flat import FlatTensors
from zsfl.learning.job import Job
from zsfl.learning.modes import Async, max_staleness
from zsfl.learning.plan import Sizes
from zsfl.learning.robust import is_trusting, voters
from zsfl.words import number_of

OFTEN = 3
"""Refusals after which a client is named in a warning."""


@dataclass(frozen=True, slots=True)
class Sifted:
    """A window, and what became of the rest."""

    window: Sequence[Contribution]
    """What counts, clipped where it was too long."""
    dropped: Mapping[Cid, str]
    """What does not, with the reason."""
    clipped: Mapping[Cid, Clipped]
    refused: int = 0
    """Samples of what was refused."""


class Sieve:
    """That of one job."""

    def __init__(self, job: Job, check: Callable[[Sequence[Contribution]], None], warn: Callable[[str], None]) -> None:
        """`check` is to raise RunFailed for what does not fit the model; `warn` is told of what people should know."""
        self._job = job
        self._check = check
        self._warn = warn
        self._bound = job.bound
        self._is_trusting = is_trusting(job.average, job.bound)
        self._kept = max_staleness(job.how)
        self._sizes: dict[Version, Sizes] = {}
        """What was asked of the clients at the versions whose steps may still count, as far as that is known."""
        self._refusals: Counter[int] = Counter()
        self._is_short = False
        self._faults = Faults()

    def sift(
        self, gathered: Sequence[Contribution], dropped: Mapping[Cid, str], version: Version, sizes: Sizes
    ) -> Sifted:
        """The window that is made of all that was gathered; `sizes` are the batches asked for at `version`."""
        if self._is_trusting:
            return Sifted(gathered, dropped, {})
        known: dict[Version, Sizes] = {at: of for at, of in self._sizes.items() if version - at <= self._kept}
        self._sizes = known | {version: {shard: list(of) for shard, of in sizes.items()}}
        steps: dict[Cid, list[Contribution]] = {}
        for one in gathered:
            steps.setdefault(one.cid, []).append(one)
        window: list[Contribution] = []
        refused: dict[Cid, str] = {}
        clipped: dict[Cid, Clipped] = {}
        for cid, parts in steps.items():
            client = next((one.client for one in parts if one.client), parts[0].node)
            norm, why = self._look_at(cid, parts)
            bound = math.inf if self._bound is None else self._bound.norm
            if not why and norm > bound and self._bound is not None and self._bound.beyond == "refuse":
                why = f"its gradient has a norm of {norm:.3g}, and {bound:g} is allowed"
            if why:
                refused[cid] = f"refused: {why} ({client})"
                self._refused(parse_cid(cid).shard, client, why)
            elif norm > bound:
                clipped[cid] = Clipped(by=bound / norm, norm=norm, client=client)
                window += [replace(one, clip=bound / norm) for one in parts]
            else:
                window += parts
        if missing := self._missing(window):
            refused |= {one.cid: missing for one in window}
            window, clipped = [], {}
        samples = sum(one.samples for one in gathered if one.part == "client" and one.cid in refused)
        return Sifted(window, {**dropped, **refused}, clipped, samples)

    def _look_at(self, cid: Cid, parts: Sequence[Contribution]) -> tuple[float, str]:
        """Norm of the mean gradient of a step over all parameters, and why it cannot be used, if so."""
        try:
            return self._measure(cid, parts)
        except Exception as error:
            return 0.0, self._faults.said(error)

    def _measure(self, cid: Cid, parts: Sequence[Contribution]) -> tuple[float, str]:
        self._check(parts)
        n, samples = parts[0].n, parts[0].samples
        if why := self._job.objection_to(n, samples):
            return 0.0, why
        asked = self._asked(cid)
        if asked is not None and samples not in asked:
            return 0.0, f"it is of {number_of(samples, 'sample')} where {asked.stop - 1} were asked for"
        total = 0.0
        for one in parts:
            if name := next((name for name, buffer in one.buffers.items() if not _is_finite(buffer)), None):
                return 0.0, f"its buffer {name} is not finite"
            square = _square(one.grads)
            if not math.isfinite(square):
                names = [name for name, grad in one.grads.items() if not _is_finite(grad)]
                return 0.0, f"its gradient {f'is not finite in {names[0]}' if names else 'is longer than any number'}"
            total += square
        if not n:  # nothing to divide by: it may be of no sample that counts
            return 0.0, "it weighs nothing and has a gradient" if total else ""
        return math.sqrt(total) / n, ""

    def _asked(self, cid: Cid) -> range | None:
        """How many samples the step may be of; None where that is not known any more."""
        step = parse_cid(cid)
        sizes = self._sizes.get(step.version, {}).get(step.shard)
        if not sizes:
            return None
        if isinstance(self._job.how, Async):  # a second step at a version is of another place in the data
            return range(1, (self._job.batch_size if self._job.batches == "equal" else max(sizes) + 1) + 1)
        size = sizes[step.k % self._job.steps]
        return range(size, size + 1)

    def _missing(self, window: Sequence[Contribution]) -> str:
        """Why nothing of the window counts, where there are too few clients for the job's average."""
        how = self._job.average
        if how == "mean" or not window:
            return ""
        there = len(voters(window))
        if there >= how.least:
            return ""
        said = f"{how} needs the steps of {how.least} clients, and those of {there} could be used"
        if not self._is_short:
            self._warn(f"nothing counts of a version: {said}; such versions leave the weights as they are")
        self._is_short = True
        return f"refused: {said}"

    def _refused(self, shard: int, client: str, why: str) -> None:
        self._refusals[shard] += 1
        if self._refusals[shard] == OFTEN:
            self._warn(
                f"the steps of {client} (shard {shard}) are refused again and again, of late because {why}; look at "
                "its data and its program, or run without it. The ledger has all of them"
            )


def _square(grads: Mapping[str, Tensor]) -> float:
    """Sum of the squares of all numbers, in float64; not finite if one of them is not."""
    pieces = [grads.numbers()] if isinstance(grads, FlatTensors) and len(grads) else list(grads.values())
    norms = (float(torch.linalg.vector_norm(piece, dtype=torch.float64)) for piece in pieces)
    return sum(norm * norm for norm in norms)  # a power raises where a product becomes infinite


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
