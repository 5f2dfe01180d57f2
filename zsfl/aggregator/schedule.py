"""Which steps make which version, in exact mode: a pure function of the shards' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zsfl.ids import Cid, RunId, Version, parse_cid, step_cid
from zsfl.learning.batches import windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Window w of a round is the w-th batch of every shard that has so many; a version is one window."""

    run: RunId
    samples: Mapping[int, int]
    """Training samples by shard."""
    batch_size: int

    @property
    def windows(self) -> int:
        """Versions in a round: as many as the largest shard has batches."""
        return max(windows(count, self.batch_size) for count in self.samples.values())

    def place(self, version: Version) -> tuple[int, int]:
        """Round and window whose steps are made at `version`."""
        return divmod(version, self.windows)

    def expected(self, version: Version) -> dict[Cid, int]:
        """The steps that make version + 1: shard by cid, in cid order."""
        _, window = self.place(version)
        return {
            step_cid(self.run, shard, version): shard
            for shard, count in sorted(self.samples.items())
            if window < windows(count, self.batch_size)
        }

    def expects(self, cid: Cid) -> bool:
        """Whether `cid` is one of the steps that make its version's successor."""
        run, version, shard = parse_cid(cid)
        _, window = self.place(version)
        return run == self.run and window < windows(self.samples.get(shard, 0), self.batch_size)
