"""The ledger: which steps made which weights, one record a version, each naming the one before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from zsfl.aggregator.run_folder import RunFolder
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
    """Reason by cid."""
    samples: int
    n: float
    weights: str
    """Digest of the weights this commit made."""


class Ledger:
    """Appends records to the run's ledger file. Committing blocks on the disk."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.last = ""

    def resume(self, last: str) -> None:
        """Go on after the record with this digest."""
        self.last = last

    def commit(self, at: Version, window: Sequence[Contribution], dropped: Mapping[Cid, str], weights: str) -> None:
        """Record that the steps in `window`, made at version `at`, made the next one."""
        steps = [contribution for contribution in window if contribution.part == "client"]
        record = Record(
            version=Version(at + 1),
            predecessor=self.last,
            counted=[step.cid for step in steps],
            dropped=dict(dropped),
            samples=sum(step.samples for step in steps),
            n=sum(step.n for step in steps),
            weights=weights,
        )
        self._folder.append_commit(msgspec.to_builtins(record))
        self.last = hashlib.sha256(msgspec.json.encode(record)).hexdigest()
