"""The ledger: which steps made which weights, one record a version, each naming the one before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import msgspec

from zsfl.aggregator.run_folder import RunFolder
from zsfl.errors import RunFailed
from zsfl.ids import Cid, Version
from zsfl.learning.averaging import Contribution


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One commit."""

    version: Version
    """The version that this commit made."""
    predecessor: str
    """SHA-256 of the record before; empty for the first."""
    counted: list[Cid]
    dropped: dict[Cid, str]
    """Reason by cid: came too late, or never came whole."""
    weighed: dict[Cid, tuple[float, float]]
    """What a counted step's gradient was multiplied by, for its client's share and for being late, where not by 1."""
    samples: int
    n: float
    weights: str
    """Digest of the weights this commit made."""


def check_losses(window: Sequence[Contribution], place: str) -> None:
    """RunFailed, naming the step, when one has a loss that is no finite number."""
    for step in window:
        if step.loss_sum is not None and not math.isfinite(step.loss_sum):
            raise RunFailed(
                f"the loss became {step.loss_sum} at {place}, in the step {step.cid} of {step.node}. "
                "Lower the learning rate, or look for bad samples there"
            )


class Ledger:
    """Appends records to the run's ledger file. Committing blocks on the disk."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.last = ""

    def resume(self, last: str) -> None:
        """Go on after the record with this digest: later ones name versions that are lost and will be made again."""
        self._folder.cut_commits(lambda line: hashlib.sha256(line).hexdigest() == last)
        self.last = last

    def commit(self, at: Version, window: Sequence[Contribution], dropped: Mapping[Cid, str], weights: str) -> None:
        """Record that the steps in `window` made the version after `at`, and what was dropped meanwhile."""
        steps = [contribution for contribution in window if contribution.part == "client"]
        record = Record(
            version=Version(at + 1),
            predecessor=self.last,
            counted=[step.cid for step in steps],
            dropped=dict(dropped),
            weighed={step.cid: (step.scale, step.damping) for step in steps if (step.scale, step.damping) != (1, 1)},
            samples=sum(step.samples for step in steps),
            n=sum(step.n for step in steps),
            weights=weights,
        )
        self._folder.append_commit(msgspec.to_builtins(record))
        self.last = hashlib.sha256(msgspec.json.encode(record)).hexdigest()
